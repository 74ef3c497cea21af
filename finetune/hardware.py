"""What this machine can do, and each choice with its reason. The one file that owns device facts.

The ladder, chosen once per run and printed:

| | CPU | T4 (sm75) | L4, A10, A100, H100 (sm80 and up) |
|---|---|---|---|
| compute dtype | bfloat16, float32 where the CPU has no bf16 instructions | float16 | bfloat16 |
| attention | sdpa | sdpa | flash_attention_2 if installed, else sdpa |
"""

import importlib.util
import os
import platform
from dataclasses import dataclass
from pathlib import Path

from finetune.config import Config, HardwareConfig
from finetune.errors import UserError


@dataclass(frozen=True)
class Machine:
    """Capabilities, as `detect` finds them; tests make up others."""

    device: str
    """cpu or cuda."""
    name: str
    """What the CPU or GPU calls itself."""
    sm: int = 0
    """CUDA compute capability as one number: 75 for a T4, 80 for an A100; 0 without a GPU."""
    cpu_bf16: bool = False
    """The CPU multiplies bf16 matrices in hardware (AMX or AVX512-BF16)."""
    flash_attn: bool = False
    """The flash-attn package is installed."""
    bitsandbytes: bool = True
    """The bitsandbytes package is installed."""
    gpu_memory: int = 0
    """Memory of the GPU, bytes."""
    ram: int = 0
    """Memory that processes may take, bytes: what is available now, or a container's limit where that is less."""


@dataclass(frozen=True)
class Choices:
    """What a run uses on this machine."""

    device: str
    dtype: str
    attention: str
    quantization: str
    reasons: tuple[str, ...]
    """One sentence a choice, for the log."""


def detect() -> Machine:
    """Ask torch, the CPU and the installed packages."""
    import torch

    installed = {name: importlib.util.find_spec(name) is not None for name in ("flash_attn", "bitsandbytes")}
    if torch.cuda.is_available():
        properties = torch.cuda.get_device_properties(0)
        return Machine(
            device="cuda", name=properties.name, sm=properties.major * 10 + properties.minor,
            gpu_memory=properties.total_memory, ram=available_ram(), **installed,
        )
    cpuinfo = Path("/proc/cpuinfo")
    flags = set(cpuinfo.read_text().split()) if cpuinfo.exists() else set()
    return Machine(
        device="cpu", name=platform.processor() or platform.machine(),
        cpu_bf16=bool(flags & {"amx_bf16", "avx512_bf16"}), ram=available_ram(), **installed,
    )


def available_ram() -> int:
    """Bytes that processes can still take (MemAvailable, see proc(5)), no more than a container's limit (cgroup v2 memory.max);
    without /proc the machine's whole RAM."""
    meminfo, limit = Path("/proc/meminfo"), Path("/sys/fs/cgroup/memory.max")
    if not meminfo.exists():
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    found = next(int(line.split()[1]) * 1024 for line in meminfo.read_text().splitlines() if line.startswith("MemAvailable:"))
    text = limit.read_text().strip() if limit.exists() else "max"
    return found if text == "max" else min(found, int(text))


def target(config: HardwareConfig, here: Machine) -> Machine:
    """The machine that the configuration describes (hardware=t4 and the like), or `here` where it describes none."""
    if config.target is None:
        return here
    assert config.sm is not None and config.gpu_memory_gb is not None, "HardwareConfig sees to it"
    return Machine(
        device="cuda", name=config.target, sm=config.sm, flash_attn=config.sm >= 80, gpu_memory=int(config.gpu_memory_gb * 1e9),
        ram=int(config.ram_gb * 1e9) if config.ram_gb else here.ram,
    )


def choose(config: Config, machine: Machine) -> Choices:
    """Resolve every `auto` for this machine.

    Raises UserError where the configuration asks for what is not there; `auto` never fails.
    """
    device, why_device = _device(config, machine)
    dtype, why_dtype = _dtype(config, machine, device)
    attention, why_attention = _attention(config, machine, device, dtype)
    quantization = config.model.quantization
    if quantization == "nf4" and not machine.bitsandbytes:
        raise UserError("model.quantization=nf4: bitsandbytes is not installed. Install it, or set model.quantization=none.")
    reasons = (f"device {device}: {why_device}", f"dtype {dtype}: {why_dtype}", f"attention {attention}: {why_attention}")
    return Choices(device, dtype, attention, quantization, reasons)


def _device(config: Config, machine: Machine) -> tuple[str, str]:
    wanted = config.hardware.device
    if wanted == "cuda" and machine.device != "cuda":
        raise UserError("hardware.device=cuda: this machine has no CUDA GPU. Use hardware.device=auto or cpu.")
    if wanted == "auto":
        return machine.device, f"{machine.name}" if machine.device == "cuda" else "there is no CUDA GPU"
    return wanted, "as configured"


def _dtype(config: Config, machine: Machine, device: str) -> tuple[str, str]:
    wanted = config.model.dtype
    if wanted == "bfloat16" and device == "cuda" and machine.sm < 80:
        raise UserError(
            f"model.dtype=bfloat16: this GPU (sm{machine.sm}) has no bf16. Use model.dtype=auto, float16 or float32."
        )
    if wanted == "float16" and device == "cpu":
        raise UserError("model.dtype=float16: a CPU does not train in fp16. Use model.dtype=auto, bfloat16 or float32.")
    if wanted != "auto":
        return wanted, "as configured"
    if device == "cuda":
        if machine.sm >= 80:
            return "bfloat16", f"this GPU (sm{machine.sm}) has bf16"
        return "float16", f"this GPU (sm{machine.sm}) has no bf16"
    if machine.cpu_bf16:
        return "bfloat16", "this CPU multiplies bf16 matrices in hardware"
    return "float32", "this CPU has no bf16 instructions"


def _attention(config: Config, machine: Machine, device: str, dtype: str) -> tuple[str, str]:
    wanted = config.model.attention
    obstacle = None
    if device == "cpu":
        obstacle = "it needs a CUDA GPU and this is a CPU"
    elif machine.sm < 80:
        obstacle = f"it needs sm80 or newer and this GPU is sm{machine.sm}"
    elif dtype == "float32":
        obstacle = "it needs bfloat16 or float16 and the dtype is float32"
    elif not machine.flash_attn:
        obstacle = "the flash-attn package is not installed"
    if wanted == "flash_attention_2" and obstacle:
        raise UserError(f"model.attention=flash_attention_2: {obstacle}. Use model.attention=auto, sdpa or eager.")
    if wanted != "auto":
        return wanted, "as configured"
    if obstacle:
        return "sdpa", f"not flash_attention_2, {obstacle}"
    return "flash_attention_2", f"this GPU (sm{machine.sm}) and the flash-attn package allow it"
