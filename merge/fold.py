"""Fold LoRA adapters into a base model, exactly, in less than a gigabyte, with a certificate.

    certificate = fold("base", "adapter", "merged")
    print(certificate.table())

The fold is done in fp32 and rounded once to the output's dtype. Each shard of the base becomes a shard of the output of
the same name, block by block (`shards`), so memory does not grow with the model. Everything is written in a temporary
folder beside `out`, renamed when it is complete.

To stream the folded rows elsewhere (GGUF), use `merge.weights.MergedWeights`, on which this is built.
"""

import errno
import os
import shutil
import tempfile
import threading
import time
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from merge.certificate import FILE as CERTIFICATE
from merge.certificate import Certificate, sha256
from merge.combine import Combination, Combined
from merge.companions import write_companions
from merge.errors import MergeError
from merge.shards import layout, write_shards
from merge.weights import OUTPUT_EMBEDDINGS, AdapterLike, MergedWeights

Progress = Callable[[int, int], None]

MEMINFO = Path("/proc/meminfo")
"""Where Linux says how much memory is free; elsewhere the check is skipped."""


def fold(
    base: str | Path,
    adapter: AdapterLike | Sequence[AdapterLike],
    out: str | Path,
    onto: str = "full",
    dtype: str | torch.dtype | None = None,
    progress: Progress | None = None,
) -> Certificate:
    """Write base + adapter(s) to the new folder `out` and return the certificate, also saved there as certificate.json.

    `base` and `adapter` are local folders; a list of adapters folds in order; a `Combination` stands for an adapter.
    `onto="nf4"` folds into dequant(NF4(base)), the weights QLoRA trained on. `dtype` ('float32', 'float16', 'bfloat16')
    rounds all weights to that instead of the base's own. `progress(done, total)` is called in bytes. Raises MergeError,
    with nothing left under the name `out`, for whatever cannot be done exactly.
    """
    started = time.monotonic()
    out = Path(out)
    if out.exists():
        raise MergeError(f"{out} exists already; give another folder or remove it.")
    weights = MergedWeights(base, adapter, onto, dtype)
    try:
        certificate = _begin_certificate(weights)
        shards = layout(weights)
        need = sum(shard.nbytes for shard in shards)
        _check_disk(out, need)
        _check_memory(weights)
        temporary = Path(tempfile.mkdtemp(prefix=f".{out.name}.", suffix=".unfinished", dir=out.parent))
        try:
            write_shards(weights, shards, temporary, certificate, _counter(progress, need))
            _check_changes(weights, certificate)
            certificate.output |= write_companions(
                weights,
                temporary,
                {tensor.name: shard.name for shard in shards for tensor in shard.tensors},
                certificate,
            )
            certificate.seconds = time.monotonic() - started
            certificate.save(temporary)
            os.chmod(temporary, 0o777 & ~_umask())
            os.rename(temporary, out)
        except OSError as error:
            if error.errno in (errno.ENOSPC, errno.EDQUOT):
                raise MergeError(
                    f"the disk of {out.parent} filled up during the fold; free {need / 1e9:.1f} GB or choose another place. Nothing is left of it."
                ) from error
            raise
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
    finally:
        weights.close()
    return certificate


