"""The command line, run as a user runs it."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]


def finetune(*arguments: str, cwd: Path | None = None, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run `python -m finetune` from `cwd`."""
    return subprocess.run(
        [sys.executable, "-m", "finetune", *arguments], capture_output=True, text=True, cwd=cwd or ROOT,
        env=os.environ | {"PYTHONPATH": str(ROOT)} | environment, timeout=300,
    )


def assert_one_message(done: subprocess.CompletedProcess[str], *parts: str) -> None:
    """Exit code 2, one message with `parts`, no traceback."""
    assert done.returncode == 2, done.stderr
    assert "Traceback" not in done.stderr
    errors = [line for line in done.stderr.splitlines() if line.startswith("Error")]
    assert len(errors) == 1, done.stderr
    for part in parts:
        assert part in done.stderr, done.stderr


def test_without_a_recipe_it_lists_them_and_exits_2():
    done = finetune()
    assert done.returncode == 2
    for path in (ROOT / "recipes" / "recipe").glob("*.yaml"):
        line = next(line for line in done.stdout.splitlines() if line.split()[:1] == [path.stem])
        assert len(line.split()) > 3, f"recipe {path.stem} has no description"


def test_help_imports_neither_torch_nor_transformers():
    code = (
        "import sys; sys.argv = ['finetune', '--help']\n"
        "from finetune.cli import main; main()\n"
        "assert not {'torch', 'transformers', 'trl', 'peft'} & set(sys.modules), 'heavy import'"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, timeout=60)
    assert done.returncode == 0, done.stderr
    assert "recipe=NAME" in done.stdout and "sft.learning_rate" in done.stdout


def test_config_imports_no_torch():
    code = "import sys, finetune.config, data_formats; assert 'torch' not in sys.modules"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, timeout=60).returncode == 0


@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        (["recipe=quickstrat"], ["recipe=quickstrat", "quickstart", "Did you mean"]),
        (["recipe=sft", "model=smolm2"], ["model=smolm2", "smollm2"]),
        (["recipe=sft", "sft.learning_rat=1"], ["sft.learning_rat", "sft.learning_rate"]),
        (["recipe=sft", "sft.max_steps=many"], ["sft.max_steps", "many"]),
        (["recipe=sft", "sft.max_steps=0"], ["sft.max_steps=0", "above 0"]),
        (["recipe=sft", "model.quantization=int8"], ["model.quantization=int8", "nf4", "none"]),
        (["recipe=sft", "stages=[stf]"], ["stages=stf", "sft"]),
        (["recipe=sft", "model.path=/no/such/model"], ["model.path=/no/such/model", "no such folder"]),
        (["recipe=sft", "sft.batch_size=10", "sft.micro_batch_size=4"], ["sft.batch_size=10", "multiple"]),
        (["recipe=grpo", "grpo.batch_size=12", "grpo.micro_batch_size=4"], ["grpo.batch_size=12", "grpo.group_size=8"]),
        (["recipe=sft", "model.attention=flash_attention_2"], ["flash_attention_2", "sdpa", "eager"]),
        (["recipe=sft", "data.path=/no/such/file.jsonl", "data.format=auto"], ["/no/such/file.jsonl"]),
        (["resume=/no/such/run"], ["resume=/no/such/run", "config.yaml"]),
        (["recipe=sft", "recipe"], ["recipe"]),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else None,
)
def test_a_mistake_gets_one_message_and_exit_code_2(arguments, parts, tmp_path):
    run_dir = [] if arguments[0].startswith("resume") else [f"run_dir={tmp_path / 'run'}"]
    assert_one_message(finetune(*arguments, *run_dir), *parts)


def test_debug_shows_the_traceback(tmp_path):
    done = finetune("recipe=sft", "model.path=/no/such/model", "debug=true", f"run_dir={tmp_path / 'run'}")
    assert done.returncode == 2 and "Traceback" in done.stderr


def test_a_user_s_own_recipe_from_config_dir(tmp_path):
    (tmp_path / "recipe").mkdir()
    (tmp_path / "recipe" / "mine.yaml").write_text("# @package _global_\n# My own.\nstages: [sft]\nseed: 7\n")
    listed = finetune("--config-dir", str(tmp_path))
    assert "mine" in listed.stdout and "My own." in listed.stdout
    shown = finetune("--config-dir", str(tmp_path), "recipe=mine", "--cfg", "job")
    assert shown.returncode == 0 and "seed: 7" in shown.stdout


def test_run_dir_that_holds_a_run_is_left_alone(tmp_path):
    (tmp_path / "config.yaml").write_text("recipe: sft\n")
    assert_one_message(finetune("recipe=sft", f"run_dir={tmp_path}"), "holds a run already", f"resume={tmp_path}")
    assert (tmp_path / "config.yaml").read_text() == "recipe: sft\n"


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_unwritable_run_directory(tmp_path):
    tmp_path.chmod(0o500)
    assert_one_message(finetune("recipe=sft", f"run_dir={tmp_path / 'run'}"), "cannot be written")


def test_run_dir_below_a_file_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("")
    assert_one_message(finetune("recipe=sft", f"run_dir={tmp_path / 'file' / 'run'}"), "cannot be written")


