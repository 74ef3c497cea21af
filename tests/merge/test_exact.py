"""The fold equals peft's own dense fp32 merge rounded once, bit for bit, for every kind of adapter that is accepted."""

import json
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM

import merge
from tests.merge.merge_models import bits, gpt2, llama, reference, save_adapter, save_base, train, written

VARIANTS = {
    "lora": {},
    "one_rank": {"r": 1, "lora_alpha": 3},
    "rslora": {"use_rslora": True, "r": 5},
    "all_linear": {"target_modules": "all-linear"},
    "dora": {"use_dora": True},
    "dora_rslora": {"use_dora": True, "use_rslora": True, "r": 3},
    "rank_pattern": {"rank_pattern": {"q_proj": 7, r"layers\.1\.mlp\.down_proj": 2}, "alpha_pattern": {"down_proj": 5}},
    "bias_all": {"bias": "all"},
    "bias_lora_only": {"bias": "lora_only"},
    "lora_bias": {"lora_bias": True},
    "modules_to_save": {"modules_to_save": ["lm_head", "embed_tokens"]},
    "norm_to_save": {"modules_to_save": ["input_layernorm"]},
    "trainable_tokens": {"trainable_token_indices": [3, 50, 100]},
    "trainable_tokens_both": {"trainable_token_indices": {"embed_tokens": [1, 2], "lm_head": [4]}},
    "embedding": {"target_modules": ["embed_tokens", "q_proj"]},
    "embedding_dora": {"target_modules": ["embed_tokens"], "use_dora": True},
    "lm_head": {"target_modules": ["lm_head", "q_proj"]},
    "gaussian": {"init_lora_weights": "gaussian"},
    "eva": {"init_lora_weights": "eva"},
    "orthogonal": {"init_lora_weights": "orthogonal"},
    "layers": {"layers_to_transform": [1]},
}


def check(
    base: Path, adapters: list[Path], out: Path, expected: dict[str, torch.Tensor], **options
) -> merge.Certificate:
    """Fold, compare every tensor with the reference rounded once, and reload the result in transformers without a
    missing or extra key."""
    certificate = merge.fold(base, adapters, out, **options)
    tensors = written(out)
    for name, tensor in tensors.items():
        assert torch.equal(bits(tensor), bits(expected[name].to(tensor.dtype))), name
    assert certificate.total == len(tensors) and not certificate.zero_delta
    model, info = AutoModelForCausalLM.from_pretrained(out, dtype="auto", output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"]
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, expected[name].to(tensor.dtype)), name
    return certificate


@pytest.mark.parametrize("name", VARIANTS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_variant(name: str, dtype: torch.dtype, tmp_path: Path) -> None:
    base = save_base(llama(attention_bias=True, mlp_bias=True), tmp_path / "base", dtype)
    adapter = save_adapter(base, tmp_path / "adapter", **VARIANTS[name])
    check(base, [adapter], tmp_path / "out", reference(base, [adapter]))


@pytest.mark.parametrize("config", [{}, {"use_dora": True}, {"bias": "all"}, {"use_rslora": True}])
def test_fan_in_fan_out(config: dict, tmp_path: Path) -> None:
    base = save_base(gpt2(), tmp_path / "base")
    adapter = save_adapter(
        base, tmp_path / "adapter", target_modules=["c_attn", "c_proj"], fan_in_fan_out=True, **config
    )
    check(base, [adapter], tmp_path / "out", reference(base, [adapter]))


TIED = {
    "lora": ({}, True),
    "embedding_alone": ({"target_modules": ["embed_tokens"]}, False),
    "lm_head_alone": ({"target_modules": ["lm_head", "q_proj"]}, False),
    "embedding_saved_alone": ({"modules_to_save": ["embed_tokens"]}, False),
    "both_saved_apart": ({"modules_to_save": ["embed_tokens", "lm_head"]}, None),
    "saved_as_one": ({"modules_to_save": ["embed_tokens"], "ensure_weight_tying": True}, True),
    "adapted_as_one": ({"target_modules": ["embed_tokens"], "ensure_weight_tying": True}, True),
    "trainable_tokens": ({"trainable_token_indices": [3, 5]}, True),
}


@pytest.mark.parametrize("name", TIED)
def test_tied_embeddings(name: str, tmp_path: Path) -> None:
    """A pair that training moved apart is stored apart (else the next load would overwrite one); a pair trained as one
    stays one."""
    config, stays_tied = TIED[name]
    base = save_base(llama(tie_word_embeddings=True), tmp_path / "base")
    adapter = save_adapter(base, tmp_path / "adapter", **config)
    expected = trained_state(base, adapter)
    check(base, [adapter], tmp_path / "out", expected)
    if stays_tied is not None:
        assert ("lm_head.weight" not in written(tmp_path / "out")) == stays_tied


def trained_state(base: Path, adapter: Path) -> dict[str, torch.Tensor]:
    """As `reference`, for a tied pair: peft's in-place merge of the one shared tensor would change both. So each of the
    two is merged by peft in a copy of the model that stores them apart, and what the trained model really computes with
    each (adapter unmerged) decides which weight that is."""
    tuned = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32), adapter)
    apart = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    original = apart.model.embed_tokens.weight.detach().clone()
    apart.config.tie_word_embeddings = False
    apart.lm_head.weight = torch.nn.Parameter(original.clone())
    merged = {
        name: tensor.detach()
        for name, tensor in PeftModel.from_pretrained(apart, adapter).merge_and_unload().state_dict().items()
    }
    tokens, hidden = torch.arange(101)[None], torch.randn(1, 3, 64, generator=torch.Generator().manual_seed(0))
    candidates = (merged["model.embed_tokens.weight"], merged["lm_head.weight"], original)
    with torch.no_grad():
        embedded, projected = tuned.get_input_embeddings()(tokens), tuned.get_output_embeddings()(hidden)
    for name, wanted, apply in (
        ("model.embed_tokens.weight", embedded, lambda weight: torch.nn.functional.embedding(tokens, weight)),
        ("lm_head.weight", projected, lambda weight: hidden @ weight.T),
    ):
        merged[name] = next(
            candidate for candidate in candidates if torch.allclose(apply(candidate), wanted, atol=1e-5)
        )
    return merged


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("config", [{}, {"modules_to_save": ["lm_head", "embed_tokens"]}])
def test_resized_embeddings(tied: bool, config: dict, tmp_path: Path) -> None:
    base = save_base(llama(tie_word_embeddings=tied), tmp_path / "base")
    adapter = save_adapter(base, tmp_path / "adapter", resize=109, **config)
    certificate = check(base, [adapter], tmp_path / "out", reference(base, [adapter], resize=109))
    assert any("embed_tokens" in report.name and report.changed for report in certificate.tensors)


