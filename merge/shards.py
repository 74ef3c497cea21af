"""Write the output's shards: the base's files, tensor by tensor and block by block, a shard a core at a time.

A thread walks its shard from the first byte to the last and folds, rounds, checks and measures blocks of rows that stay
in the core's cache; `streams` reads, hashes and writes 2 MB at a time around it.
"""

import json
import math
import os
import threading
from collections.abc import Callable
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

import torch

from merge.certificate import Certificate, TensorReport
from merge.checkpoint import DTYPE_CODES, FLOATS, Shard
from merge.errors import MergeError
from merge.streams import HashingReader, HashingWriter, Stopped
from merge.weights import MergedTensor, MergedWeights, Stream

COPY_BYTES = 1 << 20
"""Bytes of an untouched tensor handled at a time."""
MEASURE_EVERY = 4
"""The rounding loss is measured on one block of rows in so many: over all of them it would cost as much as the fold
itself."""


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


def layout(weights: MergedWeights) -> list[OutputShard]:
    """The base's shards and order of tensors; an output layer that a tied base does not store goes after the others in
    the embeddings' shard."""
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
        entries[tensor.name] = {
            "dtype": DTYPE_CODES[tensor.dtype],
            "shape": tensor.shape,
            "data_offsets": [offset, offset + tensor.nbytes],
        }
        offset += tensor.nbytes
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def write_shards(
    weights: MergedWeights,
    shards: list[OutputShard],
    folder: Path,
    certificate: Certificate,
    advance: Callable[[int], None],
) -> None:
    """All shards, one thread a core; the first error stops them all."""
    threads, precision = torch.get_num_threads(), torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    stop = threading.Event()
    try:
        with ThreadPoolExecutor(
            min(len(shards), os.cpu_count() or 1), initializer=torch.set_num_threads, initargs=(1,)
        ) as pool:
            ordered = sorted(shards, key=lambda shard: -shard.nbytes)
            jobs = {
                shard.name: pool.submit(_ShardWriter(weights, shard, folder, advance, stop).write) for shard in ordered
            }
            wait(jobs.values(), return_when=FIRST_EXCEPTION)
            stop.set()
    finally:
        torch.set_num_threads(threads)
        torch.set_float32_matmul_precision(precision)
    failed = [
        error for job in jobs.values() if (error := job.exception()) is not None and not isinstance(error, Stopped)
    ]
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
    """Writes one output shard; then `base_digest` and `digest` are the SHA-256 of the base's file and of the written
    one."""

    def __init__(
        self,
        weights: MergedWeights,
        shard: OutputShard,
        folder: Path,
        advance: Callable[[int], None],
        stop: threading.Event,
    ):
        self.weights, self.shard, self.advance = weights, shard, advance
        self.path, self.stop = folder / shard.name, stop
        self.reports: list[TensorReport] = []
        self.unexpected: list[str] = []
        self.zero_delta: list[str] = []

    def write(self) -> "_ShardWriter":
        with (
            closing(HashingReader(self.shard.source.file, self.stop)) as self.reader,
            open(self.path, "wb", buffering=0) as file,
            closing(HashingWriter(file, self.advance)) as self.writer,
        ):
            self.writer.room(len(self.shard.head))[:] = self.shard.head
            for tensor in self.shard.tensors:
                with self.weights.open(tensor.name, self.reader.read) as stream:
                    if tensor.updates and not stream.updates:
                        self.zero_delta.append(tensor.name)
                    if stream.changes:
                        self._fold(tensor, stream)
                    else:
                        self._copy(tensor)
            self.digest, self.base_digest = self.writer.digest(), self.reader.digest()
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
        """A tensor with updates, block by block. Every block is checked to be finite; the change that rounding leaves
        is measured on every fourth, and on all until one has changed."""
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
        """`summary` is any sum over the values, so it is not finite if one of them is not (and may, very rarely,
        overflow by itself)."""
        if not math.isfinite(summary) and not torch.isfinite(values).all():
            wide = tensor.dtype == torch.float16 and tensor.source.dtype != torch.float16
            reason = (
                "a value is too large for float16; use bfloat16 or float32"
                if wide
                else f"the base's {tensor.source.file.name} is damaged, or training diverged"
            )
            raise MergeError(f"{tensor.name} would hold NaN or infinity: {reason}.")
