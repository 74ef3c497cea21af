"""dequant(NF4(W)), the weights that QLoRA trained on (arXiv 2305.14314), computed on the CPU with bitsandbytes, a block
of rows at a time.

Equal to bitsandbytes' own quantize_4bit(compress_statistics=True) and dequantize_4bit of the whole tensor bit for bit.
Double quantisation takes the mean over all of a tensor's absmax values, so a tensor is read once to quantise it (its
4-bit codes stay in memory, 22 MB for 11008 x 4096) and each block is then dequantised from the codes.
"""

import math
from collections.abc import Callable
from typing import Any

import torch

from merge.checkpoint import Checkpoint, TensorInfo
from merge.errors import MergeError

BLOCK = 64
"""Weights that share one absmax; bitsandbytes' and QLoRA's default."""
ROWS_AT_ONCE = 1 << 20
"""Elements quantised at a time."""

FAMILIES = frozenset("llama mistral qwen2 qwen3 gemma gemma2 smollm3 phi3 granite olmo olmo2 starcoder2".split())
"""Model types whose 2-D layer weights are all nn.Linear, which transformers quantises, but for the embeddings and
lm_head."""
KEPT = ("embed_tokens.weight", "lm_head.weight")


def quantised_names(base: Checkpoint, config: dict[str, Any]) -> frozenset[str]:
    """Names of the weights that `BitsAndBytesConfig(load_in_4bit=True)` quantises. Raises MergeError for a model family
    not known here."""
    family = config.get("model_type")
    if family not in FAMILIES:
        raise MergeError(
            f"onto='nf4' is not known for model_type {family!r} (known: {', '.join(sorted(FAMILIES))}); use onto='full'."
        )
    return frozenset(
        name
        for name, info in base.tensors.items()
        if len(info.shape) == 2 and name.endswith(".weight") and not name.endswith(KEPT)
    )


class Nf4Tensor:
    """One weight through NF4 with double quantisation and back. `read(info, start, stop)` gives the base's rows;
    `dtype` is the one in which the model was loaded for training: the weight is rounded to it before and after, as
    bitsandbytes does."""

    def __init__(self, info: TensorInfo, read: Callable[[TensorInfo, int, int], torch.Tensor], dtype: torch.dtype):
        try:
            from bitsandbytes import functional
        except ImportError:
            raise MergeError("onto='nf4' needs bitsandbytes: pip install bitsandbytes, or use onto='full'.") from None
        self.functional, self.dtype, self.columns = functional, dtype, info.shape[1]
        step = self.align(max(ROWS_AT_ONCE // self.columns, 1))
        codes, absmax = [], []
        for start in range(0, info.rows, step):
            block = read(info, start, min(start + step, info.rows)).to(dtype)
            if not torch.isfinite(block).all():
                raise MergeError(
                    f"{info.file}: {info.name} holds NaN or infinity (in {dtype}); the file is damaged, or use a dtype with more range."
                )
            packed, state = functional.quantize_4bit(
                block, blocksize=BLOCK, compress_statistics=False, quant_type="nf4"
            )
            codes.append(packed.view(-1))
            absmax.append(state.absmax)
        self.codes, values = torch.cat(codes), torch.cat(absmax)
        offset = values.mean()
        compressed, second = functional.quantize_blockwise(values - offset, blocksize=256)
        self.absmax = functional.dequantize_blockwise(compressed, second).add_(offset)

    def align(self, rows: int) -> int:
        """The next number of rows that ends on a block of 64 weights and on a whole byte of codes."""
        unit = BLOCK // math.gcd(BLOCK, self.columns)
        return -(-rows // unit) * unit

    def rows(self, start: int, stop: int) -> torch.Tensor:
        """Rows start..stop after the round trip, fp32."""
        first = start - start % self.align(1)
        low, high = first * self.columns, stop * self.columns
        state = self.functional.QuantState(
            absmax=self.absmax[low // BLOCK : -(-high // BLOCK)], shape=torch.Size((stop - first, self.columns)), dtype=self.dtype,
            blocksize=BLOCK, quant_type="nf4",
        )  # fmt: skip
        block = self.functional.dequantize_4bit(self.codes[low // 2 : -(-high // 2)].view(-1, 1), state)
        return block[start - first :].float()
