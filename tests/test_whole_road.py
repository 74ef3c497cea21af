"""The whole road on the real SmolLM2 with a small budget: each hand-over is proved, up to a server's answers."""

import json
import os
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
QUESTIONS = ["2 + 3 - 4 =", "What is 7 + 8?", "Name a prime number above 10."]


@pytest.fixture(scope="module")
def run_dir(smollm2, tmp_path_factory) -> Path:
    """A finished quickstart run with a few steps of each training."""
    directory = tmp_path_factory.mktemp("runs") / "road"
    done = subprocess.run(
        [
            sys.executable, "-m", "finetune", "recipe=quickstart", f"run_dir={directory}", "sft.max_steps=10", "sft.batch_size=8",
            "sft.micro_batch_size=8", "grpo.max_steps=1", "grpo.batch_size=16", "grpo.group_size=8", "grpo.max_completion_length=24", "grpo.diagnosis=warn",
            "data.held_out=16", "evaluate.max_new_tokens=32", "export.targets=[safetensors,gguf,ollama]", "export.gguf_type=Q8_0",
        ],
        capture_output=True, text=True, cwd=directory.parent, env=os.environ | {"PYTHONPATH": str(ROOT)}, timeout=1200,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return directory


@pytest.mark.slow
def test_the_run_directory_holds_what_is_promised(run_dir):
    for name in (
        "config.yaml", "manifest.json", "sft/adapter/adapter_model.safetensors", "grpo/adapter/adapter_model.safetensors",
        "merged/model.safetensors", "merged/config.json", "merged/tokenizer.json", "merged/chat_template.jinja",
        "merged/generation_config.json", "merged/README.md", "merged/certificate.json", "export/Modelfile",
        "export/quickstart-q8_0.gguf", "export/serve.txt", "evaluate/results.json", "metrics.jsonl", "report.html", "finetune.log",
    ):
        assert (run_dir / name).is_file(), name
    row = json.loads((run_dir / "metrics.jsonl").read_text().splitlines()[0])
    assert {"stage", "step", "seconds", "tokens", "supervised_tokens", "loss"} <= set(row)


@pytest.mark.slow
def test_the_hash_chain_leads_from_the_base_to_the_exports(run_dir):
    stages = json.loads((run_dir / "manifest.json").read_text())["stages"]
    assert stages["sft"]["inputs"]["base"]["sha256"] == stages["merge"]["inputs"]["base"]["sha256"]
    assert stages["grpo"]["inputs"]["adapter"]["sha256"] == stages["sft"]["outputs"]["sft/adapter"]
    assert stages["merge"]["inputs"]["adapter"]["sha256"] == stages["grpo"]["outputs"]["grpo/adapter"]
    assert stages["export"]["inputs"]["source"]["sha256"] == stages["merge"]["outputs"]["merged"]
    assert stages["evaluate"]["inputs"]["merged"]["sha256"] == stages["merge"]["outputs"]["merged"]


@pytest.mark.slow
def test_merged_answers_as_the_adapter_on_the_full_precision_base_token_for_token(run_dir):
    results = json.loads((run_dir / "evaluate" / "results.json").read_text())
    assert set(results["models"]) == {"base", "sft", "grpo", "merged"}
    differing = [row["id"] for row in results["rows"] if row["completions"]["grpo"] != row["completions"]["merged"]]
    assert differing == []
    comparison = next(item for item in results["comparisons"] if (item["from"], item["to"]) == ("grpo", "merged"))
    assert comparison["identical"] == results["problems"] == 16


@pytest.mark.slow
def test_no_problem_is_on_both_sides(run_dir):
    record = json.loads((run_dir / "data.json").read_text())
    assert record["held_out"] == 16 and record["train"] > 1000 and record["train_sha256"] != record["held_out_sha256"]


@pytest.mark.slow
def test_transformers_serve_answers_as_the_model_does_in_process(run_dir):
    pytest.importorskip("fastapi")
    import torch
    from openai import OpenAI
    from transformers import AutoModelForCausalLM, AutoTokenizer

    merged = run_dir / "merged"
    tokenizer = AutoTokenizer.from_pretrained(merged)
    model = AutoModelForCausalLM.from_pretrained(merged)
    expected = []
    for question in QUESTIONS:
        prompt = tokenizer.apply_chat_template(
            [{"role": "user", "content": question}], add_generation_prompt=True, return_tensors="pt", return_dict=True
        )
        with torch.inference_mode():
            ids = model.generate(**prompt, max_new_tokens=24, do_sample=False)[0, prompt["input_ids"].shape[1] :]
        expected.append(tokenizer.decode(ids, skip_special_tokens=True))

    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    server = subprocess.Popen(
        [str(Path(sys.executable).with_name("transformers")), "serve", str(merged), "--host", "127.0.0.1", "--port", str(port)],
        stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env=os.environ | {"HF_HUB_OFFLINE": "1"},
    )
    try:
        wait_for(f"http://127.0.0.1:{port}/health", server)
        client = OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="none", timeout=120)
        for question, text in zip(QUESTIONS, expected, strict=True):
            answer = client.chat.completions.create(
                model=str(merged), messages=[{"role": "user", "content": question}], temperature=0.0, max_tokens=24,
            )
            served = answer.choices[0].message.content
            assert tokenizer(served)["input_ids"] == tokenizer(text)["input_ids"], f"{question}: served {served!r}, in process {text!r}"
    finally:
        server.kill()
        server.wait()


def wait_for(address: str, server: subprocess.Popen) -> None:
    """Wait until the server answers at `address`."""
    deadline = time.monotonic() + 180
    while time.monotonic() < deadline:
        assert server.poll() is None, "the server ended by itself"
        try:
            with urllib.request.urlopen(address, timeout=2):
                return
        except (urllib.error.URLError, TimeoutError):
            time.sleep(1)
    raise AssertionError(f"no answer from {address}")


@pytest.mark.slow
def test_a_wheel_runs_from_another_folder_and_environment(tmp_path, smollm2):
    """Build the wheel, unpack it away from the checkout, list and compose the quickstart recipe with it alone."""
    built = subprocess.run(
        [sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "--quiet", "-w", str(tmp_path / "dist"), str(ROOT)],
        capture_output=True, text=True, timeout=300,
    )
    assert built.returncode == 0, built.stderr
    site, elsewhere = tmp_path / "site", tmp_path / "elsewhere"
    elsewhere.mkdir()
    wheel = next((tmp_path / "dist").glob("*.whl"))
    installed = subprocess.run(
        [sys.executable, "-m", "pip", "install", "--no-deps", "--quiet", "--target", str(site), str(wheel)],
        capture_output=True, text=True, timeout=300,
    )
    assert installed.returncode == 0, installed.stderr
    done = subprocess.run(
        [
            sys.executable, "-m", "finetune", "recipe=quickstart", "run_dir=run", "stages=[sft,merge,report]", "sft.max_steps=1",
            "sft.batch_size=2", "sft.micro_batch_size=2", "data.options.size=300", "data.held_out=8",
        ],
        capture_output=True, text=True, cwd=elsewhere, env=os.environ | {"PYTHONPATH": str(site)}, timeout=600,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert (elsewhere / "run" / "report.html").is_file()
    where = subprocess.run(
        [sys.executable, "-c", "import finetune; print(finetune.__file__)"], capture_output=True, text=True, cwd=elsewhere,
        env=os.environ | {"PYTHONPATH": str(site)}, timeout=60,
    )
    assert str(site) in where.stdout
