"""Fold LoRA adapters into a base model, exactly, in less than a gigabyte, with a certificate.

    certificate = fold("base", "adapter", "merged")
    print(certificate.table())

The fold is done in fp32 and rounded once to the output's dtype. Each shard of the base becomes a shard of the output of the same name. Two threads take
a shard each and walk it block by block: read (pread), hash, fold, round, compare, hash, write; a block stays in one core's cache on its way, and
memory does not grow with the model. Everything is written in a temporary folder beside `out`, renamed when it is complete.

To stream the folded rows elsewhere (GGUF), use `merge.weights.MergedWeights`, on which this is built.
"""

import errno
import json
import math
import os
import shutil
import tempfile
import threading
import time
import warnings
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from dataclasses import dataclass
from pathlib import Path

import torch

from merge.certificate import FILE as CERTIFICATE
from merge.certificate import Certificate, TensorReport, sha256
from merge.checkpoint import DTYPE_CODES, FLOATS, Shard
from merge.combine import Combination
from merge.companions import write_companions
from merge.errors import MergeError
from merge.streams import HashingReader, HashingWriter, Stopped
from merge.weights import OUTPUT_EMBEDDINGS, AdapterLike, MergedTensor, MergedWeights, Stream

Progress = Callable[[int, int], None]

COPY_BYTES = 1 << 20
"""Bytes of an untouched tensor handled at a time."""
MEASURE_EVERY = 4
"""The rounding loss is measured on one block of rows in so many: over all of them it would cost as much as the fold itself."""


def fold(
    base: str | Path,
    adapter: AdapterLike | Sequence[AdapterLike],
    out: str | Path,
    onto: str = "full",
    dtype: str | torch.dtype | None = None,
    progress: Progress | None = None,
) -> Certificate:
    """Write base + adapter(s) to the new folder `out` and return the certificate, also saved there as certificate.json.

    `base` and `adapter` are local folders; a list of adapters folds in order; a `Combination` stands for an adapter. `onto="nf4"` folds into dequant(NF4(base)), the weights QLoRA trained on.
    `dtype` ('float32', 'float16', 'bfloat16') rounds all weights to that instead of the base's own. `progress(done, total)` is called in bytes.
    Raises MergeError, with nothing left under the name `out`, for whatever cannot be done exactly.
    """
    started = time.monotonic()
    out = Path(out)
    if out.exists():
        raise MergeError(f"{out} exists already; give another folder or remove it.")
    weights = MergedWeights(base, adapter, onto, dtype)
    try:
        certificate = _begin_certificate(weights)
        shards = _layout(weights)
        need = sum(shard.nbytes for shard in shards)
        _check_disk(out, need)
        temporary = Path(tempfile.mkdtemp(prefix=f".{out.name}.", suffix=".unfinished", dir=out.parent))
        try:
            _write_shards(weights, shards, temporary, certificate, _counter(progress, need))
            _check_changes(weights, certificate)
            certificate.output |= write_companions(weights, temporary, {tensor.name: shard.name for shard in shards for tensor in shard.tensors}, certificate)
            certificate.seconds = time.monotonic() - started
            certificate.save(temporary)
            os.chmod(temporary, 0o777 & ~_umask())
            os.rename(temporary, out)
        except OSError as error:
            if error.errno in (errno.ENOSPC, errno.EDQUOT):
                raise MergeError(f"the disk of {out.parent} filled up during the fold; free {need / 1e9:.1f} GB or choose another place. Nothing is left of it.") from error
            raise
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
    finally:
        weights.close()
    return certificate


@dataclass(frozen=True)
class OutputShard:
    """A file to write: its tensors in order, its header, and the base's shard that it follows."""

    name: str
    tensors: list[MergedTensor]
    head: bytes
    source: Shard

    @property
    def nbytes(self) -> int:
        return len(self.head) + sum(tensor.nbytes for tensor in self.tensors)


def _layout(weights: MergedWeights) -> list[OutputShard]:
    """The base's shards and order of tensors; an output layer that a tied base does not store goes after the others in the embeddings' shard."""
    extra = [tensor for name, tensor in weights.tensors.items() if name not in weights.base]
    shards = []
    for source in weights.base.shards:
        tensors = [weights.tensors[info.name] for info in source.tensors]
        tensors += [tensor for tensor in extra if tensor.source.file == source.file]
        name = source.file.name
        if not weights.base.is_safetensors:
            name = name.replace("pytorch_model", "model").removesuffix(".bin") + ".safetensors"
        same = [(t.name, t.shape, t.dtype) for t in tensors] == [(i.name, i.shape, i.dtype) for i in source.tensors]
        head = source.head if same and source.head else _header(tensors, source.metadata)
        shards.append(OutputShard(name, tensors, head, source))
    return shards


