"""GGUF export on tiny random Llamas, checked against transformers' weights and llama.cpp's own logits."""

import json
import os
import shutil
import sys
from collections import namedtuple
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from merge import MergeError
from merge.gguf import TYPES, to_gguf
from merge.gguf_lora import to_gguf_lora

LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}


@pytest.fixture(scope="module")
def adapter(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A rank-4 adapter on every linear layer, with random B."""
    return make_adapter(tiny_model, tmp_path_factory.mktemp("adapter"))


def make_model(like: Path, folder: Path, **settings: object) -> Path:
    """A random Llama with the tokenizer and configuration of another, but for the settings."""
    shutil.copytree(like, folder)
    torch.manual_seed(0)
    LlamaForCausalLM(LlamaConfig(**LlamaConfig.from_pretrained(like).to_dict() | settings)).save_pretrained(folder)
    return folder


def make_adapter(model: Path, folder: Path, **settings: object) -> Path:
    torch.manual_seed(1)
    base = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    peft = get_peft_model(base, LoraConfig(**{"r": 4, "lora_alpha": 8, "target_modules": "all-linear"} | settings))
    for name, parameter in peft.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    peft.save_pretrained(folder)
    return folder


def tensors(file: Path) -> dict[str, gguf.ReaderTensor]:
    return {tensor.name: tensor for tensor in gguf.GGUFReader(file).tensors}


def llama_cpp_logits(file: Path, ids: list[int], **settings: object) -> np.ndarray:
    """Logits of the last of the ids, (vocabulary,), computed by llama.cpp."""
    llama_cpp = pytest.importorskip("llama_cpp")
    model = llama_cpp.Llama(str(file), n_ctx=128, logits_all=True, verbose=False, **settings)
    model.eval(ids)
    logits = model.scores[len(ids) - 1].copy()
    model.close()
    return logits


def reference_logits(model: torch.nn.Module, ids: list[int]) -> np.ndarray:
    with torch.no_grad():
        return model(torch.tensor([ids])).logits[0, -1].float().numpy()


IDS = [5, 17, 300, 42, 8, 99, 250, 3, 120, 61] * 8


@pytest.mark.parametrize(
    "shape",
    [
        {},
        {"num_key_value_heads": 4},
        {"tie_word_embeddings": True, "head_dim": 32},
        {"rope_parameters": LLAMA3_ROPE},
        {"rope_parameters": {"rope_type": "linear", "rope_theta": 10000.0, "factor": 4.0}},
        {"attention_bias": True},
    ],
    ids=["grouped-query", "full-heads", "tied-wide-heads", "llama3-rope", "linear-rope", "biases"],
)
def test_llama_cpp_computes_the_logits_of_transformers(tiny_model: Path, tmp_path: Path, shape: dict) -> None:
    folder = make_model(tiny_model, tmp_path / "model", **shape)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):  # transformers starts biases at zero, which would hide a wrong order
            torch.nn.init.normal_(parameter)
    model.save_pretrained(folder)
    expected = reference_logits(model, IDS)
    actual = llama_cpp_logits(to_gguf(folder, tmp_path / "out.gguf", "f32"), IDS)
    # llama.cpp keeps its key-value cache in fp16.
    np.testing.assert_allclose(actual, expected, atol=3e-3)
    assert np.abs(expected).max() > 0.1


def test_the_fold_of_base_and_adapter_is_peft_s_merge(tiny_model: Path, adapter: Path, tmp_path: Path) -> None:
    from peft import PeftModel

    base = AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32)
    merged = PeftModel.from_pretrained(base, adapter).merge_and_unload()
    merged.save_pretrained(tmp_path / "merged")
    for file in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        shutil.copy(tiny_model / file, tmp_path / "merged")
    direct = tensors(to_gguf(tiny_model, tmp_path / "direct.gguf", "F32", adapter=adapter))
    through = tensors(to_gguf(tmp_path / "merged", tmp_path / "through.gguf", "F32"))
    unchanged = tensors(to_gguf(tiny_model, tmp_path / "base.gguf", "F32"))
    assert direct.keys() == through.keys()
    for name in direct:
        np.testing.assert_array_equal(direct[name].data, through[name].data, err_msg=name)
    assert not np.array_equal(direct["blk.1.attn_k.weight"].data, unchanged["blk.1.attn_k.weight"].data)


@pytest.mark.parametrize("kind", ["F16", "BF16", "Q8_0", "Q4_0", "Q4_1", "Q5_0", "Q5_1"])
def test_every_type_is_the_gguf_package_s_rounding_of_the_weights(tiny_model: Path, tmp_path: Path, kind: str) -> None:
    exact = tensors(to_gguf(tiny_model, tmp_path / "f32.gguf", "F32"))
    actual = tensors(to_gguf(tiny_model, tmp_path / "out.gguf", kind.lower()))
    for name, tensor in exact.items():
        own = kind
        if len(tensor.shape) == 1:
            own = "F32"
        elif name == "output.weight" and kind.startswith("Q"):
            own = "Q8_0"
        assert actual[name].tensor_type.name == own, name
        expected = gguf.quants.quantize(tensor.data, gguf.GGMLQuantizationType[own])
        np.testing.assert_array_equal(actual[name].data.view(np.uint8), expected.view(np.uint8), err_msg=name)


def test_q_and_k_rows_are_interleaved(tiny_model: Path, tmp_path: Path) -> None:
    weights = load_file(tiny_model / "model.safetensors")
    written = tensors(to_gguf(tiny_model, tmp_path / "out.gguf", "F32"))
    for ours, theirs, heads in (("attn_q", "q_proj", 4), ("attn_k", "k_proj", 2)):
        source = weights[f"model.layers.1.self_attn.{theirs}.weight"]
        expected = source.view(heads, 2, -1, 64).swapaxes(1, 2).reshape(source.shape)  # llama.cpp's LlamaModel.permute
        np.testing.assert_array_equal(written[f"blk.1.{ours}.weight"].data, expected.numpy())


def test_metadata(tiny_model: Path, tmp_path: Path) -> None:
    fields = gguf.GGUFReader(to_gguf(tiny_model, tmp_path / "out.gguf", "Q8_0")).fields
    values = {key: field.contents() for key, field in fields.items()}
    assert values["general.architecture"] == "llama"
    assert values["general.file_type"] == gguf.LlamaFileType.MOSTLY_Q8_0
    assert values["llama.block_count"] == 2 and values["llama.context_length"] == 512
    assert values["llama.attention.head_count"] == 4 and values["llama.attention.head_count_kv"] == 2
    assert values["llama.vocab_size"] == len(values["tokenizer.ggml.tokens"])
    assert values["tokenizer.ggml.pre"] == "smollm"
    assert values["tokenizer.ggml.tokens"][values["tokenizer.ggml.eos_token_id"]] == "<|im_end|>"
    assert values["tokenizer.chat_template"] == (tiny_model / "chat_template.jinja").read_text()


def test_rows_that_are_no_multiple_of_32_become_f16_with_a_warning(tiny_model: Path, tmp_path: Path) -> None:
    folder = make_model(tiny_model, tmp_path / "model", intermediate_size=100)
    with pytest.warns(UserWarning, match="2 tensor.*written as F16.*down_proj"):
        written = tensors(to_gguf(folder, tmp_path / "out.gguf", "Q8_0"))
    assert written["blk.0.ffn_down.weight"].tensor_type.name == "F16"
    assert written["blk.0.ffn_up.weight"].tensor_type.name == "Q8_0"


def test_a_k_quant_is_made_by_llama_cpp(tiny_model: Path, tmp_path: Path) -> None:
    pytest.importorskip("llama_cpp")
    folder = make_model(tiny_model, tmp_path / "model", hidden_size=256, intermediate_size=256)
    written = tensors(to_gguf(folder, tmp_path / "out.gguf", "q4_k_m"))
    assert written["blk.0.ffn_gate.weight"].tensor_type.name == "Q4_K"
    assert sorted(os.listdir(tmp_path)) == ["model", "out.gguf"]


def test_a_k_quant_without_llama_cpp_says_what_to_install(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "llama_cpp", None)
    with pytest.raises(MergeError, match="pip install llama-cpp-python"):
        to_gguf(tiny_model, tmp_path / "out.gguf", "Q4_K_M")


def test_progress_counts_every_byte(tiny_model: Path, tmp_path: Path) -> None:
    calls: list[tuple[int, int]] = []
    to_gguf(tiny_model, tmp_path / "out.gguf", "Q8_0", progress=lambda done, total: calls.append((done, total)))
    assert calls[-1][0] == calls[-1][1] > 0
    assert [done for done, _ in calls] == sorted(done for done, _ in calls)


def edited(model: Path, folder: Path, change: dict) -> Path:
    """A copy of a model folder with config.json changed."""
    shutil.copytree(model, folder)
    config = json.loads((folder / "config.json").read_text()) | change
    (folder / "config.json").write_text(json.dumps(config))
    return folder


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"architectures": ["GemmaForCausalLM"]}, "GemmaForCausalLM.*supports LlamaForCausalLM"),
        ({"hidden_act": "gelu"}, "hidden_act = 'gelu'"),
        ({"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}}, "rope_type = 'dynamic'"),
        ({"num_hidden_layers": 3}, "lacks 9 tensor.*blk.2.attn_k"),
        ({"num_attention_heads": 8, "head_dim": 16}, "q_proj.weight has 64 rows; config.json says 8 heads of 16"),
        ({"num_hidden_layers": 1}, "model.layers.1.*no place"),
        ({"vocab_size": 400, "quantization_config": {"quant_method": "bitsandbytes"}}, "quantization_config"),
    ],
)
def test_a_model_that_cannot_be_exported_is_refused_by_name(
    tiny_model: Path, tmp_path: Path, change: dict, message: str
) -> None:
    folder = edited(tiny_model, tmp_path / "model", change)
    with pytest.raises(MergeError, match=message):
        to_gguf(folder, tmp_path / "out.gguf", "F16")
    assert os.listdir(tmp_path) == ["model"]


@pytest.mark.parametrize(("value", "message"), [(float("nan"), "nan in row 3, column 5"), (7e4, "F16 holds at most")])
def test_a_weight_that_the_file_cannot_hold_is_refused(
    tiny_model: Path, tmp_path: Path, value: float, message: str
) -> None:
    folder = edited(tiny_model, tmp_path / "model", {})
    weights = load_file(folder / "model.safetensors")
    weights["model.layers.1.mlp.up_proj.weight"][3, 5] = value
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(MergeError, match=f"layers.1.mlp.up_proj.weight.*{message}"):
        to_gguf(folder, tmp_path / "out.gguf", "F16")
    assert os.listdir(tmp_path) == ["model"]


def test_a_truncated_shard_is_refused(tiny_model: Path, tmp_path: Path) -> None:
    folder = edited(tiny_model, tmp_path / "model", {})
    with open(folder / "model.safetensors", "r+b") as file:
        file.truncate(os.path.getsize(folder / "model.safetensors") - 100)
    with pytest.raises(MergeError, match="truncated"):
        to_gguf(folder, tmp_path / "out.gguf", "F16")
    assert os.listdir(tmp_path) == ["model"]


def test_an_existing_file_an_unknown_type_and_a_full_disk_are_refused(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(MergeError, match="type = 'Q9'; expected one of F32") as refusal:
        to_gguf(tiny_model, tmp_path / "out.gguf", "Q9")
    assert all(kind in str(refusal.value) for kind in TYPES)
    (tmp_path / "out.gguf").write_text("mine")
    with pytest.raises(MergeError, match="exists already"):
        to_gguf(tiny_model, tmp_path / "out.gguf", "F16")
    assert (tmp_path / "out.gguf").read_text() == "mine"
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage(10**9, 10**9, 1000))
    with pytest.raises(MergeError, match="0.00 GB free, other.gguf needs"):
        to_gguf(tiny_model, tmp_path / "other.gguf", "F16")
    assert os.listdir(tmp_path) == ["out.gguf"]


@pytest.mark.skipif(not Path("/dev/full").exists() or os.geteuid() != 0, reason="mounting a small disk needs root")
def test_a_disk_that_fills_midway_leaves_nothing(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    disk = tmp_path / "disk"
    disk.mkdir()
    if os.system(f"mount -t tmpfs -o size=64k tmpfs {disk} 2>/dev/null") != 0:
        pytest.skip("a tmpfs cannot be mounted here")
    try:
        usage = namedtuple("usage", "total used free")
        monkeypatch.setattr(shutil, "disk_usage", lambda _: usage(10**12, 0, 10**12))  # another program takes the room
        with pytest.raises(MergeError, match="filled up during the export"):
            to_gguf(tiny_model, disk / "out.gguf", "F16")
        assert os.listdir(disk) == []
    finally:
        os.system(f"umount {disk}")


@pytest.mark.parametrize(
    "settings", [{}, {"use_rslora": True}, {"alpha_pattern": {"q_proj": 3}, "rank_pattern": {"k_proj": 2}}]
)
def test_the_adapter_alone_gives_peft_s_logits_in_llama_cpp(tiny_model: Path, tmp_path: Path, settings: dict) -> None:
    from peft import PeftModel

    folder = make_adapter(tiny_model, tmp_path / "adapter", **settings)
    base = AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32)
    plain = reference_logits(base, IDS)
    expected = reference_logits(PeftModel.from_pretrained(base, folder), IDS)
    assert np.abs(expected - plain).max() > 0.1
    model_file = to_gguf(tiny_model, tmp_path / "base.gguf", "F32")
    lora_file = to_gguf_lora(folder, tiny_model, tmp_path / "lora.gguf")
    np.testing.assert_allclose(llama_cpp_logits(model_file, IDS, lora_path=str(lora_file)), expected, atol=5e-3)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"use_dora": True}, "lora_magnitude_vector.*not a LoRA matrix"),
        ({"modules_to_save": ["lm_head"], "target_modules": ["q_proj"]}, "lm_head.*not a LoRA matrix"),
    ],
)
def test_an_adapter_that_is_more_than_low_rank_matrices_is_refused(
    tiny_model: Path, tmp_path: Path, settings: dict, message: str
) -> None:
    folder = make_adapter(tiny_model, tmp_path / "adapter", **settings)
    with pytest.raises(MergeError, match=message):
        to_gguf_lora(folder, tiny_model, tmp_path / "lora.gguf")
    assert os.listdir(tmp_path) == ["adapter"]
