"""What an adapter does to one base tensor: each class applies itself to a block of rows, in fp32.

An update is loaded (`load`) before its tensor and dropped (`unload`) after, so that one tensor's matrices are in memory
at a time. `apply(weight, start)` takes rows start.. of the base tensor in fp32, shape (rows, columns), and returns them
changed in a new tensor.

The arithmetic is peft's, in its order, in fp32: `get_delta_weight`, then one addition. peft multiplies whole matrices,
the fold blocks of rows (`weights.Stream.blocks`, multiples of 32 rows): the tests hold the two equal to the last bit
on the shapes of real models. BLAS does not promise it: on another library a product may differ in fp32's last place,
which rounding to bfloat16 mostly removes.
"""

import math
from pathlib import Path
from typing import Protocol

import torch

from merge.checkpoint import Checkpoint, TensorInfo
from merge.errors import MergeError


class Update(Protocol):
    """One change of one base tensor."""

    whole: bool
    """True if `apply` must be given the whole tensor at once."""

    def check(self, target: TensorInfo, folder: Path) -> None:
        """Raise MergeError unless this update fits the target's shape."""

    def shape(self, target: tuple[int, ...]) -> tuple[int, ...]:
        """Shape of the tensor after this update."""

    def load(self) -> bool:
        """Read the matrices; False if the update changes nothing (a delta of exactly zero)."""

    def apply(self, weight: torch.Tensor, start: int) -> torch.Tensor: ...

    def unload(self) -> None: ...


class LowRank:
    """W + scale * B @ A (LoRA, arXiv 2106.09685), or with a magnitude m: m * (W + scale * B @ A) / ||W + scale * B @
    A||, the norm over each output's inputs (DoRA, arXiv 2402.09353). `transposed`: the base stores (in, out), as Conv1D
    and embeddings do."""

    def __init__(
        self,
        weights: Checkpoint,
        a: TensorInfo,
        b: TensorInfo,
        scale: float,
        transposed: bool,
        magnitude: TensorInfo | None = None,
    ):
        self.weights, self.infos, self.scale, self.transposed = weights, (a, b, magnitude), scale, transposed
        self.whole = magnitude is not None and transposed
        self.a = self.b = torch.empty(0)
        self.magnitude: torch.Tensor | None = None

    def check(self, target: TensorInfo, folder: Path) -> None:
        a, b, magnitude = self.infos
        product = (a.shape[1], b.shape[0]) if self.transposed else (b.shape[0], a.shape[1])
        if len(a.shape) != 2 or len(b.shape) != 2 or b.shape[1] != a.shape[0] or product != target.shape:
            raise MergeError(
                f"{folder}: {b.name} {b.shape} @ {a.name} {a.shape} does not fit the base's {target.name} {target.shape}; the adapter was trained on another base."
            )
        if magnitude is not None and magnitude.shape != (b.shape[0],):
            raise MergeError(f"{folder}: {magnitude.name} has shape {magnitude.shape}; expected ({b.shape[0]},).")

    def shape(self, target: tuple[int, ...]) -> tuple[int, ...]:
        return target

    def load(self) -> bool:
        a, b, magnitude = self.infos
        self.a, self.b = (finite(self.weights, info) for info in (a, b))
        self.magnitude = finite(self.weights, magnitude) if magnitude is not None else None
        # Scaling B by a power of two is exact, so it can be done once instead of on each block of the product.
        self.after = self.scale
        if math.frexp(self.scale)[0] == 0.5:
            self.b = self.b * self.scale
            self.after = 1.0
        return self.magnitude is not None or bool(self.a.any() and self.b.any() and self.scale)

    def delta(self, start: int, rows: int) -> torch.Tensor:
        """Rows start.. of scale * B @ A, in the base's orientation."""
        if self.transposed:
            delta = (self.b @ self.a[:, start : start + rows]).T.contiguous()
        else:
            delta = self.b[start : start + rows] @ self.a
        return delta if self.after == 1.0 else delta.mul_(self.after)

    def apply(self, weight: torch.Tensor, start: int) -> torch.Tensor:
        weight = self.delta(start, len(weight)).add_(weight)
        if self.magnitude is None:
            return weight
        if self.transposed:
            return (self.magnitude / torch.linalg.norm(weight.T, dim=1)).view(1, -1) * weight
        return weight.mul_((self.magnitude[start : start + len(weight)] / torch.linalg.norm(weight, dim=1)).view(-1, 1))

    def unload(self) -> None:
        self.a = self.b = torch.empty(0)
        self.magnitude = None


class Undo(LowRank):
    """W - scale * B0 @ A0, rounded to the base's dtype: what PiSSA, CorDA, OLoRA and LoRA-GA did to the base when
    training began (peft 0.21, layer.py)."""

    def __init__(
        self, weights: Checkpoint, a: TensorInfo, b: TensorInfo, scale: float, transposed: bool, scale_first: bool
    ):
        super().__init__(weights, a, b, scale, transposed)
        self.scale_first = scale_first
        self.dtype = torch.float32

    def check(self, target: TensorInfo, folder: Path) -> None:
        super().check(target, folder)
        self.dtype = target.dtype

    def load(self) -> bool:
        changes = super().load()
        if self.scale_first and self.after != 1.0:
            self.b, self.after = self.b * self.after, 1.0
        return changes

    def apply(self, weight: torch.Tensor, start: int) -> torch.Tensor:
        return (weight - self.delta(start, len(weight))).to(self.dtype).float()


