"""Completions in batches, for evaluation, chat and rollouts: one decoding loop over any causal language model."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

STOP_WINDOW = 16
"""Tokens at a completion's end in which a stop string is looked for."""


@dataclass
class Completion:
    """What a model answered."""

    ids: list[int]
    """Token ids, with the EOS if it came."""
    text: str
    """The text without special tokens."""
    finished: bool
    """Whether the model stopped by itself; False: cut off at max_new_tokens."""
    logprobs: list[float]
    """log p of each id at the sampling temperature (1 when greedy), nats, before top_p and top_k cut anything off."""
    entropy: float
    """Mean entropy of the distributions that the ids were drawn from, nats per token, before top_p and top_k."""


@torch.no_grad()
def generate(
    model: "PreTrainedModel",
    tokenizer: "PreTrainedTokenizerBase",
    prompts: list[list[int]],
    max_new_tokens: int,
    batch_size: int,
    temperature: float = 0.0,
    top_p: float = 1.0,
    top_k: int = 0,
    advance: Callable[[int], None] = lambda count: None,
    stop_strings: tuple[str, ...] = (),
) -> list[Completion]:
    """One completion for each prompt (token ids), in the prompts' order; greedy at temperature 0.

    Batches hold prompts of like length, and a prompt that is repeated is computed once per batch. Only the EOS tokens of the
    model's generation config act here, none of its sampling settings. Random numbers come from torch's global CPU generator,
    on any device. `advance` is told how many are done. A completion also ends with the token that completes one of
    `stop_strings`, which stays in its text; that is not `finished`.
    """
    stops = eos_ids(model, tokenizer)
    order = sorted(range(len(prompts)), key=lambda index: (len(prompts[index]), prompts[index]))
    completions: dict[int, Completion] = {}
    training = model.training
    model.eval()
    for start in range(0, len(order), batch_size):
        indices = order[start : start + batch_size]
        decoded = decode(
            model, [prompts[index] for index in indices], stops, tokenizer.pad_token_id, max_new_tokens, temperature, top_p, top_k,
            lambda ids: any(string in tokenizer.decode(ids[-STOP_WINDOW:]) for string in stop_strings),
        )
        for index, (ids, logprobs, entropy) in zip(indices, decoded, strict=True):
            text = tokenizer.decode(ids, skip_special_tokens=True)
            completions[index] = Completion(ids, text, ids[-1] in stops, logprobs, entropy)
        advance(len(indices))
    model.train(training)
    return [completions[index] for index in range(len(prompts))]


def decode(
    model: "PreTrainedModel", prompts: list[list[int]], stops: list[int], pad: int, max_new_tokens: int,
    temperature: float, top_p: float, top_k: int, stopped: Callable[[list[int]], bool] = lambda ids: False,
) -> list[tuple[list[int], list[float], float]]:
    """(ids, log-probabilities, mean entropy) for each prompt of one batch.

    Equal prompts share one prefill, whose cache is then spread over their rows; a finished row leaves the batch, so the last
    rows do not pay for it. transformers' generate does neither, and draws with torch.multinomial, a quarter of its time here.
    """
    from transformers import DynamicCache

    numbers: dict[tuple[int, ...], int] = {}
    rows = torch.tensor([numbers.setdefault(tuple(prompt), len(numbers)) for prompt in prompts], device=model.device)
    ids, mask = pad_left([list(prompt) for prompt in numbers], pad, model.device)
    cache = DynamicCache(config=model.config)
    logits = forward(model, ids, mask, positions(mask), cache)
    cache.batch_select_indices(rows)
    logits, mask = logits[rows], mask[rows]
    position = mask.sum(1)
    alive = list(range(len(prompts)))
    sampled: list[tuple[list[int], list[float], list[float]]] = [([], [], []) for _ in prompts]
    stop = torch.tensor(stops, device=model.device)
    for length in range(1, max_new_tokens + 1):
        tokens, logprobs, entropies = sample(logits, temperature, top_p, top_k)
        for row, token, logprob, entropy in zip(alive, tokens.tolist(), logprobs.tolist(), entropies.tolist(), strict=True):
            sampled[row][0].append(token)
            sampled[row][1].append(logprob)
            sampled[row][2].append(entropy)
        going = ~torch.isin(tokens, stop)
        for place, row in enumerate(alive):
            if stopped(sampled[row][0]):
                going[place] = False
        if length == max_new_tokens or not going.any():
            break
        if not going.all():
            keep = going.nonzero()[:, 0]
            cache.batch_select_indices(keep)
            tokens, mask, position = tokens[keep], mask[keep], position[keep]
            alive = [alive[index] for index in keep.tolist()]
        mask = torch.cat([mask, mask.new_ones(len(alive), 1)], dim=1)
        logits = forward(model, tokens[:, None], mask, position[:, None], cache)
        position = position + 1
    return [(drawn, likely, sum(spread) / len(spread)) for drawn, likely, spread in sampled]


