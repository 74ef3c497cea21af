"""Run Python that a model wrote: no network, no files but a scratch folder, bounded in time, memory, processes and output.

Three levels, the strongest that this machine offers:

- `bubblewrap`: the bwrap program (Debian, Ubuntu: `apt-get install bubblewrap`) builds the namespaces;
- `namespaces`: `unshare` of util-linux builds them: user, mount, process, network and IPC namespaces and a root of its own;
- `rlimits`: resource limits only. Such code can read every file that the user can, and use the network: refused unless asked for.

The two strong levels show the code nothing but the interpreter, its packages and the system's libraries, read-only, and an empty scratch
folder in memory. Where the caller is root the code runs as a user that owns nothing, for the kernel exempts root from the limit on
processes.
"""

import math
import os
import random
import selectors
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

from .errors import UserError

_USERS = range(20_000, 60_000)
"""Users that own nothing. Each run draws one, so that runs side by side do not count one another's processes."""
_SYSTEM_FOLDERS = ("/usr", "/bin", "/sbin", "/lib", "/lib32", "/lib64", "/etc/ld.so.cache", "/etc/alternatives", "/opt/hostedtoolcache")
_DEVICES = ("/dev/null", "/dev/zero", "/dev/random", "/dev/urandom")
_PROBE_SECONDS = 20.0


@dataclass(frozen=True)
class Limits:
    timeout: float = 10.0
    """Seconds of wall time; the code gets one more second of processor time than that."""
    memory_mb: int = 1024
    """Address space of each process, in MiB."""
    processes: int = 8
    """Processes and threads at a time."""
    disk_mb: int = 64
    """Size of the scratch folder, in MiB (at the level rlimits: of each file)."""
    output_bytes: int = 1 << 16
    """Bytes of stdout and stderr together; more ends the run."""


@dataclass(frozen=True)
class SandboxResult:
    stdout: str
    stderr: str
    exit_code: int
    """As the shell gives it; negative: minus the signal that ended the code."""
    timed_out: bool
    level: str
    output_cut: bool = False
    """The code was stopped because it printed more than `output_bytes`."""


@dataclass(frozen=True)
class Level:
    name: str
    """bubblewrap, namespaces or rlimits"""
    reason: str
    as_nobody: bool
    """The code runs as a user that owns nothing, not as the caller."""


# Runs inside the sandbox: sets the limits, gives up every capability for good, becomes the interpreter that reads the code from stdin.
_BOOTSTRAP = """
import ctypes, os, resource, sys
memory, cpu, processes, disk, user = map(int, sys.argv[1:6])
libc = ctypes.CDLL(None, use_errno=True)
if sys.platform == "linux":
    for capability in range(64):
        libc.prctl(24, capability, 0, 0, 0)  # PR_CAPBSET_DROP; fails harmlessly where there is nothing to drop
    libc.prctl(38, 1, 0, 0, 0)  # PR_SET_NO_NEW_PRIVS
if user:
    os.setgroups([])
    os.setresgid(user, user, user)
    os.setresuid(user, user, user)
for name, value in (("AS", memory), ("CPU", cpu), ("NPROC", processes), ("FSIZE", disk), ("CORE", 0), ("NOFILE", 256)):
    number = getattr(resource, "RLIMIT_" + name)
    hard = resource.getrlimit(number)[1]
    value = value if hard == resource.RLIM_INFINITY else min(value, hard)
    resource.setrlimit(number, (value, value))
os.execv(sys.executable, [sys.executable, "-I", "-"])
"""

# Builds a root file system of its own in a new mount namespace. $1: an empty folder; $2: the scratch folder's bytes; then the folders
# to show read-only, `--`, and the command.
_ENTER = """
set -e
root=$1 size=$2; shift 2
mount --make-rprivate /
mount -t tmpfs -o mode=755,size=1m tmpfs "$root"
while [ "$1" != -- ]; do
  mkdir -p "$root$(dirname "$1")"
  if [ -L "$1" ]; then ln -s "$(readlink "$1")" "$root$1"
  else
    if [ -d "$1" ]; then mkdir -p "$root$1"; else : > "$root$1"; fi
    mount --bind "$1" "$root$1"
    case $1 in /dev/*) ;; *) mount -o remount,bind,ro,nosuid,nodev "$root$1" ;; esac
  fi
  shift
done
shift
mkdir -p "$root/proc" "$root/scratch" "$root/old"
mount -t proc proc "$root/proc"
mount -t tmpfs -o mode=777,size="$size" tmpfs "$root/scratch"
cd "$root"
pivot_root . old
cd /scratch
umount -l /old
mount -o remount,bind,ro /
exec "$@"
"""


