"""Every LoRA variant trains, is saved as what it is, folds to the model that was trained, or is refused with the reason."""

from pathlib import Path

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

import merge
from finetune import data, hardware, models, packing, sft, variants
from finetune.config import Config, DataConfig, HardwareConfig, LoraConfig, MergeConfig, ModelConfig, SftConfig
from finetune.errors import UserError
from finetune.run import Run


def make_config(model: Path, variant: str, quantization: str, **lora: object) -> Config:
    return Config(
        model=ModelConfig(path=str(model), quantization=quantization, dtype="float32"),
        data=DataConfig(path="reasoning_gym:chain_sum", options={"size": 60, "seed": 0}, held_out=5),
        lora=LoraConfig(**{"r": 4, "alpha": 8, "variant": variant} | lora),
        sft=SftConfig(max_steps=2, batch_size=4, micro_batch_size=4, max_length=200, learning_rate=1e-2, save_steps=1),
        hardware=HardwareConfig(device="cpu", threads=1),
    )


def train(config: Config, folder: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[Path, PeftModel]:
    """The saved adapter and the model in memory as it was trained."""
    trained: list[PeftModel] = []
    save = models.save_adapter
    monkeypatch.setattr(models, "save_adapter", lambda model, *rest: (trained.append(model), save(model, *rest)))
    run = Run.create(folder, "recipe: sft\n")
    sft.train(config, run)
    run._lock.close()
    trained[0].get_base_model().set_attn_implementation("sdpa")
    return folder / "sft/adapter", trained[0].eval()


IDS = torch.tensor([[5, 60, 70, 80, 90, 33, 44, 120]])


def logits(model: torch.nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=IDS).logits


@pytest.mark.parametrize("variant", ["lora", "rslora", "dora", "pissa", "eva"])
def test_folds_to_the_model_that_was_trained(variant: str, tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a full-precision base: logits of the merged model against those of the model in training."""
    adapter, trained = train(make_config(tiny_model, variant, "none"), tmp_path / "run", monkeypatch)
    expected, untrained = logits(trained), logits(AutoModelForCausalLM.from_pretrained(tiny_model))
    merge.fold(tiny_model, adapter, tmp_path / "merged")
    merged = logits(AutoModelForCausalLM.from_pretrained(tmp_path / "merged"))
    assert (expected - untrained).abs().max() > 0.01
    torch.testing.assert_close(merged, expected, rtol=1e-3, atol=2e-4)
    loaded = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tiny_model), adapter).eval()
    torch.testing.assert_close(logits(loaded), expected, rtol=1e-3, atol=2e-4)


@pytest.mark.parametrize("variant", ["lora", "dora", "eva"])
def test_trains_on_nf4_and_folds_onto_it(variant: str, tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    adapter, trained = train(make_config(tiny_model, variant, "nf4"), tmp_path / "run", monkeypatch)
    merge.fold(tiny_model, adapter, tmp_path / "merged", onto="nf4")
    merged = logits(AutoModelForCausalLM.from_pretrained(tmp_path / "merged"))
    torch.testing.assert_close(merged, logits(trained), rtol=1e-2, atol=2e-3)


def test_loftq_starts_nearer_to_the_weights_and_is_saved_relative_to_them(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = make_config(tiny_model, "loftq", "nf4", r=16, alpha=16)
    full = logits(AutoModelForCausalLM.from_pretrained(tiny_model))
    choices = hardware.Choices("cpu", "float32", "sdpa", "nf4", ())
    base = models.load_base(tiny_model, config.model, choices)
    base.eval()
    plain = (logits(base) - full).norm()
    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    policy = variants.start(base, tiny_model, config, data.sft_dataset(data.load(config, Run.create(tmp_path / "x", "a: 1")).train, tokenizer, config), [], 0)
    assert (logits(policy.eval()) - full).norm() < 0.9 * plain

    adapter, trained = train(config, tmp_path / "run", monkeypatch)
    saved = load_file(adapter / "adapter_model.safetensors")
    assert {tensor.shape[0] for name, tensor in saved.items() if "lora_A" in name} == {32}, "twice the rank"
    merge.fold(tiny_model, adapter, tmp_path / "merged")
    merged = logits(AutoModelForCausalLM.from_pretrained(tmp_path / "merged"))
    # What training moved is folded exactly; what is left of NF4's error stays behind.
    assert (merged - logits(trained)).norm() < 0.9 * plain + 1e-3


def test_what_cannot_be_is_refused_with_the_reason() -> None:
    with pytest.raises(UserError, match="4-bit weights do not allow. Set model.quantization=none"):
        Config(lora=LoraConfig(variant="pissa"))
    with pytest.raises(UserError, match="Set model.quantization=nf4"):
        Config(lora=LoraConfig(variant="loftq"), model=ModelConfig(quantization="none"))
    with pytest.raises(UserError, match="Set merge.onto=full"):
        Config(lora=LoraConfig(variant="loftq"), merge=MergeConfig(onto="nf4"), stages=["sft", "merge"])
    with pytest.raises(UserError, match="lora.variant=qlora"):
        LoraConfig(variant="qlora")


def test_a_new_token_s_embedding_row_is_trained_and_folded(tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Pain points 2 and 7: a token that the model has never seen is trained along, and the sizes still fit."""
    config = make_config(tiny_model, "lora", "none", train_tokens=["<|im_end|>"])
    adapter, trained = train(config, tmp_path / "run", monkeypatch)
    row = AutoTokenizer.from_pretrained(tiny_model).convert_tokens_to_ids("<|im_end|>")
    merge.fold(tiny_model, adapter, tmp_path / "merged")
    before, after = (AutoModelForCausalLM.from_pretrained(folder) for folder in (tiny_model, tmp_path / "merged"))
    for rows_before, rows_after in (
        (before.get_input_embeddings().weight, after.get_input_embeddings().weight),
        (before.get_output_embeddings().weight, after.get_output_embeddings().weight),
    ):
        assert (rows_before != rows_after).any(1).nonzero().flatten().tolist() == [row]
    torch.testing.assert_close(logits(AutoModelForCausalLM.from_pretrained(tmp_path / "merged")), logits(trained), rtol=1e-3, atol=2e-4)
    config.lora.train_tokens = ["<|endoftext|>"]
    with pytest.raises(UserError, match="padding token"):
        train(config, tmp_path / "padding", monkeypatch)
    config.lora.train_tokens = ["<hint>"]
    with pytest.raises(UserError, match="1 more tokens than the embedding's"):
        train(config, tmp_path / "refused", monkeypatch)


@pytest.mark.parametrize("variant", ["pissa", "loftq"])
def test_a_resumed_run_must_come_to_the_same_start(variant: str, tiny_model: Path, tmp_path: Path) -> None:
    config = make_config(tiny_model, variant, "nf4" if variant == "loftq" else "none")
    choices = hardware.Choices("cpu", "float32", "sdpa", config.model.quantization, ())
    run = Run.create(tmp_path / "run", "recipe: sft\n")
    for attempt in range(3):
        torch.manual_seed(config.seed)
        if attempt == 2:
            config.lora.alpha = 16
        policy = variants.start(models.load_base(tiny_model, config.model, choices), tiny_model, config, [], [], 0)
        packing.prepare(policy.get_base_model(), "batch")
        if attempt < 2:
            assert variants.keep_initial(policy, config.lora, run) == run.dir / "sft/initial_adapter"
        else:
            with pytest.raises(UserError, match="Start a new run"):
                variants.keep_initial(policy, config.lora, run)
