"""The run directory: paths, manifest, hash chain, atomic writes.

Everything under a final name is whole: a stage writes into a hidden temporary folder that is renamed when it is complete, and
`manifest.json` is replaced, never edited. A process killed at any moment therefore leaves either the old state or the new one.
"""

import fcntl
import hashlib
import importlib.metadata
import json
import os
import resource
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any, NamedTuple

from finetune.errors import UserError

PACKAGES = ("torch", "transformers", "trl", "peft", "bitsandbytes", "datasets", "accelerate", "hydra-core")
"""Libraries whose versions the manifest records."""


def write_atomic(path: Path, text: str) -> None:
    """Write `text` to `path` so that a reader, even after a crash, finds the old content or the new, never a part."""
    temporary = path.with_name(f".{path.name}.tmp")
    with open(temporary, "w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)


def sha256(path: Path) -> str:
    """SHA-256 of a file, or of a folder: the hash over its files' relative names and hashes, in sorted order.

    Hidden files and folders (download caches, temporary files) do not count.
    """
    if path.is_file():
        with open(path, "rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    if not path.is_dir():
        raise UserError(f"{path}: not found, expected a file or a folder.")
    total = hashlib.sha256()
    for file_path in sorted(path.rglob("*")):
        relative = file_path.relative_to(path)
        if file_path.is_file() and not any(part.startswith(".") for part in relative.parts):
            total.update(f"{relative.as_posix()}\0{sha256(file_path)}\n".encode())
    return total.hexdigest()


def peak_memory() -> int:
    """Largest resident memory of this process since `reset_peak_memory`, bytes (since its start where Linux' /proc is absent)."""
    status = Path("/proc/self/status")
    if status.exists():
        for line in status.read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def reset_peak_memory() -> None:
    """Start a new peak (`echo 5 > /proc/self/clear_refs`, see proc(5)); without permission the peak stays that of the process."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        pass


def versions() -> dict[str, str]:
    """Installed version of each of PACKAGES; 'absent' for one that is not installed."""
    found = {}
    for name in PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = "absent"
    return found


class Result(NamedTuple):
    """What a stage hands to the manifest."""

    inputs: dict[str, Path]
    """What it read: name -> file or folder."""
    outputs: list[str]
    """What it wrote: files and folders, relative to the run directory."""
    peak_gpu_memory: int = 0
    """Largest memory allocated on the GPU, bytes."""


class Run:
    """One run directory, held by one process at a time.

    `Run.create` makes it, `Run.open` goes on with it; both raise UserError when the folder is not fit for that.
    """

    def __init__(self, directory: Path) -> None:
        self.dir = directory
        self._lock = self._acquire_lock()
        self.manifest: dict[str, Any] = {"stages": {}}
        if self.manifest_path.exists():
            self.manifest = json.loads(self.manifest_path.read_text(encoding="utf-8"))

    @classmethod
    def create(cls, directory: Path, config_yaml: str) -> "Run":
        """Make a new run directory and write its `config.yaml`."""
        if (directory / "config.yaml").exists():
            raise UserError(
                f"run_dir={directory}: holds a run already. Go on with it by resume={directory}, or name another folder."
            )
        if directory.exists() and not directory.is_dir():
            raise UserError(f"run_dir={directory}: is a file, expected a folder or a new name.")
        try:
            directory.mkdir(parents=True, exist_ok=True)
            run = cls(directory)
            write_atomic(directory / "config.yaml", config_yaml)
        except OSError as error:
            raise UserError(
                f"run_dir={directory}: cannot be written ({error.strerror}). Name a folder that you may write, with run_dir=DIR."
            ) from error
        return run

    @classmethod
    def open(cls, directory: Path) -> "Run":
        """Open an existing run directory and clear what a killed process left under temporary names."""
        if not (directory / "config.yaml").exists():
            raise UserError(f"resume={directory}: not a run directory, it has no config.yaml. Expected the folder of an earlier run.")
        if not os.access(directory, os.W_OK):
            raise UserError(f"resume={directory}: cannot be written. Make the folder writable, or copy it.")
        run = cls(directory)
        for leftover in directory.rglob(".*.tmp"):
            if leftover.is_dir():
                shutil.rmtree(leftover)
            else:
                leftover.unlink()
        return run

    def _acquire_lock(self) -> IO[str]:
        lock = open(self.dir / ".lock", "w")
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(f"{self.dir}: another process is working in this run directory. Wait for it or stop it.") from None
        return lock

    @property
    def manifest_path(self) -> Path:
        return self.dir / "manifest.json"

    def _write_manifest(self) -> None:
        write_atomic(self.manifest_path, json.dumps(self.manifest, indent=1))

    def path(self, relative: str) -> Path:
        """A path inside the run directory; its parent folder exists afterwards."""
        path = self.dir / relative
        path.parent.mkdir(parents=True, exist_ok=True)
        return path

    @contextmanager
    def output(self, relative: str) -> Iterator[Path]:
        """A temporary folder that becomes `relative` when the block ends without an error."""
        final = self.path(relative)
        temporary = final.with_name(f".{final.name}.tmp")
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir()
        yield temporary
        if final.exists():
            shutil.rmtree(final)
        os.replace(temporary, final)

    def disk_is_full(self) -> bool:
        """Whether less than a megabyte is left where the run is written."""
        return shutil.disk_usage(self.dir).free < 1_000_000

    def discard(self, relative: str) -> None:
        """Remove an output that an interrupted attempt finished but the manifest does not know."""
        shutil.rmtree(self.dir / relative, ignore_errors=True)

    # -- stages and the hash chain ------------------------------------------------------------------------------

    def is_done(self, stage: str) -> bool:
        """Whether the stage ended well. Raises UserError where one of its outputs has changed since."""
        record = self.manifest["stages"].get(stage)
        if record is None or record["state"] != "done":
            return False
        for relative, digest in record["outputs"].items():
            found = sha256(self.dir / relative)
            if found != digest:
                raise UserError(
                    f"{self.dir / relative}: changed since stage '{stage}' wrote it (SHA-256 {found[:12]}..., the manifest has "
                    f"{digest[:12]}...). Restore it, or delete the '{stage}' entry from manifest.json to run the stage again."
                )
        return True

    def start(self, stage: str) -> None:
        """Record that the stage runs, and how often it was tried."""
        reset_peak_memory()
        before = self.manifest["stages"].get(stage, {})
        self.manifest["stages"][stage] = {
            "state": "running",
            "started": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
            "attempts": before.get("attempts", 0) + 1,
        }
        self._write_manifest()

    def finish(self, stage: str, seconds: float, result: Result) -> None:
        """Record the stage as done, with the SHA-256 of what it read and wrote."""
        record = self.manifest["stages"][stage]
        record |= {
            "state": "done",
            "seconds": round(seconds, 2),
            "peak_memory_bytes": peak_memory(),
            "peak_gpu_memory_bytes": result.peak_gpu_memory,
            "versions": versions(),
            "inputs": {name: {"path": str(path), "sha256": sha256(path)} for name, path in result.inputs.items()},
            "outputs": {relative: sha256(self.dir / relative) for relative in result.outputs},
        }
        self._write_manifest()

    def last_adapter(self) -> Path | None:
        """The adapter that the run trained last: grpo's, else sft's, else None."""
        for relative in ("grpo/adapter", "sft/adapter"):
            if (self.dir / relative).is_dir():
                return self.dir / relative
        return None

    # -- metrics ------------------------------------------------------------------------------------------------

    @property
    def metrics_path(self) -> Path:
        return self.dir / "metrics.jsonl"

    def metrics(self, stage: str | None = None) -> list[dict[str, Any]]:
        """Rows of metrics.jsonl, of one stage or of all; a row cut off by a crash is left out."""
        if not self.metrics_path.exists():
            return []
        rows = []
        for line in self.metrics_path.read_text(encoding="utf-8").splitlines():
            try:
                rows.append(json.loads(line))
            except json.JSONDecodeError:
                continue
        return [row for row in rows if stage in (None, row["stage"])]

    def log_metrics(self, row: dict[str, Any]) -> None:
        """Append a row to metrics.jsonl."""
        with open(self.metrics_path, "a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")

    def rewind_metrics(self, stage: str, step: int) -> list[dict[str, Any]]:
        """Drop the stage's rows after `step`, which a resumed run will write again; return those that stay."""
        rows = [row for row in self.metrics() if row["stage"] != stage or row["step"] <= step]
        write_atomic(self.metrics_path, "".join(json.dumps(row) + "\n" for row in rows))
        return [row for row in rows if row["stage"] == stage]