def _header(tensors: list[MergedTensor], metadata: dict[str, str] | None) -> bytes:
    entries: dict[str, object] = {"__metadata__": metadata or {"format": "pt"}}
    offset = 0
    for tensor in tensors:
        entries[tensor.name] = {"dtype": DTYPE_CODES[tensor.dtype], "shape": tensor.shape, "data_offsets": [offset, offset + tensor.nbytes]}
        offset += tensor.nbytes
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def _begin_certificate(weights: MergedWeights) -> Certificate:
    """Hash the adapters, and refuse an adapter that is in the base already."""
    dtypes = sorted({str(tensor.dtype).removeprefix("torch.") for tensor in weights.tensors.values()})
    certificate = Certificate(weights.onto, ", ".join(dtypes))
    folded: list[str] = []
    if (weights.base.folder / CERTIFICATE).exists():
        earlier = Certificate.load(weights.base.folder)
        folded = earlier.lineage + [digest for files in earlier.adapters for name, digest in files.items() if name.startswith("adapter_model")]
    certificate.lineage = folded
    certificate.notes += [f"combined: {one.describe()}" for one in weights.adapters if isinstance(one, Combination)]
    for adapter in (part for one in weights.adapters for part in one.parts):
        files = [shard.file for shard in adapter.weights.shards] + [adapter.folder / "adapter_config.json"]
        hashes = {file.name: sha256(file) for file in files}
        if adapter.initial is not None:
            hashes |= {f"{adapter.initial.folder.name}/{shard.file.name}": sha256(shard.file) for shard in adapter.initial.shards}
        twice = [digest for name, digest in hashes.items() if name.startswith("adapter_model") and digest in folded]
        if twice:
            raise MergeError(f"{adapter.folder} is folded into {weights.base.folder} already (its certificate.json lists the same adapter file); a second fold would apply it twice.")
        certificate.adapters.append(hashes)
    return certificate


def _check_disk(out: Path, need: int) -> None:
    if not out.parent.is_dir():
        raise MergeError(f"{out.parent} is not a folder; create it first.")
    free = shutil.disk_usage(out.parent).free
    if free < need + (64 << 20):
        raise MergeError(f"{out.parent} has {free / 1e9:.1f} GB free, the merged model needs {need / 1e9:.1f} GB; free some or choose another disk.")


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


def _write_shards(weights: MergedWeights, shards: list[OutputShard], folder: Path, certificate: Certificate, advance: Callable[[int], None]) -> None:
    """All shards, one thread a core; the first error stops them all."""
    threads, precision = torch.get_num_threads(), torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    stop = threading.Event()
    try:
        with ThreadPoolExecutor(min(len(shards), os.cpu_count() or 1), initializer=torch.set_num_threads, initargs=(1,)) as pool:
            ordered = sorted(shards, key=lambda shard: -shard.nbytes)
            jobs = {shard.name: pool.submit(_ShardWriter(weights, shard, folder, advance, stop).write) for shard in ordered}
            wait(jobs.values(), return_when=FIRST_EXCEPTION)
            stop.set()
    finally:
        torch.set_num_threads(threads)
        torch.set_float32_matmul_precision(precision)
    failed = [error for job in jobs.values() if (error := job.exception()) is not None and not isinstance(error, Stopped)]
    if failed:
        raise failed[0]
    for shard in shards:
        done = jobs[shard.name].result()
        certificate.base[shard.source.file.name] = done.base_digest
        certificate.output[shard.name] = done.digest
        certificate.tensors += done.reports
        certificate.unexpected += done.unexpected
        certificate.zero_delta += done.zero_delta
    certificate.total = len(weights.tensors)