def test_stacked_adapters_fold_in_order(tmp_path: Path) -> None:
    """SFT then GRPO: fp32 all the way, one rounding at the end."""
    base = save_base(llama(), tmp_path / "base")
    first = save_adapter(base, tmp_path / "sft", use_dora=True, target_modules=["q_proj", "v_proj"])
    second = save_adapter(base, tmp_path / "grpo", seed=5, r=8)
    check(base, [first, second], tmp_path / "out", reference(base, [first, second]))


@pytest.mark.parametrize("init", ["pissa", "pissa_niter_4", "olora"])
@pytest.mark.parametrize("alpha", [4, 6])
def test_initialisations_that_change_the_base(init: str, alpha: int, tmp_path: Path) -> None:
    """Folded through the saved initial state: W - s B0 A0 + s B A is what the trained model computes."""

    base = save_base(llama(), tmp_path / "base", torch.float32)
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    tuned = get_peft_model(
        model,
        LoraConfig(r=4, lora_alpha=alpha, target_modules=["q_proj"], task_type="CAUSAL_LM", init_lora_weights=init),
    )
    tuned.save_pretrained(tmp_path / "adapter" / "initial")
    train(tuned)
    tuned.save_pretrained(tmp_path / "adapter")
    check(base, [tmp_path / "adapter"], tmp_path / "out", tuned.merge_and_unload().state_dict())


@pytest.mark.parametrize("dtype", ["float16", "float32"])
def test_other_output_dtype(dtype: str, tmp_path: Path) -> None:
    base = save_base(llama(), tmp_path / "base")
    adapter = save_adapter(base, tmp_path / "adapter")
    check(base, [adapter], tmp_path / "out", reference(base, [adapter]), dtype=dtype)


def test_bin_shards(tmp_path: Path) -> None:
    """A base in pytorch_model*.bin gives the same weights, in safetensors."""
    base = save_base(llama(), tmp_path / "base")
    adapter = save_adapter(base, tmp_path / "adapter")
    state = written(base)
    old = tmp_path / "old"
    old.mkdir()
    (old / "config.json").write_bytes((base / "config.json").read_bytes())
    names = sorted(state)
    parts = {"pytorch_model-00001-of-00002.bin": names[:9], "pytorch_model-00002-of-00002.bin": names[9:]}
    for file, part in parts.items():
        torch.save({name: state[name] for name in part}, old / file)
    index = {"metadata": {}, "weight_map": {name: file for file, part in parts.items() for name in part}}
    (old / "pytorch_model.bin.index.json").write_text(json.dumps(index))
    check(old, [adapter], tmp_path / "out", reference(base, [adapter]))
    assert sorted(file.name for file in (tmp_path / "out").glob("*.safetensors")) == [
        f"model-0000{n}-of-00002.safetensors" for n in (1, 2)
    ]


def test_larger_than_a_block(tmp_path: Path) -> None:
    """Tensors of several blocks, with a last block that is no multiple of the others, in several shards."""
    sizes = dict(
        hidden_size=1024,
        intermediate_size=2765,
        num_hidden_layers=1,
        num_attention_heads=8,
        num_key_value_heads=8,
        vocab_size=333,
    )
    base = save_base(llama(**sizes), tmp_path / "base", max_shard_size="9MB")
    adapter = save_adapter(base, tmp_path / "adapter", target_modules="all-linear", r=7, lora_alpha=9)
    certificate = check(base, [adapter], tmp_path / "out", reference(base, [adapter]))
    assert len(list((tmp_path / "out").glob("*.safetensors"))) > 1
    assert certificate.changed == certificate.expected == 7


@pytest.mark.slow
@pytest.mark.parametrize(
    "rows,columns,rank", [(4096, 4096, 16), (11008, 4096, 16), (4097, 11009, 33), (2049, 577, 256), (1025, 8192, 3)]
)
def test_blocks_of_a_product_equal_the_whole(rows: int, columns: int, rank: int) -> None:
    """The arithmetic behind all this: rows of a product, computed by blocks, are those of the whole product to the last
    bit."""
    generator = torch.Generator().manual_seed(0)
    a, b = torch.randn(rank, columns, generator=generator), torch.randn(rows, rank, generator=generator)
    whole = b @ a
    for step in (32, 64, 96):
        starts = list(range(0, rows - step + 1, step))
        for start, stop in zip(starts, [*starts[1:], rows], strict=True):
            assert torch.equal(b[start:stop] @ a, whole[start:stop])
