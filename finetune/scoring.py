"""Log-probabilities of completions under a dense policy, each prompt computed once for all of its completions."""

from typing import TYPE_CHECKING, Any

import torch
from transformers import DynamicCache

from finetune.generation import positions

if TYPE_CHECKING:
    from transformers import PreTrainedModel

CHUNK = 256
"""Tokens whose logits are in memory at a time (50 MB of fp32 at a vocabulary of 49152)."""


def completion_logps(
    model: "PreTrainedModel", input_ids: torch.Tensor, mask: torch.Tensor, length: int, temperature: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """(log-probabilities, entropies) of each row's last `length` tokens, both (rows, length) in fp32, 0 where the mask is 0.

    `input_ids` and `mask` are (rows, prompt + length): prompts padded on the left, completions on the right. Logits are divided
    by `temperature`. Gradients go to the model, not through the entropies.
    """
    scored = mask[:, -length:].bool()
    logps = torch.zeros(scored.shape, device=input_ids.device)
    entropies = torch.zeros_like(logps)
    width = max(1, int(scored.sum(1).max()))  # the longest completion here
    cut = input_ids.shape[1] - length + width
    hidden = completion_states(model, input_ids[:, :cut], mask[:, :cut], width)
    scored, targets = scored[:, :width], input_ids[:, cut - width : cut]
    head = model.get_output_embeddings()
    values, spread = TokenLogps.apply(hidden[scored], head.weight, head.bias, targets[scored], temperature)
    full = torch.zeros(input_ids.shape[0], length, dtype=torch.bool, device=input_ids.device)
    full[:, :width] = scored
    return logps.masked_scatter(full, values), entropies.masked_scatter(full, spread)


def completion_states(model: "PreTrainedModel", input_ids: torch.Tensor, mask: torch.Tensor, length: int) -> torch.Tensor:
    """The hidden states that predict each row's last `length` tokens, (rows, length, width).

    Equal prompts go through the model once, and their keys and values are spread over the completions, gradients included. With
    gradient checkpointing or sliding windows, where a cache cannot be trained through, every row carries its own prompt.
    """
    backbone = model.base_model
    cache = DynamicCache(config=model.config)
    if model.is_activation_checkpointing or any(layer.is_sliding for layer in cache.layers):
        states = backbone(input_ids=input_ids, attention_mask=mask, position_ids=positions(mask), use_cache=False).last_hidden_state
        return states[:, -length - 1 : -1]
    prompt = input_ids.shape[1] - length
    rows = torch.stack([input_ids[:, :prompt], mask[:, :prompt]], dim=1)
    prompts, group = rows.unique(dim=0, return_inverse=True)
    ids, shown = prompts.unbind(1)
    states = backbone(
        input_ids=ids, attention_mask=shown, position_ids=positions(shown), past_key_values=cache, use_cache=True
    ).last_hidden_state
    first = states[:, -1:][group]
    if length == 1:
        return first
    cache.batch_select_indices(group)
    rest = backbone(
        input_ids=input_ids[:, prompt:-1], attention_mask=mask[:, :-1], position_ids=positions(mask)[:, prompt:-1],
        past_key_values=cache, use_cache=True,
    ).last_hidden_state
    return torch.cat([first, rest], dim=1)


@torch.no_grad()
def has_plain_head(model: "PreTrainedModel") -> bool:
    """Whether the logits are the output layer's, unchanged: some models scale or cap them (Gemma 2, Granite, Cohere)."""
    ids = torch.arange(8, device=model.device)[None]
    logits = model(input_ids=ids, use_cache=False).logits.float()
    plain = model.get_output_embeddings()(model.base_model(input_ids=ids, use_cache=False).last_hidden_state).float()
    return bool((logits - plain).abs().max() <= 1e-3 * plain.abs().max())


class TokenLogps(torch.autograd.Function):
    """log p and entropy of each row under softmax(head(hidden) / temperature), CHUNK rows' logits at a time.

    hidden (N, width), targets (N) -> two vectors (N) in fp32. The gradient of log p by hidden, (one-hot - p) W / temperature, is
    worked out along with it, so nothing is computed twice (as in Liger Kernel's fused linear cross-entropy, arXiv 2410.10989).
    """

    @staticmethod
    def forward(
        ctx: Any, hidden: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, targets: torch.Tensor, temperature: float
    ) -> tuple[torch.Tensor, torch.Tensor]:
        logps = torch.empty(len(targets), device=hidden.device)
        entropies = torch.empty_like(logps)
        gradient = torch.empty_like(hidden) if ctx.needs_input_grad[0] else None
        for start in range(0, len(targets), CHUNK):
            rows, target = slice(start, start + CHUNK), targets[start : start + CHUNK, None]
            logits = torch.nn.functional.linear(hidden[rows], weight, bias).float().div_(temperature)
            logps_all = logits.sub_(logits.logsumexp(1, keepdim=True))
            logps[rows] = logps_all.gather(1, target)[:, 0]
            probabilities = logps_all.exp()
            entropies[rows] = -torch.linalg.vecdot(probabilities, logps_all.clamp_(min=-1e30))
            if gradient is not None:
                probabilities.scatter_add_(1, target, torch.full_like(target, -1, dtype=torch.float32))
                gradient[rows] = (probabilities.to(weight.dtype) @ weight) / -temperature
        ctx.save_for_backward(gradient)
        ctx.mark_non_differentiable(entropies)
        return logps, entropies

    @staticmethod
    def backward(ctx: Any, upstream: torch.Tensor, _: Any) -> tuple[torch.Tensor, None, None, None, None]:
        (gradient,) = ctx.saved_tensors
        return (gradient.float() * upstream[:, None]).to(gradient.dtype), None, None, None, None
