"""The run directory: atomic outputs, the hash chain, metrics that survive a crash."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from finetune.errors import UserError
from finetune.run import Result, Run, peak_memory, sha256, write_atomic


def test_an_output_appears_whole_or_not_at_all(tmp_path):
    run = Run.create(tmp_path / "run", "recipe: x\n")
    with pytest.raises(RuntimeError), run.output("sft/adapter") as folder:
        (folder / "half").write_text("half")
        raise RuntimeError("killed here")
    assert not (run.dir / "sft" / "adapter").exists()
    with run.output("sft/adapter") as folder:
        (folder / "whole").write_text("whole")
    assert [path.name for path in (run.dir / "sft" / "adapter").iterdir()] == ["whole"]


def test_the_manifest_holds_a_chain_of_hashes_and_notices_a_change(tmp_path):
    run = Run.create(tmp_path / "run", "recipe: x\n")
    base = tmp_path / "base.bin"
    base.write_bytes(b"base")
    run.start("sft")
    assert not run.is_done("sft")
    with run.output("sft/adapter") as folder:
        (folder / "weights").write_bytes(b"weights")
    run.finish("sft", 1.5, Result({"base": base}, ["sft/adapter"]))
    record = json.loads((run.dir / "manifest.json").read_text())["stages"]["sft"]
    assert record["state"] == "done" and record["seconds"] == 1.5 and record["peak_memory_bytes"] > 0
    assert record["inputs"]["base"]["sha256"] == sha256(base)
    assert record["versions"]["torch"].startswith("2.13.0")
    assert run.is_done("sft")
    (run.dir / "sft" / "adapter" / "weights").write_bytes(b"other")
    with pytest.raises(UserError, match="changed since stage 'sft' wrote it"):
        run.is_done("sft")


def test_hash_of_a_folder_depends_on_names_and_content_not_on_hidden_files(tmp_path):
    (tmp_path / "a").write_text("1")
    first = sha256(tmp_path)
    (tmp_path / ".lock").write_text("")
    assert sha256(tmp_path) == first
    (tmp_path / "a").rename(tmp_path / "b")
    assert sha256(tmp_path) != first


def test_two_processes_cannot_work_in_one_run(tmp_path):
    run = Run.create(tmp_path / "run", "recipe: x\n")
    code = f"from pathlib import Path; from finetune.run import Run; Run.open(Path({str(run.dir)!r}))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=Path(__file__).parents[1])
    assert "another process is working" in done.stderr


def test_metrics_are_rewound_to_the_checkpoint_and_a_torn_row_is_dropped(tmp_path):
    run = Run.create(tmp_path / "run", "recipe: x\n")
    for step in (1, 2, 3):
        run.log_metrics({"stage": "sft", "step": step, "loss": 1.0})
    with open(run.metrics_path, "a") as file:
        file.write('{"stage": "sft", "st')
    assert [row["step"] for row in run.rewind_metrics("sft", 2)] == [1, 2]
    assert [row["step"] for row in run.metrics()] == [1, 2]


def test_opening_clears_what_a_kill_left_under_temporary_names(tmp_path):
    run = Run.create(tmp_path / "run", "recipe: x\n")
    run.path("sft/.adapter.tmp").mkdir()
    run._lock.close()
    Run.open(run.dir)
    assert not (run.dir / "sft" / ".adapter.tmp").exists()


def test_a_write_to_a_full_disk_leaves_the_old_file(tmp_path):
    path = tmp_path / "manifest.json"
    write_atomic(path, "old")
    code = (
        "import resource, sys; from pathlib import Path; from finetune.run import write_atomic\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (10, 10))\n"
        "import signal; signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        f"write_atomic(Path({str(path)!r}), 'new' * 1000)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=Path(__file__).parents[1])
    assert done.returncode != 0 and path.read_text() == "old"


def test_peak_memory_is_in_bytes():
    assert 10_000_000 < peak_memory() < 100_000_000_000