class Replace:
    """The adapter's own tensor instead of the base's: modules_to_save, trained biases, resized embeddings."""

    whole = False

    def __init__(self, weights: Checkpoint, info: TensorInfo):
        self.weights, self.info = weights, info

    def check(self, target: TensorInfo, folder: Path) -> None:
        if self.info.shape != target.shape and (len(target.shape) != 2 or self.info.shape[1:] != target.shape[1:]):
            raise MergeError(
                f"{folder}: {self.info.name} {self.info.shape} does not fit the base's {target.name} {target.shape}; the adapter was trained on another base."
            )

    def shape(self, target: tuple[int, ...]) -> tuple[int, ...]:
        return self.info.shape

    def load(self) -> bool:
        return True

    def apply(self, weight: torch.Tensor, start: int) -> torch.Tensor:
        return self.weights.read_rows(self.info.name, start, start + len(weight)).float()

    def unload(self) -> None:
        pass


class SetRows:
    """Some rows replaced: trainable_token_indices (peft's `trainable_tokens_delta` holds the new rows themselves)."""

    whole = False

    def __init__(self, weights: Checkpoint, info: TensorInfo, indices: list[int]):
        self.weights, self.info, self.indices = weights, info, indices
        self.values = torch.empty(0)

    def check(self, target: TensorInfo, folder: Path) -> None:
        if self.info.shape[1:] != target.shape[1:]:
            raise MergeError(
                f"{folder}: {self.info.name} {self.info.shape} does not fit the base's {target.name} {target.shape}; the adapter was trained on another base."
            )

    def shape(self, target: tuple[int, ...]) -> tuple[int, ...]:
        if min(self.indices) < 0 or max(self.indices) >= target[0]:
            raise MergeError(
                f"trainable_token_indices names row {max(self.indices)}, but {self.info.name}'s target has {target[0]} rows."
            )
        return target

    def load(self) -> bool:
        self.values = finite(self.weights, self.info)
        return True

    def apply(self, weight: torch.Tensor, start: int) -> torch.Tensor:
        weight = weight.clone()
        for index, row in zip(self.indices, self.values, strict=True):
            if start <= index < start + len(weight):
                weight[index - start] = row
        return weight

    def unload(self) -> None:
        self.values = torch.empty(0)


class AddBias:
    """bias + scale * lora_B.bias (lora_bias=True)."""

    whole = False

    def __init__(self, weights: Checkpoint, info: TensorInfo, scale: float):
        self.weights, self.info, self.scale = weights, info, scale

    def check(self, target: TensorInfo, folder: Path) -> None:
        if self.info.shape != target.shape:
            raise MergeError(
                f"{folder}: {self.info.name} {self.info.shape} does not fit the base's {target.name} {target.shape}."
            )

    def shape(self, target: tuple[int, ...]) -> tuple[int, ...]:
        return target

    def load(self) -> bool:
        self.values = finite(self.weights, self.info) * self.scale
        return bool(self.values.any())

    def apply(self, weight: torch.Tensor, start: int) -> torch.Tensor:
        return weight + self.values[start : start + len(weight)]

    def unload(self) -> None:
        self.values = torch.empty(0)


def same_effect(left: list[Update], right: list[Update]) -> bool:
    """True if two plans, of the input and the output embeddings of a tied pair, make the same matrix."""
    return len(left) == len(right) and all(_same(one, other) for one, other in zip(left, right, strict=True))


def _same(left: Update, right: Update) -> bool:
    if isinstance(left, Replace) and isinstance(right, Replace):
        if left.info.shape != right.info.shape:
            return False
        step = max((1 << 20) // max(left.info.row_bytes, 1), 1)
        blocks = ((start, min(start + step, left.info.rows)) for start in range(0, left.info.rows, step))
        return all(
            torch.equal(
                left.weights.read_rows(left.info.name, *block), right.weights.read_rows(right.info.name, *block)
            )
            for block in blocks
        )
    if (
        isinstance(left, LowRank)
        and isinstance(right, LowRank)
        and left.infos[2] is right.infos[2] is None
        and left.scale == right.scale
    ):
        (a, b), (c, d) = (
            [finite(update.weights, info) for info in update.infos[:2] if info] for update in (left, right)
        )
        return left.transposed != right.transposed and torch.equal(a, d.T) and torch.equal(b, c.T)
    return False


def finite(weights: Checkpoint, info: TensorInfo) -> torch.Tensor:
    """A whole tensor in fp32; MergeError if it holds NaN or infinity."""
    value = weights.read_rows(info.name).float()
    if not torch.isfinite(value).all():
        raise MergeError(
            f"{info.file}: {info.name} holds NaN or infinity; training diverged or the file is damaged. Use an earlier checkpoint."
        )
    return value
