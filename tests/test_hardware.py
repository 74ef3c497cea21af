"""The ladder of choices, for machines that are not here."""

import pytest

from finetune import hardware
from finetune.config import Config, HardwareConfig, ModelConfig
from finetune.errors import UserError

T4 = hardware.Machine(device="cuda", name="Tesla T4", sm=75, flash_attn=True, gpu_memory=15 << 30)
L4 = hardware.Machine(device="cuda", name="NVIDIA L4", sm=89, flash_attn=True, gpu_memory=23 << 30)
CPU = hardware.Machine(device="cpu", name="x86_64", cpu_bf16=True)


def chosen(machine: hardware.Machine, device: str = "auto", **model: str) -> hardware.Choices:
    return hardware.choose(Config(model=ModelConfig(**model), hardware=HardwareConfig(device=device)), machine)


def test_a_t4_is_downgraded_and_told_why() -> None:
    """Pain point 13: bf16 and FlashAttention-2 need Ampere."""
    choices = chosen(T4)
    assert (choices.device, choices.dtype, choices.attention) == ("cuda", "float16", "sdpa")
    reasons = " ".join(choices.reasons)
    assert "sm75" in reasons and "no bf16" in reasons and "needs sm80" in reasons


def test_flash_attn_is_never_required() -> None:
    """Pain point 14: it is hard to install; without it sdpa does."""
    without = hardware.Machine(device="cuda", name="NVIDIA L4", sm=89, flash_attn=False)
    assert chosen(L4).attention == "flash_attention_2"
    choices = chosen(without)
    assert choices.attention == "sdpa" and "not installed" in " ".join(choices.reasons)


def test_a_cpu_takes_bf16_where_it_has_it() -> None:
    assert chosen(CPU).dtype == "bfloat16"
    assert chosen(hardware.Machine(device="cpu", name="old")).dtype == "float32"
    assert chosen(CPU).attention == "sdpa"


@pytest.mark.parametrize(
    ("machine", "asked", "says"),
    [
        (T4, {"dtype": "bfloat16"}, "has no bf16"),
        (T4, {"attention": "flash_attention_2"}, "needs sm80"),
        (CPU, {"attention": "flash_attention_2"}, "this is a CPU"),
        (CPU, {"dtype": "float16"}, "does not train in fp16"),
        (CPU, {"device": "cuda"}, "has no CUDA GPU"),
    ],
)
def test_what_the_machine_cannot_do_is_refused_with_the_way_out(machine: hardware.Machine, asked: dict, says: str) -> None:
    with pytest.raises(UserError, match=says):
        chosen(machine, **asked)


def test_a_described_gpu_stands_in_for_this_machine() -> None:
    described = HardwareConfig(target="T4", sm=75, gpu_memory_gb=15.0, ram_gb=12.7)
    machine = hardware.target(described, CPU)
    assert (machine.device, machine.sm, machine.gpu_memory, machine.ram) == ("cuda", 75, 15 * 10**9, 12_700_000_000)
    choices = chosen(machine)
    assert (choices.dtype, choices.attention) == ("float16", "sdpa")
    assert hardware.target(HardwareConfig(), CPU) is CPU


def test_a_description_without_its_figures_is_refused() -> None:
    with pytest.raises(UserError, match="gpu_memory_gb"):
        HardwareConfig(target="T4", sm=75)


def test_this_machine_has_ram() -> None:
    assert hardware.detect().ram > 10**8