def _begin_certificate(weights: MergedWeights) -> Certificate:
    """Hash the adapters, and refuse an adapter that is in the base already."""
    dtypes = sorted({str(tensor.dtype).removeprefix("torch.") for tensor in weights.tensors.values()})
    certificate = Certificate(weights.onto, ", ".join(dtypes))
    folded: list[str] = []
    if (weights.base.folder / CERTIFICATE).exists():
        earlier = Certificate.load(weights.base.folder)
        folded = earlier.lineage + [
            digest for files in earlier.adapters for name, digest in files.items() if name.startswith("adapter_model")
        ]
    certificate.lineage = folded
    certificate.notes += [f"combined: {one.describe()}" for one in weights.adapters if isinstance(one, Combination)]
    for adapter in (part for one in weights.adapters for part in one.parts):
        files = [shard.file for shard in adapter.weights.shards] + [adapter.folder / "adapter_config.json"]
        hashes = {file.name: sha256(file) for file in files}
        if adapter.initial is not None:
            hashes |= {
                f"{adapter.initial.folder.name}/{shard.file.name}": sha256(shard.file)
                for shard in adapter.initial.shards
            }
        twice = [digest for name, digest in hashes.items() if name.startswith("adapter_model") and digest in folded]
        if twice:
            raise MergeError(
                f"{adapter.folder} is folded into {weights.base.folder} already (its certificate.json lists the same adapter file); a second fold would apply it twice."
            )
        certificate.adapters.append(hashes)
    return certificate


def _check_disk(out: Path, need: int) -> None:
    if not out.parent.is_dir():
        raise MergeError(f"{out.parent} is not a folder; create it first.")
    free = shutil.disk_usage(out.parent).free
    if free < need + (64 << 20):
        raise MergeError(
            f"{out.parent} has {free / 1e9:.1f} GB free, the merged model needs {need / 1e9:.1f} GB; free some or choose another disk."
        )


def _check_memory(weights: MergedWeights) -> None:
    """A fold needs 0.5 GB, and 12 bytes for each value of a tensor that must be whole (DoRA on embeddings, combinations)."""
    if not MEMINFO.exists():
        return
    whole = [
        tensor
        for tensor in weights.tensors.values()
        if any(update.whole or isinstance(update, Combined) for update in tensor.updates)
    ]
    need = 5e8 + 12 * max((torch.Size(tensor.shape).numel() for tensor in whole), default=0)
    free = next(
        int(line.split()[1]) * 1024 for line in MEMINFO.read_text().splitlines() if line.startswith("MemAvailable")
    )
    if free < need:
        raise MergeError(
            f"{free / 1e9:.1f} GB of memory is free, the fold needs {need / 1e9:.1f} GB; close other programs."
        )


def _counter(progress: Progress | None, total: int) -> Callable[[int], None]:
    """Adds up bytes from several threads and reports them."""
    done, lock = 0, threading.Lock()

    def advance(count: int) -> None:
        nonlocal done
        if progress is not None:
            with lock:
                done += count
                progress(done, total)

    return advance


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def _check_changes(weights: MergedWeights, certificate: Certificate) -> None:
    """Count the changes; refuse a non-zero delta of which rounding left nothing."""
    targets = {name: tensor for name, tensor in weights.tensors.items() if not tensor.is_copy}
    certificate.expected = len(targets)
    changed = {report.name for report in certificate.tensors if report.changed}
    lost = [report for report in certificate.tensors if not report.changed and report.intended_rms > 0]
    if lost:
        raise MergeError(
            f"{lost[0].name} is the same after the fold as before ({len(lost)} such of {len(targets)} targets): the adapter's change (rms {lost[0].intended_rms:.1e}) "
            f"vanishes when rounded to {weights.tensors[lost[0].name].dtype}. Fold with dtype='float32', or train longer."
        )
    certificate.changed = len(changed) + len(certificate.unexpected)
    if certificate.zero_delta:
        which = "the output's weights equal the base's" if not changed else "those tensors equal the base's"
        certificate.notes.append(
            f"{len(certificate.zero_delta)} of {len(targets)} targets have a delta of exactly zero: {which}."
        )
        if not changed:
            warnings.warn(f"the adapter changes nothing: {certificate.notes[-1]}", stacklevel=3)
    if OUTPUT_EMBEDDINGS in weights.tensors and OUTPUT_EMBEDDINGS not in weights.base:
        certificate.notes.append(
            "the base ties its embeddings; training moved them apart, so the output stores lm_head.weight (tie_word_embeddings is false)."
        )
