"""The real SmolLM2 with an adapter, exported and served by llama-cpp-python, asked through the openai client."""

import os
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch

from merge.gguf import to_gguf

pytestmark = pytest.mark.slow

NEAR_TIE = 0.05
"""Logits. llama.cpp multiplies F16 weights with activations rounded to F16; a lead smaller than this may turn over."""

PROMPTS = [
    *(f"What is {a} + {b}? Answer with the number only." for a, b in ((2, 3), (10, 7), (25, 30), (100, 11))),
    *(f"Name the capital of {country} in one word." for country in ("France", "Japan", "Italy", "Egypt")),
    *(f"Give one short sentence about {topic}." for topic in ("triangles", "prime numbers", "fractions", "zero")),
    *(f"Translate '{word}' to Spanish." for word in ("house", "water", "friend", "book")),
    *(f"Is {n} even or odd?" for n in (8, 13, 102, 77)),
    "Say hello.",
    "Spell the word cat.",
]

# llama-cpp-python's server without weight repacking: that uses AMX tiles where the CPU reports them, and some virtual
# machines report them and trap them.
SERVER = """
import runpy, sys
import llama_cpp.llama_cpp as api
default = api.llama_model_default_params
def without_repacking():
    params = default()
    params.use_extra_bufts = False
    return params
api.llama_model_default_params = without_repacking
sys.argv[0] = "llama_cpp.server"
runpy.run_module("llama_cpp.server", run_name="__main__")
"""


@pytest.fixture(scope="module")
def adapter(smollm2: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    torch.manual_seed(0)
    base = AutoModelForCausalLM.from_pretrained(smollm2, dtype=torch.float32)
    model = get_peft_model(base, LoraConfig(r=4, lora_alpha=8, target_modules="all-linear"))
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.0005)
    folder = tmp_path_factory.mktemp("adapter")
    model.save_pretrained(folder)
    return folder


@contextmanager
def served(file: Path) -> Iterator[object]:
    """An openai client of a server of the GGUF."""
    openai = pytest.importorskip("openai")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [sys.executable, "-c", SERVER, "--model", str(file), "--port", str(port), "--n_ctx", "1024"]
    log = open(file.with_suffix(".log"), "w")
    server = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT)
    try:
        for _ in range(240):
            if server.poll() is not None:
                pytest.fail(f"the server ended: {file.with_suffix('.log').read_text()[-2000:]}")
            with socket.socket() as probe:
                if probe.connect_ex(("127.0.0.1", port)) == 0:
                    break
            time.sleep(0.5)
        yield openai.OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="none", max_retries=5)
    finally:
        server.terminate()
        server.wait(20)
        log.close()


def answers_of(file: Path) -> dict[str, str]:
    """Prompt -> greedy answer of a server of the GGUF, each of which ended by itself."""
    answers = {}
    with served(file) as client:
        for prompt in PROMPTS:
            reply = client.chat.completions.create(  # type: ignore[attr-defined]
                model="m",
                messages=[{"role": "user", "content": prompt}],
                temperature=0,
                max_tokens=256,
                extra_body={"repeat_penalty": 1.0},  # this server's own default, 1.1, is not greedy decoding
            )
            answers[prompt] = reply.choices[0].message.content
            assert reply.choices[0].finish_reason == "stop", f"{prompt}: {answers[prompt]}"
    return answers


@pytest.fixture(scope="module")
def reference(smollm2: Path, adapter: Path) -> torch.nn.Module:
    """The merged model in transformers, fp32."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    base = AutoModelForCausalLM.from_pretrained(smollm2, dtype=torch.float32)
    return PeftModel.from_pretrained(base, adapter).merge_and_unload()


def trailing(reference: torch.nn.Module, folder: Path, prompt: str, text: str) -> list[float]:
    """For each token of a served answer, and for its end, how far its logit is behind transformers' greedy choice."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    chat = [{"role": "user", "content": prompt}]
    ids = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_dict=True)["input_ids"]
    answer = tokenizer(text, add_special_tokens=False)["input_ids"]
    # llama.cpp also ends at <|endoftext|>, whatever a GGUF says.
    ends = [tokenizer.eos_token_id, tokenizer.convert_tokens_to_ids("<|endoftext|>")]
    # One pass over prompt and answer gives the choice at each place, as if generated up to there.
    with torch.no_grad():
        logits = reference(torch.tensor([ids + answer])).logits[0, len(ids) - 1 :]
    taken = [*logits[range(len(answer)), answer].tolist(), logits[-1, ends].max().item()]
    return [best - own for best, own in zip(logits.max(dim=1).values.tolist(), taken, strict=True)]


def test_f16_answers_are_those_of_transformers_up_to_near_ties(
    smollm2: Path, adapter: Path, reference: torch.nn.Module, tmp_path: Path
) -> None:
    pytest.importorskip("llama_cpp")
    answers = answers_of(to_gguf(smollm2, tmp_path / "f16.gguf", "F16", adapter=adapter))
    assert len(answers) >= 20
    gaps = {}
    for prompt, text in answers.items():
        behind = trailing(reference, smollm2, prompt, text)
        first = next((place for place, gap in enumerate(behind) if gap > 0), None)
        if first is not None:
            gaps[prompt] = (first, round(behind[first], 4))
    print(
        f"\n{len(answers) - len(gaps)} of {len(answers)} answers token-identical; first near-ties (token, gap): {gaps}"
    )
    assert all(gap < NEAR_TIE for _, gap in gaps.values()), gaps


def test_q8_0_answers_nearly_as_transformers_and_stops(
    smollm2: Path, adapter: Path, reference: torch.nn.Module, tmp_path: Path
) -> None:
    pytest.importorskip("llama_cpp")
    answers = answers_of(to_gguf(smollm2, tmp_path / "q8.gguf", "Q8_0", adapter=adapter))
    behind = [gap for prompt, text in answers.items() for gap in trailing(reference, smollm2, prompt, text)]
    agreed = sum(gap == 0 for gap in behind) / len(behind)
    print(f"\nQ8_0: {agreed:.1%} of {len(behind)} tokens are transformers' greedy choice")
    assert agreed > 0.9


def test_llama_cpp_s_own_converter_writes_the_same_tensors(smollm2: Path, tmp_path: Path) -> None:
    """Needs LLAMA_CPP: a checkout of llama.cpp, whose convert_hf_to_gguf.py runs beside ours."""
    checkout = os.environ.get("LLAMA_CPP")
    if checkout is None:
        pytest.skip("LLAMA_CPP names no checkout of llama.cpp")
    import gguf
    import numpy as np

    for kind in ("f16", "q8_0"):
        command = [sys.executable, f"{checkout}/convert_hf_to_gguf.py", str(smollm2), "--outtype", kind]
        environment = os.environ | {"PYTHONPATH": f"{checkout}/gguf-py"}
        theirs = tmp_path / f"theirs-{kind}.gguf"
        subprocess.run([*command, "--outfile", str(theirs)], check=True, env=environment, capture_output=True)
        ours = to_gguf(smollm2, tmp_path / f"ours-{kind}.gguf", kind)
        expected = {tensor.name: tensor for tensor in gguf.GGUFReader(theirs).tensors}
        actual = {tensor.name: tensor for tensor in gguf.GGUFReader(ours).tensors}
        assert actual.keys() == expected.keys()
        for name in actual:
            assert actual[name].tensor_type == expected[name].tensor_type, name
            np.testing.assert_array_equal(actual[name].data, expected[name].data, err_msg=name)
    shutil.rmtree(tmp_path)