def run_python(
    code: str,
    timeout: float = Limits.timeout,
    memory_mb: int = Limits.memory_mb,
    processes: int = Limits.processes,
    disk_mb: int = Limits.disk_mb,
    output_bytes: int = Limits.output_bytes,
    allow_unsandboxed: bool = False,
) -> SandboxResult:
    """Run `code` with this interpreter (so with its packages), nothing on stdin, in an empty working folder that is deleted afterwards.

    The limits are those of `Limits`. When the time is up, or too much was printed, every process of the run is killed.
    Raises UserError if the machine offers only the level rlimits and `allow_unsandboxed` is false.
    """
    here = level()
    if here.name == "rlimits" and not allow_unsandboxed:
        raise UserError(
            f"Refusing to run a model's code without a sandbox. {here.reason} Install bubblewrap (`apt-get install bubblewrap`), or pass "
            "allow_unsandboxed=True if nothing on this machine needs protecting."
        )
    return _run(code, Limits(timeout, memory_mb, processes, disk_mb, output_bytes), here)


@lru_cache(maxsize=1)
def level() -> Level:
    """The strongest level that works here, found by trying each once, and why it is not a stronger one."""
    refusals = []
    choices = (True, False) if os.geteuid() == 0 else (False,)
    for name, program, missing in (
        ("bubblewrap", "bwrap", "bubblewrap is not installed"),
        ("namespaces", "unshare", "unshare is not installed"),
    ):
        if not shutil.which(program):
            refusals.append(missing)
            continue
        for as_nobody in choices:
            problem = _probe(Level(name, "", as_nobody))
            if problem is None:
                return Level(name, "; ".join([*refusals, f"{program} works here"]) + _unlimited(as_nobody) + ".", as_nobody)
        refusals.append(f"{program} does not work here ({problem})")
    as_nobody = choices[0] and _probe(Level("rlimits", "", True)) is None
    return Level("rlimits", "; ".join(refusals) + ": only resource limits are left" + _unlimited(as_nobody) + ".", as_nobody)


def _unlimited(as_nobody: bool) -> str:
    return "; root cannot change user here, so the number of processes is not limited" if os.geteuid() == 0 and not as_nobody else ""


def _probe(candidate: Level) -> str | None:
    """Why `candidate` does not work, or None if it does."""
    try:
        result = _run("print(6 * 7)", Limits(timeout=_PROBE_SECONDS), candidate)
    except OSError as error:
        return str(error)
    if result.stdout.strip() == "42":
        return None
    lines = result.stderr.strip().splitlines()
    return lines[-1] if lines else f"exit code {result.exit_code}"


def _shown() -> list[str]:
    """What the code may read: the system's programs and libraries, this interpreter and its packages."""
    own = {sys.prefix, sys.base_prefix, str(Path(sys.executable).resolve().parent.parent)}
    own |= {path for path in sys.path if "site-packages" in path or "dist-packages" in path}
    inside = tuple(folder + "/" for folder in _SYSTEM_FOLDERS)
    wanted = [*_SYSTEM_FOLDERS, *sorted(path for path in own if path not in ("/", "") and not (path + "/").startswith(inside))]
    kept: list[str] = []
    for path in wanted:
        if os.path.exists(path) and not any(path.startswith(other + "/") for other in kept):
            kept.append(path)
    return kept


