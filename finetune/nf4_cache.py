"""The NF4 base, quantised once and kept: a plain `from_pretrained` of a 7B quantises it anew at every start, with its 16-bit weights in memory.

`cached(...)` returns a folder in the very form in which transformers saves a 4-bit model (`weight`, `weight.absmax`,
`weight.quant_map`, `weight.nested_absmax`, `weight.nested_quant_map`, `weight.quant_state.bitsandbytes__nf4`), so that
`from_pretrained` loads it like any other checkpoint. The first call reads the base tensor by tensor; memory holds one tensor and
SHARD_BYTES of output. Double quantisation, blocks of 64 weights: QLoRA, arXiv 2305.14314, section 3.
"""

import fcntl
import hashlib
import json
import logging
import os
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from finetune.errors import UserError
from finetune.run import sha256, write_atomic
from merge.checkpoint import Checkpoint

if TYPE_CHECKING:
    import torch
    from transformers import BitsAndBytesConfig

log = logging.getLogger("finetune")

SHARD_BYTES = 1_000_000_000
"""Size at which a shard of the cache is written, bytes."""

SMALLEST = 1_000_000_000
"""Bases with fewer bytes of weights are quantised in a few seconds and not cached."""

CHECKSUMS = "checksums.json"
"""SHA-256 of each of the folder's files; written last."""


def worthwhile(folder: Path) -> bool:
    """Whether the base is large enough to be kept in NF4 (and is not quantised already)."""
    if "quantization_config" in json.loads((folder / "config.json").read_text(encoding="utf-8")):
        return False
    return sum(info.nbytes for info in Checkpoint(folder).tensors.values()) >= SMALLEST


def cached(
    folder: Path, cache: Path, quantization: "BitsAndBytesConfig", dtype: "torch.dtype", device: str, trust_remote_code: bool = False
) -> Path:
    """Folder with the base `folder` in NF4, made under `cache` if it is not there yet or is damaged.

    `dtype` is that of the tensors that stay dense (embeddings, norms, lm_head) and that to which a weight is rounded before it is
    quantised, as transformers does. Two processes that need the same one wait for each other. Raises UserError where the disk is
    too small, and MergeError where the base's files are damaged.
    """
    base_hash = weights_hash(folder, cache)
    settings = json.dumps([base_hash, str(dtype), quantization.to_dict()], sort_keys=True, default=str)
    made = cache / hashlib.sha256(settings.encode()).hexdigest()[:16]
    with locked(cache / f".{made.name}.lock"):
        if made.is_dir():
            if intact(made):
                log.info("NF4 base taken from %s", made)
                return made
            log.warning("%s: damaged, its checksums do not hold; it is made again", made)
            shutil.rmtree(made)
        temporary = cache / f".{made.name}.tmp"
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir()
        started = time.monotonic()
        try:
            log.info("quantising %s to NF4, once; it is kept in %s", folder, made)
            quantise(folder, temporary, quantization, dtype, device, trust_remote_code)
            sums = {path.name: sha256(path) for path in sorted(temporary.iterdir())}
            write_atomic(temporary / CHECKSUMS, json.dumps(sums, indent=1))
            os.replace(temporary, made)
        except OSError as error:
            raise UserError(
                f"{made}: the NF4 base cannot be written ({error.strerror or error}), {shutil.disk_usage(cache).free / 1e9:.1f} GB are "
                "free there. Free some space, or set FINETUNE_CACHE to a folder on another disk."
            ) from error
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
        log.info("quantised in %.0f s", time.monotonic() - started)
    return made


def weights_hash(folder: Path, cache: Path) -> str:
    """SHA-256 over the base's weight files and config.json. Each file's own hash is remembered with its size and time of change
    in `cache/hashes.json`, so that 14 GB are not read again at every start."""
    cache.mkdir(parents=True, exist_ok=True)
    memory = cache / "hashes.json"
    known: dict[str, str] = json.loads(memory.read_text(encoding="utf-8")) if memory.exists() else {}
    total = hashlib.sha256()
    for path in [folder / "config.json", *(shard.file for shard in Checkpoint(folder).shards)]:
        status = path.stat()
        key = f"{path.resolve()} {status.st_size} {status.st_mtime_ns}"
        if key not in known:
            known[key] = sha256(path)
        total.update(f"{path.name}\0{known[key]}\n".encode())
    write_atomic(memory, json.dumps(known, indent=1))
    return total.hexdigest()


