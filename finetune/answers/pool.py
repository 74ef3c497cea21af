"""A few worker processes that compare answers, started when first needed and ended with this process.

Plain subprocesses with pipes: multiprocessing would import the caller's main module again, which a notebook or a script on standard input
does not have, and forking a process that runs torch's threads is not safe.
"""

import atexit
import json
import logging
import os
import queue
import select
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

SECONDS = 2.0
"""Limit of one comparison: processor time, and at most five times that by the clock (only a busy machine comes near)."""
_START_SECONDS = 60.0
_GRACE_SECONDS = 1.0
_log = logging.getLogger(__name__)


class _Worker:
    def __init__(self) -> None:
        root = str(Path(__file__).resolve().parents[2])
        path = os.pathsep.join([root, *filter(None, [os.environ.get("PYTHONPATH")])])
        self.process = subprocess.Popen(
            [sys.executable, "-m", "finetune.answers.worker"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env={**os.environ, "PYTHONPATH": path},
            start_new_session=True,  # Ctrl-C in a terminal ends the caller, and so the pipe, not the worker in mid-sentence
        )
        self.ready = False

    def ask(self, gold: str, predicted: str, kind: str | None, seconds: float) -> tuple[bool, str | None]:
        """The verdict and the problem met, if any. Raises OSError if the worker is gone or silent."""
        if not self.ready:
            self._read(_START_SECONDS)
            self.ready = True
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps([gold, predicted, kind, seconds]).encode() + b"\n")
        self.process.stdin.flush()
        verdict, problem = json.loads(self._read(5 * seconds + _GRACE_SECONDS))
        return bool(verdict), problem

    def _read(self, seconds: float) -> bytes:
        assert self.process.stdout is not None
        readable, _, _ = select.select([self.process.stdout], [], [], seconds)
        line = self.process.stdout.readline() if readable else b""
        if not line:
            raise ConnectionError(f"the answer worker (process {self.process.pid}) {'ended' if readable else f'was silent for {seconds:g} s'}")
        return line

    def stop(self) -> None:
        self.process.kill()
        self.process.wait()
        for pipe in (self.process.stdin, self.process.stdout):
            if pipe:
                pipe.close()


class Pool:
    """Workers by the number of processors, at most 8. Any thread may call `compare`."""

    def __init__(self) -> None:
        self.pid = os.getpid()
        self.size = max(1, min(8, len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count() or 1))
        self._free: queue.SimpleQueue[_Worker | None] = queue.SimpleQueue()
        for _ in range(self.size):
            self._free.put(None)  # a place for a worker; started when first taken

    def compare(self, gold: str, predicted: str, kind: str | None, seconds: float) -> bool:
        """One verdict. A comparison that takes too long, crashes or cannot be read counts as False, with a warning in the log."""
        worker = self._free.get()
        try:
            worker = worker or _Worker()
            verdict, problem = worker.ask(gold, predicted, kind, seconds)
        except OSError as error:
            verdict, problem = False, str(error)
            if worker:
                worker.stop()
            worker = None
        finally:
            self._free.put(worker)
        if problem:
            _log.warning("Counted as different: gold %.80r, answer %.80r: %s", gold, predicted, problem)
        return verdict

    def compare_all(self, triples: list[tuple[str, str, str | None]], seconds: float) -> list[bool]:
        """The verdict on each (gold, predicted, kind), side by side."""
        if len(triples) < 2:
            return [self.compare(*triple, seconds) for triple in triples]
        with ThreadPoolExecutor(self.size) as threads:
            golds, predictions, kinds = zip(*triples, strict=True)
            return list(threads.map(self.compare, golds, predictions, kinds, [seconds] * len(triples)))

    def stop(self) -> None:
        while not self._free.empty():
            worker = self._free.get()
            if worker:
                worker.stop()


_pool: Pool | None = None
_lock = threading.Lock()


def pool() -> Pool:
    """The pool of this process; a fork gets its own."""
    global _pool
    with _lock:
        if _pool is None or _pool.pid != os.getpid():
            _pool = Pool()
            atexit.register(_pool.stop)
        return _pool
