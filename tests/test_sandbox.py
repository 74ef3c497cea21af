"""The sandbox, attacked at each level that this machine offers."""

import os
import socket
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from finetune import sandbox
from finetune.errors import UserError
from finetune.sandbox import Level, Limits, SandboxResult, run_python

STRONG = ("bubblewrap", "namespaces")


def _usable(name: str) -> Level | None:
    for as_nobody in (True, False) if os.geteuid() == 0 else (False,):
        candidate = Level(name, "", as_nobody)
        if sandbox._probe(candidate) is None:
            return candidate
    return None


LEVELS = {name: _usable(name) for name in (*STRONG, "rlimits")}


@pytest.fixture(params=[*STRONG, "rlimits"])
def any_level(request: pytest.FixtureRequest) -> Level:
    found = LEVELS[request.param]
    if found is None:
        pytest.skip(f"this machine does not offer the level {request.param}")
    return found


@pytest.fixture(params=STRONG)
def strong(request: pytest.FixtureRequest) -> Level:
    found = LEVELS[request.param]
    if found is None:
        pytest.skip(f"this machine does not offer the level {request.param}")
    return found


@pytest.fixture
def counted(strong: Level) -> Level:
    if os.geteuid() == 0 and not strong.as_nobody:
        pytest.skip("root cannot change user here, so the kernel does not count its processes")
    return strong


def run(code: str, level: Level, **limits: float) -> SandboxResult:
    return sandbox._run(code, Limits(**{"timeout": 20, **limits}), level)  # type: ignore[arg-type]


def test_output_and_exit_code(any_level: Level) -> None:
    result = run("import sys; print('out'); print('err', file=sys.stderr); sys.exit(3)", any_level)
    assert (result.stdout, result.stderr, result.exit_code, result.timed_out) == ("out\n", "err\n", 3, False)
    assert result.level == any_level.name


def test_traceback_names_the_line(any_level: Level) -> None:
    result = run("x = 1\n1 / 0\n", any_level)
    assert result.exit_code == 1 and "line 2" in result.stderr and "ZeroDivisionError" in result.stderr


def test_packages_and_long_programs(any_level: Level) -> None:
    padding = "# " + "x" * 300_000 + "\n"
    result = run(padding + "import sympy; print(sympy.factor(sympy.Symbol('x')**2 - 1))", any_level)
    assert result.stdout == "(x - 1)*(x + 1)\n"


def test_scratch_folder_can_be_written_and_is_gone_afterwards(any_level: Level) -> None:
    result = run("import os; open('f', 'w').write('x'); print(os.getcwd(), os.listdir('.'))", any_level)
    folder, _, names = result.stdout.strip().partition(" ")
    assert names == "['f']"
    assert not Path(folder).exists()


def test_endless_loop_is_stopped(any_level: Level) -> None:
    start = time.monotonic()
    result = run("while True: pass", any_level, timeout=1.5)
    assert result.timed_out and result.exit_code != 0
    assert time.monotonic() - start < 10


def test_sleep_with_closed_output_is_stopped(any_level: Level) -> None:
    result = run("import os, time; os.close(1); os.close(2); time.sleep(60)", any_level, timeout=1.5)
    assert result.timed_out


def test_endless_output_is_cut(any_level: Level) -> None:
    result = run("while True: print('x' * 1000)", any_level, output_bytes=10_000)
    assert result.output_cut and not result.timed_out
    assert len(result.stdout) <= 10_000


def test_memory_is_bounded(any_level: Level) -> None:
    result = run("x = bytearray(900 * 2**20); print('got it')", any_level, memory_mb=512)
    assert result.exit_code != 0 and "MemoryError" in result.stderr and "got it" not in result.stdout


def test_file_size_is_bounded(any_level: Level) -> None:
    result = run("f = open('big', 'wb')\nfor _ in range(40): f.write(b'x' * 2**20)\nf.close()\nprint('written')", any_level, disk_mb=8)
    assert "written" not in result.stdout and result.exit_code != 0


def test_disk_is_bounded_over_many_files(strong: Level) -> None:
    code = "for i in range(40):\n    with open(str(i), 'wb') as f: f.write(b'x' * 2**20)\nprint('written')"
    result = run(code, strong, disk_mb=8)
    assert "written" not in result.stdout and "No space left" in result.stderr


def test_no_network(strong: Level) -> None:
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        server.listen()
        port = server.getsockname()[1]
        code = f"import socket\ntry:\n    socket.create_connection(('127.0.0.1', {port}), 3); print('connected')\nexcept OSError as e: print('refused')"
        assert run(code, strong).stdout == "refused\n"
        assert "connected" in sandbox._run(code, Limits(), LEVELS["rlimits"] or strong).stdout  # the server is there to be reached