def _command(here: Level, limits: Limits, root: str, user: int) -> list[str]:
    cpu = math.ceil(limits.timeout) + 1
    mib = 1 << 20
    numbers = (limits.memory_mb * mib, cpu, limits.processes, limits.disk_mb * mib, user)
    python = [sys.executable, "-I", "-c", _BOOTSTRAP, *map(str, numbers)]
    if here.name == "bubblewrap":
        shown = []
        for path in _shown():  # its parents first: bwrap makes them for their owner alone
            shown += [part for parent in reversed(list(Path(path).parents)[:-1]) for part in ("--perms", "755", "--dir", str(parent))]
            shown += ["--ro-bind", path, path]
        spaces = ("--unshare-ipc", "--unshare-pid", "--unshare-net", "--unshare-uts", *(() if user else ("--unshare-user",)))
        powers = ("--cap-add", "CAP_SETUID", "--cap-add", "CAP_SETGID") if user else ("--cap-drop", "ALL")
        scratch = ("--perms", "1777", "--size", str(limits.disk_mb * mib), "--tmpfs", "/scratch", "--chdir", "/scratch")
        mounts = (*shown, "--proc", "/proc", "--dev", "/dev", *scratch, "--remount-ro", "/")
        return ["bwrap", *spaces, "--die-with-parent", "--new-session", *powers, *mounts, "--", *python]
    if here.name == "namespaces":
        spaces = (*(() if user else ("--user", "--map-root-user")), "--mount", "--pid", "--net", "--ipc", "--uts", "--fork", "--kill-child")
        shown = [*_shown(), *_DEVICES]
        return ["unshare", *spaces, "/bin/sh", "-c", _ENTER, "sandbox", root, str(limits.disk_mb * mib), *shown, "--", *python]
    return python


def _run(code: str, limits: Limits, here: Level) -> SandboxResult:
    with tempfile.TemporaryDirectory(prefix="sandbox-") as folder, tempfile.TemporaryFile() as program:
        user = random.choice(_USERS) if here.as_nobody else 0
        if user:
            os.chown(folder, user, user)
        program.write(code.encode("utf-8", "surrogatepass"))
        program.seek(0)
        strong = here.name != "rlimits"
        process = subprocess.Popen(
            _command(here, limits, folder, user),
            stdin=program,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            cwd="/" if strong else folder,
            env=_environment("/scratch" if strong else folder),
            start_new_session=True,
        )
        try:
            output, timed_out, cut = _collect(process, limits)
        finally:
            _kill(process)
        return SandboxResult(*output, process.returncode, timed_out, here.name, cut)


def _environment(home: str) -> dict[str, str]:
    one = dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"), "1")
    return {"PATH": "/usr/local/bin:/usr/bin:/bin:/usr/sbin:/sbin", "HOME": home, "TMPDIR": home, "LANG": "C.UTF-8", **one}


def _collect(process: subprocess.Popen[bytes], limits: Limits) -> tuple[tuple[str, str], bool, bool]:
    """stdout and stderr until both end, the time is up or they are too long: (texts, timed out, cut)."""
    assert process.stdout is not None and process.stderr is not None
    deadline = time.monotonic() + limits.timeout
    parts: dict[int, bytearray] = {process.stdout.fileno(): bytearray(), process.stderr.fileno(): bytearray()}
    order = list(parts)
    timed_out = cut = False
    with selectors.DefaultSelector() as selector:
        for stream in order:
            selector.register(stream, selectors.EVENT_READ)
        while selector.get_map() and not cut:
            left = deadline - time.monotonic()
            if left <= 0:
                timed_out = True
                break
            for key, _ in selector.select(left):
                chunk = os.read(key.fd, 1 << 16)
                if not chunk:
                    selector.unregister(key.fd)
                parts[key.fd] += chunk
                cut = sum(map(len, parts.values())) > limits.output_bytes
    if not timed_out and not cut:
        try:
            process.wait(max(0.0, deadline - time.monotonic()))
        except subprocess.TimeoutExpired:
            timed_out = True
    stdout, stderr = (bytes(parts[stream][: limits.output_bytes]).decode("utf-8", "replace") for stream in order)
    return (stdout, stderr), timed_out, cut


def _kill(process: subprocess.Popen[bytes]) -> None:
    """End the whole group. In the strong levels that ends the process namespace, and so whatever had left the group."""
    try:
        os.killpg(process.pid, signal.SIGKILL)
    except ProcessLookupError:
        pass  # all of it has ended
    process.wait()
    for stream in (process.stdout, process.stderr):
        if stream:
            stream.close()