class _ShardWriter:
    """Writes one output shard; then `base_digest` and `digest` are the SHA-256 of the base's file and of the written one."""

    def __init__(self, weights: MergedWeights, shard: OutputShard, folder: Path, advance: Callable[[int], None], stop: threading.Event):
        self.weights, self.shard, self.advance = weights, shard, advance
        self.path, self.stop = folder / shard.name, stop
        self.reports: list[TensorReport] = []
        self.unexpected: list[str] = []
        self.zero_delta: list[str] = []

    def write(self) -> "_ShardWriter":
        self.reader = HashingReader(self.shard.source.file, self.stop)
        try:
            with open(self.path, "wb", buffering=0) as file:
                self.writer = HashingWriter(file)
                self.writer.room(len(self.shard.head))[:] = self.shard.head
                for tensor in self.shard.tensors:
                    with self.weights.open(tensor.name, self.reader.read) as stream:
                        if tensor.updates and not stream.updates:
                            self.zero_delta.append(tensor.name)
                        if stream.changes:
                            self._fold(tensor, stream)
                        else:
                            self._copy(tensor)
                    self.advance(tensor.nbytes)
                self.digest, self.base_digest = self.writer.digest(), self.reader.digest()
        finally:
            self.reader.close()
        return self

    def _copy(self, tensor: MergedTensor) -> None:
        """A tensor that nothing changes: the base's bytes, or its values in another dtype."""
        source, changed = tensor.source, False
        for start in range(0, source.nbytes, COPY_BYTES):
            raw = self.reader.bytes(source, start, min(COPY_BYTES, source.nbytes - start))
            values = torch.frombuffer(raw, dtype=source.dtype)
            view = self.writer.room(len(values) * tensor.dtype.itemsize)
            if tensor.dtype == source.dtype:
                view[:] = raw
            else:
                rounded = torch.frombuffer(view, dtype=tensor.dtype).copy_(values)
                changed = changed or not torch.equal(rounded.to(torch.float32), values.to(torch.float32))
                values = rounded
            if values.dtype in FLOATS:
                self._check_finite(tensor, values.sum(dtype=torch.float32).item(), values)
        if changed:
            self.unexpected.append(tensor.name)

    def _fold(self, tensor: MergedTensor, stream: Stream) -> None:
        """A tensor with updates, block by block. Every block is checked to be finite; the change that rounding leaves is measured on every fourth, and
        on all until one has changed."""
        both = intended_square = realised_square = 0.0
        measured = 0
        for number, (start, stop) in enumerate(stream.blocks()):
            base = stream.base_rows(start, stop)
            folded = stream.apply(base, start)
            view = self.writer.room(folded.numel() * tensor.dtype.itemsize)
            rounded = torch.frombuffer(view, dtype=tensor.dtype).view(folded.shape).copy_(folded)
            flat = folded.view(-1) if tensor.dtype != torch.float16 else rounded.view(-1).float()
            self._check_finite(tensor, torch.dot(flat, flat).item(), rounded)
            if number % MEASURE_EVERY == 0 or realised_square == 0.0:
                intended = folded.sub_(base).view(-1)
                realised = rounded.to(torch.float32, copy=True).sub_(base).view(-1)
                both += torch.dot(realised, intended).item()
                intended_square += torch.dot(intended, intended).item()
                realised_square += torch.dot(realised, realised).item()
                measured += folded.numel()
        cosine = both / (intended_square * realised_square) ** 0.5 if intended_square and realised_square else None
        rms = (intended_square / measured) ** 0.5, (realised_square / measured) ** 0.5
        self.reports.append(TensorReport(tensor.name, realised_square > 0 or tensor.nf4, cosine, *rms))

    def _check_finite(self, tensor: MergedTensor, summary: float, values: torch.Tensor) -> None:
        """`summary` is any sum over the values, so it is not finite if one of them is not (and may, very rarely, overflow by itself)."""
        if not math.isfinite(summary) and not torch.isfinite(values).all():
            wide = tensor.dtype == torch.float16 and tensor.source.dtype != torch.float16
            reason = "a value is too large for float16; use bfloat16 or float32" if wide else f"the base's {tensor.source.file.name} is damaged, or training diverged"
            raise MergeError(f"{tensor.name} would hold NaN or infinity: {reason}.")


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
        certificate.notes.append(f"{len(certificate.zero_delta)} of {len(targets)} targets have a delta of exactly zero: {which}.")
        if not changed:
            warnings.warn(f"the adapter changes nothing: {certificate.notes[-1]}", stacklevel=3)
    if OUTPUT_EMBEDDINGS in weights.tensors and OUTPUT_EMBEDDINGS not in weights.base:
        certificate.notes.append("the base ties its embeddings; training moved them apart, so the output stores lm_head.weight (tie_word_embeddings is false).")
