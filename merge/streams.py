"""Sequential reading and writing of a shard in large pieces, hashed on other threads as the bytes pass.

Small blocks suit the arithmetic (they stay in a core's cache), large pieces suit the kernel and SHA-256: these two
classes stand between. Each has two buffers and a thread of its own, which hashes (and writes) one while the other is in
use, so that a checkpoint of a single shard keeps two cores busy too.
"""

import hashlib
import os
import threading
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import BinaryIO

import torch

from merge.checkpoint import TensorInfo, pread_exactly

WINDOW = 1 << 21
"""Bytes read, hashed and written at a time."""


class Stopped(Exception):
    """Another thread has failed, so this one need not go on."""


class HashingReader:
    """Reads one file's tensors, mostly forwards, and hashes the file's bytes once, in order, whatever is skipped or
    read again."""

    def __init__(self, file: Path, stop: threading.Event):
        self.file, self.stop = file, stop
        self.descriptor = os.open(file, os.O_RDONLY)
        self.size = os.fstat(self.descriptor).st_size
        self.hash = hashlib.sha256()
        self.hashed = 0
        self.buffers = [bytearray(WINDOW), bytearray(WINDOW)]
        self.jobs: list[Future[None] | None] = [None, None]
        self.turn = 0
        self.start = self.end = 0
        self.thread = ThreadPoolExecutor(1)

    def read(self, info: TensorInfo, start: int, stop: int) -> torch.Tensor:
        """Rows start..stop of a tensor in the dtype of the file; a view that the next call overwrites."""
        raw = self.bytes(info, start * info.row_bytes, (stop - start) * info.row_bytes)
        return torch.frombuffer(raw, dtype=info.dtype).reshape(stop - start, *info.shape[1:])

    def bytes(self, info: TensorInfo, start: int, count: int) -> memoryview:
        """`count` bytes of a tensor from its byte `start`; a view that the next call overwrites."""
        offset = info.offset + start
        if not self.start <= offset <= offset + count <= self.end:
            self.hash_up_to(offset)
            self._fill(offset, max(count, min(WINDOW, info.offset + info.nbytes - offset)))
        return memoryview(self.buffers[self.turn])[offset - self.start : offset - self.start + count]

    def hash_up_to(self, offset: int) -> None:
        """Hash whatever of the file before `offset` was not read yet."""
        while self.hashed < offset:
            self._fill(self.hashed, min(WINDOW, offset - self.hashed))

    def _fill(self, offset: int, count: int) -> None:
        if self.stop.is_set():
            raise Stopped
        self.turn = 1 - self.turn
        _finish(self.jobs, self.turn)
        if len(self.buffers[self.turn]) < count:
            self.buffers[self.turn] = bytearray(count)
        view = memoryview(self.buffers[self.turn])[:count]
        pread_exactly(self.descriptor, view, offset, self.file)
        self.start, self.end = offset, offset + count
        if self.end > self.hashed:
            self.jobs[self.turn] = self.thread.submit(self.hash.update, view[self.hashed - offset :])
            self.hashed = self.end

    def digest(self) -> str:
        """SHA-256 of the whole file."""
        self.hash_up_to(self.size)
        _finish(self.jobs, 0)
        _finish(self.jobs, 1)
        return self.hash.hexdigest()

    def close(self) -> None:
        self.thread.shutdown()
        os.close(self.descriptor)


class HashingWriter:
    """Gathers blocks into large pieces, hashes and writes them, and tells `advance` how many bytes."""

    def __init__(self, file: BinaryIO, advance: Callable[[int], None]):
        self.file, self.advance = file, advance
        self.hash = hashlib.sha256()
        self.buffers = [bytearray(WINDOW), bytearray(WINDOW)]
        self.jobs: list[Future[None] | None] = [None, None]
        self.turn = self.used = 0
        self.thread = ThreadPoolExecutor(1)

    def room(self, count: int) -> memoryview:
        """The next `count` bytes of the file, to be filled before the next call."""
        if self.used + count > len(self.buffers[self.turn]):
            self.flush()
        if count > len(self.buffers[self.turn]):
            self.buffers[self.turn] = bytearray(count)
        self.used += count
        return memoryview(self.buffers[self.turn])[self.used - count : self.used]

    def flush(self) -> None:
        """Hand the filled buffer to the thread and take the other one."""
        self.jobs[self.turn] = self.thread.submit(self._write, memoryview(self.buffers[self.turn])[: self.used])
        self.turn, self.used = 1 - self.turn, 0
        _finish(self.jobs, self.turn)

    def _write(self, view: memoryview) -> None:
        self.hash.update(view)
        self.advance(len(view))
        while view:
            view = view[self.file.write(view) :]

    def digest(self) -> str:
        """SHA-256 of all that was written, when the last byte is."""
        self.flush()
        _finish(self.jobs, 1 - self.turn)
        return self.hash.hexdigest()

    def close(self) -> None:
        """End the thread; the file is the caller's."""
        self.thread.shutdown()


def _finish(jobs: "list[Future[None] | None]", turn: int) -> None:
    """Wait for the job on one of the two buffers, if there is one; raises what it raised."""
    job, jobs[turn] = jobs[turn], None
    if job is not None:
        job.result()
