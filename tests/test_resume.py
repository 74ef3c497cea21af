"""A run killed at any moment ends, when resumed, where the undisturbed run ended."""

import json
import multiprocessing
import os
import random
import sys
import time
from pathlib import Path

import pytest

from finetune.run import sha256

STAGES = ("sft", "grpo", "merge", "evaluate", "report")
KILLS = int(os.environ.get("KILLS", 24))


def run_cli(arguments: list[str], log: str) -> None:
    """Body of the child process: `python -m finetune` with these arguments, output to a file."""
    output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(output, 1)
    os.dup2(output, 2)
    sys.argv = ["finetune", *arguments]
    from finetune.cli import main

    main()


@pytest.fixture(scope="module")
def start():
    """Start the command line in a fresh process; the heavy libraries are imported once, in the server it is forked from."""
    os.environ["OMP_NUM_THREADS"] = "1"
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["torch", "transformers", "trl", "peft", "bitsandbytes", "datasets", "matplotlib.pyplot"])

    def begin(arguments: list[str], log: Path) -> multiprocessing.process.BaseProcess:
        process = context.Process(target=run_cli, args=(arguments, str(log)))
        process.start()
        return process

    return begin


def pipeline_arguments(model: Path) -> list[str]:
    """A whole run on the tiny model, some seconds long, with a checkpoint after each step."""
    return [
        "recipe=quickstart", f"model.path={model}", f"stages=[{','.join(STAGES)}]", "hardware.threads=1",
        "data.options.size=120", "data.held_out=16",
        "lora.r=4", "sft.max_steps=6", "sft.batch_size=8", "sft.micro_batch_size=4", "sft.save_steps=1",
        "grpo.max_steps=4", "grpo.group_size=4", "grpo.batch_size=8", "grpo.micro_batch_size=4", "grpo.save_steps=1",
        "grpo.max_completion_length=8", "grpo.preset=paper", "grpo.rewards={correct: 1.0, tests.rewards_for_tests.digits: 1.0}",
        "evaluate.max_new_tokens=8", "evaluate.batch_size=16",
    ]


def fingerprint(run_dir: Path) -> dict[str, object]:
    """What must be the same: adapters, merged weights, verdicts, and the losses by step."""
    rows = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    return {
        "sft": sha256(run_dir / "sft" / "adapter"),
        "grpo": sha256(run_dir / "grpo" / "adapter"),
        "merged": sha256(run_dir / "merged" / "model.safetensors"),
        "evaluated": json.loads((run_dir / "evaluate" / "results.json").read_text())["rows"],
        "losses": [(row["stage"], row["step"], row["loss"], row["tokens"], row.get("reward")) for row in rows],
    }


@pytest.mark.slow
def test_killed_at_random_moments_and_resumed_it_ends_with_the_same_adapters(start, tiny_model, tmp_path):
    arguments = pipeline_arguments(tiny_model)
    began = time.monotonic()
    undisturbed = start([*arguments, f"run_dir={tmp_path / 'undisturbed'}"], tmp_path / "undisturbed.log")
    undisturbed.join(300)
    assert undisturbed.exitcode == 0, (tmp_path / "undisturbed.log").read_text()[-3000:]
    duration = time.monotonic() - began
    expected = fingerprint(tmp_path / "undisturbed")
    assert len({loss for _, _, loss, _, _ in expected["losses"]}) > 5, "the losses do not move, so nothing is tested"

    generator = random.Random(0)
    kills, stages_hit, number = 0, set(), 0
    while kills < KILLS:
        number += 1
        run_dir, log = tmp_path / f"run{number}", tmp_path / f"run{number}.log"
        for _ in range(4):
            process = start([*arguments, f"resume={run_dir}"], log)
            process.join(generator.uniform(0.3, duration * 0.7))
            if process.is_alive():
                process.kill()
                process.join()
                kills += 1
                manifest = run_dir / "manifest.json"
                if manifest.exists():
                    records = json.loads(manifest.read_text())["stages"]
                    stages_hit |= {name for name, record in records.items() if record["state"] == "running"}
        last = start([*arguments, f"resume={run_dir}"], log)
        last.join(300)
        assert last.exitcode == 0, log.read_text()[-3000:]
        found = fingerprint(run_dir)
        for part, value in expected.items():
            assert found[part] == value, f"run {number}: {part} differs from the undisturbed run's"
    assert {"sft", "grpo"} <= stages_hit, f"only {stages_hit} were interrupted"