def test_no_other_interface(strong: Level) -> None:
    assert run("import socket; print([name for _, name in socket.if_nameindex()])", strong).stdout in ("['lo']\n", "[]\n")


@pytest.fixture
def secret() -> Iterator[Path]:
    path = Path(f"/var/tmp/sandbox-secret-{os.getpid()}")
    path.write_text("the secret")
    path.chmod(0o644)
    yield path
    path.unlink()


def test_no_secret_outside(strong: Level, secret: Path) -> None:
    result = run(f"print(open({str(secret)!r}).read())", strong)
    assert "the secret" not in result.stdout and "FileNotFoundError" in result.stderr


def test_no_secret_through_a_symlink_or_proc(strong: Level, secret: Path) -> None:
    code = f"""
import os
os.symlink({str(secret)!r}, "link")
for path in ("link", "/proc/1/root{secret}", "/proc/self/root{secret}", "/proc/self/cwd/../..{secret}", "/old{secret}"):
    try:
        print(open(path).read())
    except OSError as error:
        print(type(error).__name__)
"""
    result = run(code, strong)
    assert result.exit_code == 0 and "the secret" not in result.stdout
    assert len(result.stdout.split()) == 5


def test_home_and_environment_are_not_there(strong: Level, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    code = "import os; print('HF_TOKEN' in os.environ, [os.path.exists(p) for p in ('/home', '/etc/passwd', '/var', '/srv')])"
    assert run(code, strong).stdout == "False [False, False, False, False]\n"


def test_nothing_outside_scratch_can_be_written(strong: Level) -> None:
    code = """
import os, sys
places = ["/", "/usr", "/tmp", "/dev", sys.prefix, os.path.dirname(os.__file__), "/proc/sys/kernel"]
for place in places:
    try:
        open(place + "/sandbox-was-here", "w").write("x"); print("wrote", place)
    except OSError: pass
"""
    result = run(code, strong)
    written = [line for line in result.stdout.splitlines() if line not in ("wrote /dev",)]  # /dev is the sandbox's own tmpfs
    assert written == [] and not os.path.exists("/dev/sandbox-was-here")


def test_mounts_cannot_be_made_writable(strong: Level) -> None:
    code = "import ctypes; libc = ctypes.CDLL(None, use_errno=True); print(libc.mount(b'none', b'/usr', None, 32 | 4096, None), ctypes.get_errno())"
    assert run(code, strong).stdout == "-1 1\n"  # EPERM


def test_fork_bomb_is_contained(counted: Level) -> None:
    code = """
import os, time
made = 0
try:
    for _ in range(200):
        if os.fork() == 0:
            time.sleep(30); os._exit(0)
        made += 1
except OSError as error:
    print(made, type(error).__name__, flush=True)
os._exit(0)
"""
    result = run(code, counted, processes=8)
    made, error = result.stdout.split()
    assert int(made) < 8 and error == "BlockingIOError"


def test_processes_end_with_the_run(strong: Level) -> None:
    marker = f"sandbox-marker-{os.getpid()}-{strong.name}"
    code = f"""
import os, time
if os.fork() == 0:
    os.setsid()
    if os.fork() == 0:
        import ctypes
        os.execv("/bin/sh", ["/bin/sh", "-c", "sleep 300; : {marker}"])
    os._exit(0)
time.sleep(60)
"""
    assert run(code, strong, timeout=2).timed_out
    deadline = time.monotonic() + 5
    while _running(marker) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not _running(marker)


def _running(marker: str) -> bool:
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            command = path.read_bytes()
        except OSError:
            continue  # it has ended
        if marker.encode() in command and b"-c\0sleep" in command:
            return True
    return False


def test_parent_cannot_be_signalled(strong: Level) -> None:
    code = f"""
import os, signal
for pid in ({os.getpid()}, {os.getppid()}):
    try:
        os.kill(pid, signal.SIGTERM); print("signalled")
    except OSError as error: print(type(error).__name__)
os.kill(-1, signal.SIGTERM) if os.getpid() != 1 else None
"""
    assert "signalled" not in run(code, strong).stdout


def test_weak_level_is_refused_unless_allowed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sandbox, "level", lambda: LEVELS["rlimits"])
    with pytest.raises(UserError, match="bubblewrap"):
        run_python("print(1)")
    assert run_python("print(1)", allow_unsandboxed=True).stdout == "1\n"


def test_without_programs_only_limits_are_left(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sandbox.shutil, "which", lambda program: None)
    sandbox.level.cache_clear()
    found = sandbox.level()
    sandbox.level.cache_clear()
    assert found.name == "rlimits" and "bubblewrap is not installed" in found.reason and "unshare is not installed" in found.reason


def test_strongest_level_is_chosen() -> None:
    expected = next(name for name, found in LEVELS.items() if found)
    assert sandbox.level().name == expected
    assert run_python("print(6 * 7)", allow_unsandboxed=True).level == expected
