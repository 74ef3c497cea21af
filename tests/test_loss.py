"""The chunked loss equals cross-entropy over all logits, and never holds them."""

from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from finetune import loss


def pair(trainable: bool) -> tuple[torch.Tensor, torch.nn.Linear, torch.Tensor]:
    torch.manual_seed(0)
    head = torch.nn.Linear(16, 90)
    head.requires_grad_(trainable)
    return torch.randn(50, 16, requires_grad=True), head, torch.randint(0, 90, (50,))


@pytest.mark.parametrize("trainable", [False, True], ids=["frozen head", "trained head"])
def test_equals_cross_entropy_and_its_gradients(trainable: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loss, "CHUNK", 7)
    hidden, head, labels = pair(trainable)
    expected = torch.nn.functional.cross_entropy(head(hidden), labels, reduction="sum")
    (3 * expected).backward()
    wanted = [parameter.grad for parameter in (hidden, head.weight, head.bias)]
    hidden.grad = head.weight.grad = head.bias.grad = None
    found = loss.chunked_nll(hidden, head, labels)
    (3 * found).backward()
    torch.testing.assert_close(found, expected)
    for parameter, gradient in zip((hidden, head.weight, head.bias), wanted, strict=True):
        assert (parameter.grad is None) == (gradient is None)
        if gradient is not None:
            torch.testing.assert_close(parameter.grad, gradient)


class Largest(TorchDispatchMode):
    """Numbers in the largest tensor that any operation returns."""

    numel = 0

    def __torch_dispatch__(self, function: Any, types: Any, arguments: Any = (), keywords: Any = None) -> Any:
        result = function(*arguments, **keywords or {})
        self.numel = max([self.numel, *(leaf.numel() for leaf in tree_leaves(result) if isinstance(leaf, torch.Tensor))])
        return result


@pytest.mark.parametrize("trainable", [False, True], ids=["frozen head", "trained head"])
def test_memory_is_flat_in_tokens_times_vocabulary(trainable: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loss, "CHUNK", 5)
    hidden, head, labels = pair(trainable)
    with Largest() as largest:
        loss.chunked_nll(hidden, head, labels).backward()
    assert largest.numel == max(5 * 90, head.weight.numel())
