"""`python -m finetune.answers.worker`: compares answers that its parent sends, in a child that it kills when time is up.

One JSON list a line, `[gold, predicted, kind, seconds]` in and `[verdict, problem]` out, after a first line `"ready"`. This process only
keeps the time; sympy runs in a fork of it, which is dear to import but cheap to fork, so a stuck comparison costs no new import.
"""

import ctypes
import json
import os
import resource
import select
import signal
import sys
import time

MEMORY_BYTES = 2 * 1024**3
"""Address space of the child that compares."""
_CLOCK = 5
"""How many times the processor time may pass by the clock, for a busy machine."""
_PR_SET_PDEATHSIG = 1


def main() -> None:
    parent = os.getppid()
    out = os.dup(1)
    null = os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, 1)  # whatever a library prints must not be taken for a verdict
    os.dup2(null, 2)
    from .compare import same

    same(r"\frac{x^2}{2}+\sqrt{3}\sin(x)", r"\frac12 x^2+3^{1/2}\sin x")  # fills the parser's tables once, before any fork
    os.write(out, b'"ready"\n')
    child: _Child | None = None
    buffer = b""
    while True:
        readable, _, _ = select.select([0], [], [], 5)
        if not readable:
            if os.getppid() != parent:
                return
            continue
        chunk = os.read(0, 1 << 16)
        if not chunk:
            return
        buffer += chunk
        while b"\n" in buffer:
            line, buffer = buffer.split(b"\n", 1)
            seconds = json.loads(line)[3]
            child = child or _Child()
            answer = child.ask(line, seconds)
            if answer is None:
                problem = child.kill(seconds)
                child = None
                answer = json.dumps([False, problem]).encode() + b"\n"
            os.write(out, answer)


class _Child:
    """A fork that answers until it is killed."""

    def __init__(self) -> None:
        down, up = os.pipe(), os.pipe()
        self.pid = os.fork()
        if self.pid == 0:
            os.close(down[1])
            os.close(up[0])
            _serve(down[0], up[1])
        os.close(down[0])
        os.close(up[1])
        self.requests, self.replies = down[1], up[0]

    def ask(self, line: bytes, seconds: float) -> bytes | None:
        """The reply, or None if the child dies, or says nothing for so many seconds of its processor time or `_CLOCK` times that by the clock."""
        os.write(self.requests, line + b"\n")
        start, used = time.monotonic(), self._processor_seconds()
        while time.monotonic() - start < _CLOCK * seconds and self._processor_seconds() - used < seconds:
            readable, _, _ = select.select([self.replies], [], [], min(0.05, seconds))
            if readable:
                return os.read(self.replies, 1 << 12) or None
        return None

    def _processor_seconds(self) -> float:
        """What the child has used so far: on a busy machine the clock alone would fail honest comparisons."""
        if sys.platform != "linux":
            return 0.0
        with open(f"/proc/{self.pid}/stat") as stat:
            fields = stat.read().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")

    def kill(self, seconds: float) -> str:
        """End it and say what had happened."""
        finished, _ = os.waitpid(self.pid, os.WNOHANG)
        if not finished:
            os.kill(self.pid, signal.SIGKILL)
            os.waitpid(self.pid, 0)
        os.close(self.requests)
        os.close(self.replies)
        return "the comparison crashed" if finished else f"the comparison took more than {seconds:g} s"


def _serve(requests: int, replies: int) -> None:
    """Answer requests until the pipe closes; never returns."""
    from .compare import same

    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    os.close(0)
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY_BYTES, MEMORY_BYTES))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    sys.set_int_max_str_digits(100_000)
    with os.fdopen(requests, "rb") as lines:
        for line in lines:
            gold, predicted, kind, _ = json.loads(line)
            problem = None
            try:
                verdict = same(gold, predicted, kind)
            except Exception as error:  # sympy and its parser raise almost anything on what they cannot read: reported, not hidden
                verdict, problem = False, f"{type(error).__name__}: {error}"[:200]
            os.write(replies, json.dumps([verdict, problem]).encode() + b"\n")
    os._exit(0)


if __name__ == "__main__":
    main()
