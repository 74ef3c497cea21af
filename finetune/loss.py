"""The loss of supervised tokens without the logits of all of them: memory does not grow with tokens x vocabulary."""

from typing import Any

import torch
from torch.utils.checkpoint import checkpoint

CHUNK = 256
"""Supervised tokens whose logits are in memory at a time (50 MB of fp32 at a vocabulary of 49152)."""


def chunked_nll(hidden: torch.Tensor, lm_head: torch.nn.Module, labels: torch.Tensor) -> torch.Tensor:
    """Sum of -log p(label) in fp32; hidden (N, width), labels (N), CHUNK rows' logits at a time.

    Where the LM head is a frozen linear layer, the gradient of `hidden` is worked out along with the loss, so that nothing is
    computed twice (as in Liger Kernel's fused linear cross-entropy, arXiv 2410.10989, which needs Triton). Otherwise, say with
    an adapter on the head, the logits are computed again for the gradient.
    """
    if type(lm_head) is torch.nn.Linear and not lm_head.weight.requires_grad:
        return _FrozenHeadNll.apply(hidden, lm_head.weight, lm_head.bias, labels)

    def piece(rows: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.cross_entropy(lm_head(rows).float(), targets, reduction="sum")

    total = hidden.new_zeros((), dtype=torch.float32)
    for start in range(0, len(labels), CHUNK):
        total = total + checkpoint(piece, hidden[start : start + CHUNK], labels[start : start + CHUNK], use_reentrant=False)
    return total


class _FrozenHeadNll(torch.autograd.Function):
    """Negative log-likelihood whose gradient, (softmax - one-hot) @ weight, is kept from the forward pass."""

    @staticmethod
    def forward(ctx: Any, hidden: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, labels: torch.Tensor) -> torch.Tensor:
        total = hidden.new_zeros((), dtype=torch.float32)
        gradient = torch.empty_like(hidden) if ctx.needs_input_grad[0] else None
        for start in range(0, len(labels), CHUNK):
            rows, targets = slice(start, start + CHUNK), labels[start : start + CHUNK, None]
            logits = torch.nn.functional.linear(hidden[rows].to(weight.dtype), weight, bias).float()
            normaliser = logits.logsumexp(1, keepdim=True)
            total += (normaliser - logits.gather(1, targets)).sum()
            if gradient is not None:
                probabilities = logits.sub_(normaliser).exp_()
                probabilities.scatter_add_(1, targets, torch.full_like(targets, -1, dtype=torch.float32))
                gradient[rows] = probabilities.to(weight.dtype) @ weight
        ctx.save_for_backward(gradient)
        return total

    @staticmethod
    def backward(ctx: Any, upstream: torch.Tensor) -> tuple[torch.Tensor, None, None, None]:
        (gradient,) = ctx.saved_tensors
        return gradient * upstream.to(gradient.dtype), None, None, None
