"""GGML's block quantisers in torch: byte-identical to the `gguf` package's NumPy ones, and about ten times as fast.

Every type but F32, F16 and BF16 stores a row as blocks of 32 weights, each block with its own fp16 scale (and, for the
`_1` types, its own fp16 minimum). The arithmetic is `gguf/quants.py`'s (its Q8_0 equals ggml-quants.c bit for bit).
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

BLOCK = 32
"""Weights that share one scale."""


def _f16_bytes(values: Tensor) -> Tensor:
    """(n, 1) fp32 -> (n, 2) uint8: little-endian fp16."""
    return values.half().view(torch.uint8)


def _inverse(scale: Tensor) -> Tensor:
    return torch.where(scale == 0, scale, scale.reciprocal())


def _range(blocks: Tensor) -> tuple[Tensor, Tensor]:
    """Smallest and largest of each block, (n, 1) each. torch.aminmax over a short last dimension is four times as
    slow."""
    return blocks.amin(dim=1, keepdim=True), blocks.amax(dim=1, keepdim=True)


def _signed_peak(blocks: Tensor) -> Tensor:
    """(n, 32) -> (n, 1): in each block the value of the largest magnitude, the first of them where two tie."""
    low, high = _range(blocks)
    peak = torch.where(high >= -low, high, low)
    # bf16 weights often hold both +x and -x; only there does the order within the block matter.
    tied = ((high == -low) & (high != 0)).squeeze(1).nonzero().squeeze(1)
    if len(tied):
        some = blocks[tied]
        peak[tied] = some.gather(1, some.abs().argmax(dim=1, keepdim=True))
    return peak


def _nibbles(codes: Tensor) -> Tensor:
    """(n, 32) uint8 -> (n, 16): the first half's low four bits below the second half's."""
    low, high = codes[:, :16], codes[:, 16:]
    return (low & 15) | (high << 4)


def _fifth_bits(codes: Tensor) -> Tensor:
    """(n, 32) uint8 below 32 -> (n, 4): bit 4 of each code, the first code in the lowest bit."""
    places = torch.arange(8, dtype=torch.uint8)
    return ((codes >> 4).view(-1, 4, 8) << places).sum(dim=2, dtype=torch.uint8)


def _symmetric(blocks: Tensor, levels: int) -> tuple[Tensor, Tensor]:
    """Scale (n, 1) and codes (n, 32) uint8 of Q4_0 (levels 8) and Q5_0 (levels 16)."""
    scale = _signed_peak(blocks) / -levels
    codes = blocks.mul_(_inverse(scale)).add_(levels + 0.5).to(torch.uint8)
    return scale, codes.clamp_(max=2 * levels - 1)


def _asymmetric(blocks: Tensor, top: int) -> tuple[Tensor, Tensor, Tensor]:
    """Scale (n, 1), minimum (n, 1) and codes (n, 32) uint8 of Q4_1 (top 15) and Q5_1 (top 31)."""
    low, high = _range(blocks)
    scale = (high - low) / top
    codes = blocks.sub_(low).mul_(_inverse(scale)).add_(0.5).to(torch.uint8)
    return scale, low, codes.clamp_(max=top)


def _q8_0(blocks: Tensor) -> Tensor:
    low, high = _range(blocks)
    scale = torch.maximum(high, -low).abs_() / 127  # abs: a block of zeros has no -0 scale
    # Halves round away from zero: with y = trunc(2 x) that is (y + 1) >> 1, and y >> 1 below zero. All of it is exact,
    # and 16-bit integers take half the memory traffic of floats.
    codes = blocks.mul_(2 * _inverse(scale)).to(torch.int16)
    codes += codes >> 15
    codes += 1
    codes >>= 1
    coded = torch.empty(len(blocks), 2 + BLOCK, dtype=torch.uint8)
    coded[:, :2] = _f16_bytes(scale)
    coded[:, 2:].view(torch.int8).copy_(codes)
    return coded


def _q4_0(blocks: Tensor) -> Tensor:
    scale, codes = _symmetric(blocks, 8)
    return torch.cat((_f16_bytes(scale), _nibbles(codes)), dim=1)


def _q4_1(blocks: Tensor) -> Tensor:
    scale, low, codes = _asymmetric(blocks, 15)
    return torch.cat((_f16_bytes(scale), _f16_bytes(low), _nibbles(codes)), dim=1)


def _q5_0(blocks: Tensor) -> Tensor:
    scale, codes = _symmetric(blocks, 16)
    return torch.cat((_f16_bytes(scale), _fifth_bits(codes), _nibbles(codes)), dim=1)


def _q5_1(blocks: Tensor) -> Tensor:
    scale, low, codes = _asymmetric(blocks, 31)
    return torch.cat((_f16_bytes(scale), _f16_bytes(low), _fifth_bits(codes), _nibbles(codes)), dim=1)


FLOATS: dict[str, torch.dtype] = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
"""Types that store each weight by itself."""

BLOCK_QUANTIZERS: dict[str, Callable[[Tensor], Tensor]] = {
    "Q8_0": _q8_0,
    "Q4_0": _q4_0,
    "Q4_1": _q4_1,
    "Q5_0": _q5_0,
    "Q5_1": _q5_1,
}
"""Types that store blocks of 32: (blocks, 32) fp32, overwritten -> (blocks, bytes of a block) uint8."""

BLOCK_BYTES: dict[str, int] = {"Q8_0": 34, "Q4_0": 18, "Q4_1": 20, "Q5_0": 22, "Q5_1": 24}
"""Bytes of a block."""

# fp16 holds at most 65504: a weight past that, or a block whose scale is past it, would become infinite in the file.
LARGEST: dict[str, float] = {
    "F32": float("inf"),
    "BF16": 3.38e38,
    "F16": 65504.0,
    "Q8_0": 65504.0 * 127,
    "Q4_0": 65504.0 * 8,
    "Q5_0": 65504.0 * 16,
    "Q4_1": 65504.0,
    "Q5_1": 65504.0,
}
"""The largest magnitude that each type can hold."""


def quantize(rows: Tensor, kind: str) -> Tensor:
    """Encode rows of weights as one GGML type.

    rows: (n, columns) fp32, finite, contiguous, overwritten; columns a multiple of 32 for the block types. kind: a key
    of FLOATS or BLOCK_QUANTIZERS. Returns (n, bytes of a row) uint8, the bytes that `gguf.quants.quantize` would give.
    """
    if kind in FLOATS:
        return rows.to(FLOATS[kind]).view(torch.uint8)
    return BLOCK_QUANTIZERS[kind](rows.view(-1, BLOCK)).view(rows.shape[0], -1)