def forward(model: "PreTrainedModel", ids: torch.Tensor, mask: torch.Tensor, position: torch.Tensor, cache: object) -> torch.Tensor:
    """Logits (rows, vocabulary) after the last of `ids`; the cache grows by `ids`."""
    attention = None if bool(mask.all()) else mask  # without padding the attention kernels take their fast path
    output = model(
        input_ids=ids, attention_mask=attention, position_ids=position, past_key_values=cache, use_cache=True, logits_to_keep=1
    )
    return output.logits[:, -1]


def sample(logits: torch.Tensor, temperature: float, top_p: float, top_k: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Draw a token for each row of logits (rows, vocabulary): (tokens, log-probabilities, entropies), each (rows).

    One uniform number a row is looked up in the cumulative distribution, summed in float64: exact, and the vocabulary needs no
    random numbers of its own. Temperature 0 takes the likeliest token.
    """
    logprobs = torch.log_softmax(logits.float() / (temperature if temperature > 0 else 1.0), dim=-1)
    probabilities = logprobs.exp()
    entropies = -(probabilities * logprobs.clamp(min=-1e30)).sum(-1)
    if temperature > 0:
        cumulative = cut(probabilities, top_p, top_k).cumsum(-1, dtype=torch.float64)
        uniform = torch.rand(len(logits), 1, dtype=torch.float64).to(logits.device) * cumulative[:, -1:]
        tokens = torch.searchsorted(cumulative, uniform, right=True)[:, 0].clamp(max=logits.shape[-1] - 1)
    else:
        tokens = logits.argmax(-1)
    return tokens, logprobs.gather(1, tokens[:, None])[:, 0], entropies


def cut(probabilities: torch.Tensor, top_p: float, top_k: int) -> torch.Tensor:
    """The probabilities (rows, vocabulary) with zeros outside the `top_k` likeliest tokens (0: all) and outside the smallest
    set of tokens that holds `top_p` of the probability."""
    if top_k:
        least = probabilities.topk(min(top_k, probabilities.shape[-1]), dim=-1).values[:, -1:]
        probabilities = probabilities.where(probabilities >= least, 0.0)
    if top_p < 1:
        ordered, order = probabilities.sort(dim=-1, descending=True)
        before = ordered.cumsum(-1) - ordered
        outside = before >= top_p * ordered.sum(-1, keepdim=True)
        probabilities = probabilities.scatter(1, order, ordered.masked_fill(outside, 0.0))
    return probabilities


def pad_left(prompts: list[list[int]], pad: int, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """Token ids and mask (1: token, 0: padding), both (rows, longest prompt), padded on the left."""
    width = max(map(len, prompts))
    ids = torch.tensor([[pad] * (width - len(prompt)) + prompt for prompt in prompts], device=device)
    mask = torch.tensor([[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in prompts], device=device)
    return ids, mask


def positions(mask: torch.Tensor) -> torch.Tensor:
    """Position of each token of a left-padded batch, from 0 at its first one; 0 on padding."""
    return (mask.cumsum(-1) - 1).clamp(min=0)


def eos_ids(model: "PreTrainedModel", tokenizer: "PreTrainedTokenizerBase") -> list[int]:
    """Every token that ends a completion: the tokenizer's EOS and those of the generation config."""
    configured = model.generation_config.eos_token_id
    listed = configured if isinstance(configured, list) else [] if configured is None else [configured]
    return sorted({tokenizer.eos_token_id, *listed})
