import json
import os
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM

from merge import MergeError
from merge.serving import serving_commands, vllm_adapter


def adapter(model: Path, folder: Path, **settings: object) -> Path:
    torch.manual_seed(1)
    base = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    get_peft_model(base, LoraConfig(**{"r": 12, "target_modules": ["q_proj"]} | settings)).save_pretrained(folder)
    return folder


def test_the_copy_is_the_same_adapter_and_notes_the_rank(tiny_model: Path, tmp_path: Path) -> None:
    source = adapter(tiny_model, tmp_path / "a", use_rslora=True)
    result = vllm_adapter(source, tmp_path / "vllm")
    assert (result.rank, result.max_lora_rank) == (12, 16)
    assert sorted(os.listdir(result.path)) == ["adapter_config.json", "adapter_model.safetensors"]
    assert (result.path / "adapter_model.safetensors").read_bytes() == (
        source / "adapter_model.safetensors"
    ).read_bytes()
    base = AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32)
    PeftModel.from_pretrained(base, result.path)
    with pytest.raises(MergeError, match="exists already"):
        vllm_adapter(source, tmp_path / "vllm")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"use_dora": True}, "use_dora = True: vLLM does not support DoRA"),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save.*Fold it"),
        ({"rank_pattern": {"q_proj": 4}}, "one rank for all layers"),
        ({"bias": "lora_only"}, "serves no trained biases"),
        ({"target_modules": ["q_proj", "embed_tokens"]}, "embed_tokens.*is not a LoRA matrix"),
        ({"r": 600}, "serves at most 512"),
    ],
)
def test_what_vllm_would_serve_wrongly_is_refused(
    tiny_model: Path, tmp_path: Path, settings: dict, message: str
) -> None:
    source = adapter(tiny_model, tmp_path / "a", **settings)
    with pytest.raises(MergeError, match=message):
        vllm_adapter(source, tmp_path / "vllm")
    assert os.listdir(tmp_path) == ["a"]


def test_commands_quote_paths_and_name_the_rank(tiny_model: Path, tmp_path: Path) -> None:
    result = vllm_adapter(adapter(tiny_model, tmp_path / "a"), tmp_path / "my adapter")
    commands = serving_commands("tutor", "base", gguf_file="out/m.gguf", modelfile="out/Modelfile", adapter=result)
    assert commands["vLLM"] == (
        f"vllm serve base --enable-lora --max-lora-rank 16 --lora-modules 'tutor={tmp_path}/my adapter'"
    )
    assert commands["llama.cpp"] == "llama-server -m out/m.gguf --alias tutor --jinja"
    assert commands["Ollama"] == "ollama create tutor -f out/Modelfile && ollama run tutor"
    assert serving_commands("tutor", "merged model") == {"vLLM": "vllm serve 'merged model' --served-model-name tutor"}
    assert json.loads((result.path / "adapter_config.json").read_text())["r"] == 12