def test_a_resume_where_no_run_is_starts_one_and_says_so(tmp_path):
    done = finetune("recipe=sft", f"resume={tmp_path / 'run'}", "model.path=/no/such/model")
    assert_one_message(done, "holds no run yet", "model.path=/no/such/model")
    assert (tmp_path / "run" / "config.yaml").is_file()


def test_resume_of_another_recipe_s_run_and_with_another_setting(tiny_run):
    before = {path: path.read_bytes() for path in tiny_run.rglob("*") if path.is_file() and path.name != ".lock"}
    assert_one_message(finetune("recipe=grpo", f"resume={tiny_run}"), "is a run of recipe 'sft'", "recipe=sft")
    assert_one_message(finetune(f"resume={tiny_run}", "sft.max_steps=9"), "sft.max_steps=9", "was started with sft.max_steps=2")
    assert before == {path: path.read_bytes() for path in tiny_run.rglob("*") if path.is_file() and path.name != ".lock"}


def test_a_finished_stage_is_skipped_and_a_damaged_one_is_named(tiny_run, tmp_path):
    manifest = json.loads((tiny_run / "manifest.json").read_text())
    done = finetune(f"resume={tiny_run}")
    assert done.returncode == 0, done.stderr
    assert json.loads((tiny_run / "manifest.json").read_text()) == manifest
    weights = tiny_run / "sft" / "adapter" / "adapter_model.safetensors"
    content = weights.read_bytes()
    weights.write_bytes(content[:-4] + b"oops")
    try:
        assert_one_message(finetune(f"resume={tiny_run}"), "sft/adapter", "changed since stage 'sft' wrote it")
    finally:
        weights.write_bytes(content)


def test_a_corrupted_adapter_given_by_the_user(tiny_run, tmp_path, tiny_model):
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    (adapter / "adapter_config.json").write_bytes((tiny_run / "sft" / "adapter" / "adapter_config.json").read_bytes())
    (adapter / "adapter_model.safetensors").write_bytes(b"\x08\x00\x00\x00\x00\x00\x00\x00garbage")
    done = finetune("recipe=evaluate", f"model.path={tiny_model}", f"model.adapter={adapter}", f"run_dir={tmp_path / 'run'}")
    assert_one_message(done, str(adapter), "damaged")


def small_disk(folder: Path, megabytes: int) -> Path:
    """A file system of this size, mounted at a new folder; unmounted by the caller."""
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", f"size={megabytes}m", "tmpfs", str(folder)]
    if subprocess.run(command, capture_output=True).returncode != 0:
        pytest.skip("a small file system cannot be mounted here (needs root)")
    return folder


def tiny_sft(run_dir: Path, model: Path) -> list[str]:
    return [
        "recipe=sft", f"run_dir={run_dir}", f"model.path={model}", "lora.r=4", "sft.max_steps=2", "sft.save_steps=1", "sft.batch_size=4",
        "sft.micro_batch_size=4", "hardware.threads=1", "data.held_out=20", "data.options.size=100",
    ]


def test_a_disk_that_is_too_small_is_refused_before_training(tmp_path, tiny_model):
    disk = small_disk(tmp_path / "disk", 1)
    try:
        done = finetune(*tiny_sft(disk / "run", tiny_model), "lora.r=64")
        assert_one_message(done, "does not fit", "disk")
        assert not (disk / "run" / "sft").exists()
    finally:
        subprocess.run(["umount", "--lazy", str(disk)], check=True)


def test_a_disk_that_fills_midway_is_one_message_and_a_resume_goes_on(tmp_path, tiny_model):
    disk = small_disk(tmp_path / "disk", 64)
    try:
        arguments = tiny_sft(disk / "run", tiny_model)
        process = subprocess.Popen(
            [sys.executable, "-m", "finetune", *arguments], stderr=subprocess.PIPE, text=True, cwd=ROOT,
            env=os.environ | {"PYTHONPATH": str(ROOT)},
        )
        manifest = disk / "run" / "manifest.json"
        deadline = time.monotonic() + 240
        while not (manifest.exists() and '"sft"' in manifest.read_text()):
            assert process.poll() is None and time.monotonic() < deadline, process.stderr.read()
            time.sleep(0.02)
        with open(disk / "filler", "wb", buffering=0) as filler:
            try:
                while filler.write(bytes(4096)):
                    pass
            except OSError:
                pass
        _, errors = process.communicate(timeout=240)
        assert process.returncode == 2, errors
        assert errors.count("Error: ") == 1 and "disk" in errors and "full" in errors and "Traceback" not in errors, errors
        assert not (disk / "run" / "sft" / "adapter").exists()
        (disk / "filler").unlink()
        done = finetune(f"resume={disk / 'run'}")
        assert done.returncode == 0, done.stderr
        assert (disk / "run" / "sft" / "adapter" / "adapter_model.safetensors").is_file()
    finally:
        subprocess.run(["umount", "--lazy", str(disk)], check=True)


@pytest.fixture(scope="module")
def tiny_run(tmp_path_factory, tiny_model) -> Path:
    """A finished SFT run of two steps on the tiny model."""
    run_dir = tmp_path_factory.mktemp("runs") / "tiny"
    done = finetune(*tiny_sft(run_dir, tiny_model))
    assert done.returncode == 0, done.stderr
    return run_dir
