"""The NF4 cache: bit for bit what transformers quantises, made once, and made again when it is damaged."""

import logging
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, LlamaConfig, LlamaForCausalLM

from finetune import models, nf4_cache
from finetune.config import ModelConfig
from finetune.errors import UserError
from finetune.hardware import Choices


def quantization(dtype: torch.dtype = torch.bfloat16) -> BitsAndBytesConfig:
    return BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True, bnb_4bit_compute_dtype=dtype)


def write_model(folder: Path, **overrides: object) -> Path:
    torch.manual_seed(0)
    settings: dict = {"vocab_size": 300, "hidden_size": 64, "intermediate_size": 176, "num_hidden_layers": 2, "num_attention_heads": 4}
    LlamaForCausalLM(LlamaConfig(**settings | {"tie_word_embeddings": False} | overrides)).save_pretrained(folder)
    return folder


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("overrides", [{}, {"tie_word_embeddings": True}, {"attention_bias": True}])
def test_is_bit_for_bit_what_transformers_quantises(tmp_path: Path, dtype: torch.dtype, overrides: dict) -> None:
    base = write_model(tmp_path / "base", **overrides)
    made = nf4_cache.cached(base, tmp_path / "cache", quantization(dtype), dtype, "cpu")
    ours = AutoModelForCausalLM.from_pretrained(made, dtype=dtype, device_map={"": "cpu"})
    theirs = AutoModelForCausalLM.from_pretrained(base, dtype=dtype, device_map={"": "cpu"}, quantization_config=quantization(dtype))
    ours_state, theirs_state = ours.state_dict(), theirs.state_dict()
    assert list(ours_state) == list(theirs_state)
    for name, tensor in theirs_state.items():
        assert ours_state[name].dtype == tensor.dtype and torch.equal(ours_state[name], tensor), name
    ids = torch.arange(20)[None]
    assert torch.equal(ours(ids).logits, theirs(ids).logits)


def test_bin_shards_give_the_same_as_safetensors(tmp_path: Path) -> None:
    base = write_model(tmp_path / "base")
    old = tmp_path / "old"
    old.mkdir()
    (old / "config.json").write_text((base / "config.json").read_text())
    torch.save(LlamaForCausalLM.from_pretrained(base).state_dict(), old / "pytorch_model.bin")
    first = nf4_cache.cached(base, tmp_path / "cache", quantization(), torch.bfloat16, "cpu")
    second = nf4_cache.cached(old, tmp_path / "cache", quantization(), torch.bfloat16, "cpu")
    assert first != second
    states = [AutoModelForCausalLM.from_pretrained(made, dtype=torch.bfloat16).state_dict() for made in (first, second)]
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])


def test_is_made_once_and_again_for_other_weights_or_settings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base, cache = write_model(tmp_path / "base"), tmp_path / "cache"
    first = nf4_cache.cached(base, cache, quantization(), torch.bfloat16, "cpu")
    other_dtype = nf4_cache.cached(base, cache, quantization(torch.float16), torch.float16, "cpu")
    write_model(base, rope_theta=5e5)  # config.json changes, the weights do not
    other_config = nf4_cache.cached(base, cache, quantization(), torch.bfloat16, "cpu")
    torch.manual_seed(1)
    LlamaForCausalLM(LlamaConfig.from_pretrained(base)).save_pretrained(base)
    other_weights = nf4_cache.cached(base, cache, quantization(), torch.bfloat16, "cpu")
    assert len({first, other_dtype, other_config, other_weights}) == 4

    monkeypatch.setattr(nf4_cache, "quantise", lambda *args: pytest.fail("quantised again"))
    assert nf4_cache.cached(base, cache, quantization(), torch.bfloat16, "cpu") == other_weights


def test_a_damaged_cache_is_made_again_and_said(tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(logging.getLogger("finetune"), "propagate", True)
    base, cache = write_model(tmp_path / "base"), tmp_path / "cache"
    made = nf4_cache.cached(base, cache, quantization(), torch.bfloat16, "cpu")
    shard = made / "model-00001.safetensors"
    good = shard.read_bytes()
    shard.write_bytes(good[:-1] + bytes([good[-1] ^ 1]))
    assert nf4_cache.cached(base, cache, quantization(), torch.bfloat16, "cpu") == made
    assert shard.read_bytes() == good
    assert "damaged" in caplog.text
    assert not list(cache.glob("*.tmp")) and not list(cache.glob(".*.tmp"))


def test_an_interrupted_one_leaves_nothing_that_counts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base, cache = write_model(tmp_path / "base"), tmp_path / "cache"

    def disk_full(*args: object) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(nf4_cache, "quantise", disk_full)
        with pytest.raises(UserError, match="FINETUNE_CACHE"):
            nf4_cache.cached(base, cache, quantization(), torch.bfloat16, "cpu")
    assert [path.name for path in cache.iterdir() if not path.name.startswith(".")] == ["hashes.json"]
    assert nf4_cache.cached(base, cache, quantization(), torch.bfloat16, "cpu").is_dir()


def test_shards_are_split_and_nothing_is_lost(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base = write_model(tmp_path / "base")
    whole = nf4_cache.cached(base, tmp_path / "one", quantization(), torch.bfloat16, "cpu")
    monkeypatch.setattr(nf4_cache, "SHARD_BYTES", 20_000)
    split = nf4_cache.cached(base, tmp_path / "many", quantization(), torch.bfloat16, "cpu")
    assert len(list(split.glob("*.safetensors"))) > 2
    states = [AutoModelForCausalLM.from_pretrained(made, dtype=torch.bfloat16).state_dict() for made in (whole, split)]
    assert list(states[0]) == list(states[1]) and all(torch.equal(states[0][name], states[1][name]) for name in states[0])


def test_a_checkpoint_under_other_names_is_refused(tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    base = write_model(tmp_path / "base")
    state = load_file(base / "model.safetensors")
    state["model.layers.0.self_attn.renamed.weight"] = state.pop("model.layers.0.self_attn.q_proj.weight")
    save_file(state, base / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UserError, match="q_proj"):
        nf4_cache.cached(base, tmp_path / "cache", quantization(), torch.bfloat16, "cpu")


def test_load_base_takes_the_cache_and_names_the_base(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base = write_model(tmp_path / "base")
    monkeypatch.setenv("FINETUNE_CACHE", str(tmp_path / "cache"))
    choices = Choices("cpu", "bfloat16", "sdpa", "nf4", ())
    direct = models.load_base(base, ModelConfig(), choices)
    assert not (tmp_path / "cache").exists(), "a base this small is not cached"
    monkeypatch.setattr(nf4_cache, "SMALLEST", 0)
    cached = models.load_base(base, ModelConfig(), choices)
    assert len(list((tmp_path / "cache" / "nf4").glob("*/config.json"))) == 1
    assert cached.config._name_or_path == cached.name_or_path == str(base)
    ids = torch.arange(20)[None]
    assert torch.equal(direct(ids).logits, cached(ids).logits)
