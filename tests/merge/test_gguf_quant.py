import gguf
import numpy as np
import pytest
import torch

from merge.gguf_quant import BLOCK_QUANTIZERS, FLOATS, quantize

KINDS = [*FLOATS, *BLOCK_QUANTIZERS]


def rows_of_every_kind() -> torch.Tensor:
    """(n, 64) fp32: noise of several sizes, bf16 noise (many ties of +x and -x), zeros, constants, exact halves."""
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(4000, 64, generator=generator)
    scales = torch.logspace(-20, 3, 24).repeat_interleave(10)[:, None]
    halves = torch.arange(-64, 64).float().repeat(8, 1) / 2  # with a peak of 127 in the block, products end in .5
    halves = torch.cat((halves[:, :64], halves[:, 64:]))
    halves[:, 0] = halves[:, 32] = 127.0
    return torch.cat(
        (
            noise,
            noise[:240] * scales,
            (noise * 0.02).bfloat16().float(),
            torch.randint(-3, 4, (2000, 64), generator=generator).float(),
            torch.zeros(3, 64),
            torch.full((3, 64), -2.5),
            halves,
        )
    )


@pytest.mark.parametrize("kind", KINDS)
def test_bytes_equal_those_of_the_gguf_package(kind: str) -> None:
    rows = rows_of_every_kind()
    expected = gguf.quants.quantize(rows.numpy(), gguf.GGMLQuantizationType[kind])
    expected = expected.view(np.uint8).reshape(len(rows), -1)
    actual = quantize(rows.clone(), kind).numpy()
    assert actual.shape == expected.shape
    wrong = (actual != expected).any(axis=1).nonzero()[0]
    assert not len(wrong), f"{len(wrong)} rows differ, the first is {rows[wrong[0]]}"


@pytest.mark.parametrize("kind", list(BLOCK_QUANTIZERS))
def test_the_bytes_decode_to_nearly_the_weights(kind: str) -> None:
    rows = torch.randn(100, 64, generator=torch.Generator().manual_seed(1))
    back = gguf.quants.dequantize(quantize(rows.clone(), kind).numpy(), gguf.GGMLQuantizationType[kind])
    error = np.abs(back - rows.numpy()).max() / np.abs(rows.numpy()).max()
    assert error < {"Q8_0": 0.005, "Q5_0": 0.04, "Q5_1": 0.04, "Q4_0": 0.08, "Q4_1": 0.08}[kind]