def intact(made: Path) -> bool:
    """Whether every file of a cached base has the checksum it was written with."""
    recorded: dict[str, str] = json.loads((made / CHECKSUMS).read_text(encoding="utf-8"))
    return all((made / name).exists() and sha256(made / name) == digest for name, digest in recorded.items())


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """Hold an exclusive lock on a file."""
    with open(path, "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def quantise(
    folder: Path, out: Path, quantization: "BitsAndBytesConfig", dtype: "torch.dtype", device: str, trust_remote_code: bool
) -> None:
    """Write the base in NF4 to `out`, reading one tensor at a time.

    Equal bit for bit to what `from_pretrained` quantises. Raises UserError for a model whose checkpoint names its tensors
    otherwise than the model does (transformers renames or fuses them as it loads).
    """
    import torch
    from bitsandbytes.functional import quantize_4bit
    from bitsandbytes.nn import Linear4bit
    from safetensors.torch import save_file
    from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig
    from transformers.quantizers import AutoHfQuantizer

    config = AutoConfig.from_pretrained(folder, trust_remote_code=trust_remote_code)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=dtype, trust_remote_code=trust_remote_code)
    tied = model.all_tied_weights_keys
    AutoHfQuantizer.from_config(quantization, pre_quantized=False).preprocess_model(model=model, device_map={"": device})
    linear = {f"{name}.weight" for name, module in model.named_modules() if isinstance(module, Linear4bit)}

    base = Checkpoint(folder)
    absent = sorted(name for name, _ in model.named_parameters() if name not in base and name not in tied)
    if absent:
        raise UserError(
            f"{folder}: has no tensor {absent[0]} ({len(absent)} in all are missing under the model's names), so it cannot be quantised "
            "as a stream. Load it with transformers and save it again, or set model.quantization=none."
        )
    pending: dict[str, torch.Tensor] = {}
    written: dict[str, str] = {}
    size = 0

    def flush() -> None:
        nonlocal size
        name = f"model-{len(set(written.values())) + 1:05d}.safetensors"
        save_file(pending, out / name, metadata={"format": "pt"})
        written.update(dict.fromkeys(pending, name))
        pending.clear()
        size = 0

    for name, info in base.tensors.items():
        tensor = base.read_rows(name)
        # Integer and boolean tensors keep their type, as in from_pretrained.
        tensor = tensor.to(dtype) if info.dtype.is_floating_point else tensor
        pieces = {name: tensor}
        if name in linear:
            packed, state = quantize_4bit(
                tensor.to(device), blocksize=64, compress_statistics=quantization.bnb_4bit_use_double_quant,
                quant_type=quantization.bnb_4bit_quant_type, quant_storage=quantization.bnb_4bit_quant_storage,
            )
            pieces = {name: packed.cpu()} | {f"{name}.{key}": value.cpu() for key, value in state.as_dict(packed=True).items()}
        pending |= pieces
        size += sum(piece.nbytes for piece in pieces.values())
        del tensor, pieces
        if size > SHARD_BYTES:
            flush()
    if pending:
        flush()
    base.close()

    index = {"metadata": {}, "weight_map": written}
    write_atomic(out / "model.safetensors.index.json", json.dumps(index, indent=1))
    config.dtype = dtype
    config.quantization_config = quantization.to_dict()
    config.save_pretrained(out)
    if (folder / "generation_config.json").exists():
        shutil.copy(folder / "generation_config.json", out)
    else:
        GenerationConfig.from_model_config(config).save_pretrained(out)
    for code in folder.glob("*.py"):  # a model with code of its own
        shutil.copy(code, out)
