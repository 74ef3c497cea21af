"""Completions in batches, for evaluation, chat and rollouts."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


@dataclass
class Completion:
    """What a model answered."""

    ids: list[int]
    """Token ids, with the EOS if it came."""
    text: str
    """The text without special tokens."""
    finished: bool
    """Whether the model stopped by itself; False: cut off at max_new_tokens."""


@torch.inference_mode()
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
) -> list[Completion]:
    """One completion for each prompt (token ids), in the prompts' order; greedy at temperature 0.

    Batches hold prompts of like length, padded on the left. `advance` is told how many are done.
    """
    from transformers import GenerationConfig

    stops = eos_ids(model, tokenizer)
    settings = GenerationConfig(
        max_new_tokens=max_new_tokens, do_sample=temperature > 0, temperature=temperature if temperature > 0 else None,
        top_p=top_p if temperature > 0 else None, top_k=top_k if temperature > 0 else None,
        eos_token_id=stops, pad_token_id=tokenizer.pad_token_id, bos_token_id=tokenizer.bos_token_id, use_cache=True,
    )
    order = sorted(range(len(prompts)), key=lambda index: len(prompts[index]))
    completions: dict[int, Completion] = {}
    model.eval()
    for start in range(0, len(order), batch_size):
        indices = order[start : start + batch_size]
        width = max(len(prompts[index]) for index in indices)
        ids = torch.full((len(indices), width), tokenizer.pad_token_id)
        mask = torch.zeros_like(ids)
        for row, index in enumerate(indices):
            ids[row, width - len(prompts[index]) :] = torch.tensor(prompts[index])
            mask[row, width - len(prompts[index]) :] = 1
        out = model.generate(input_ids=ids.to(model.device), attention_mask=mask.to(model.device), generation_config=settings)
        for row, index in enumerate(indices):
            new = out[row, width:].tolist()
            end = next((position for position, token in enumerate(new) if token in stops), None)
            kept = new if end is None else new[: end + 1]
            completions[index] = Completion(kept, tokenizer.decode(kept, skip_special_tokens=True), end is not None)
        advance(len(indices))
    return [completions[index] for index in range(len(prompts))]


def eos_ids(model: "PreTrainedModel", tokenizer: "PreTrainedTokenizerBase") -> list[int]:
    """Every token that ends a completion: the tokenizer's EOS and those of the generation config."""
    configured = model.generation_config.eos_token_id
    listed = configured if isinstance(configured, list) else [] if configured is None else [configured]
    return sorted({tokenizer.eos_token_id, *listed})
