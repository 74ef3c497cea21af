"""The sft stage on a tiny random model: exact accumulation, resume, out of memory, guards, validation, QLoRA against plain peft."""

import json
import logging
import os
import random
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig as PeftLoraConfig
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback

import data_formats
from finetune import data, hardware, models, packing, sft, training
from finetune.config import Config, DataConfig, EvaluateConfig, HardwareConfig, LoraConfig, ModelConfig, SftConfig
from finetune.errors import UserError
from finetune.run import Run


@pytest.fixture(scope="module")
def problems(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """60 sums of different lengths as chats."""
    path = tmp_path_factory.mktemp("data") / "sums.jsonl"
    generator = random.Random(0)
    with open(path, "w", encoding="utf-8") as file:
        for _ in range(60):
            numbers = [generator.randint(1, 99) for _ in range(generator.randint(2, 7))]
            question, answer = " + ".join(map(str, numbers)), sum(numbers)
            chat = [{"role": "user", "content": f"{question} ="}, {"role": "assistant", "content": f"The answer is \\boxed{{{answer}}}."}]
            file.write(json.dumps({"messages": chat, "answer": str(answer)}) + "\n")
    return path


def make_config(model: Path, problems: Path, quantization: str = "none", lora: dict | None = None, **settings: Any) -> Config:
    defaults = {"max_steps": 3, "batch_size": 8, "micro_batch_size": 8, "max_length": 200, "learning_rate": 1e-2, "save_steps": 1, "warmup_steps": 0}
    return Config(
        model=ModelConfig(path=str(model), quantization=quantization, dtype="float32"),
        data=DataConfig(path=str(problems), held_out=10),
        lora=LoraConfig(**{"r": 4, "alpha": 8} | (lora or {})),
        sft=SftConfig(**defaults | settings),
        evaluate=EvaluateConfig(),
        hardware=HardwareConfig(device="cpu", threads=1),
        stages=["sft"],
    )


def train(folder: Path, config: Config) -> dict[str, torch.Tensor]:
    """Run the stage in `folder` (a new run or one that goes on) and return the adapter."""
    run = Run.open(folder) if (folder / "config.yaml").exists() else Run.create(folder, "recipe: sft\n")
    sft.train(config, run)
    run._lock.close()
    return load_file(folder / "sft/adapter/adapter_model.safetensors")


def losses(folder: Path) -> list[float]:
    return [json.loads(line)["loss"] for line in (folder / "metrics.jsonl").read_text().splitlines()]


def assert_close(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor], tolerance: float = 1e-5) -> None:
    assert first.keys() == second.keys()
    for name in first:
        torch.testing.assert_close(first[name], second[name], rtol=1e-3, atol=tolerance, msg=name)


SGD = {"optim": "sgd"}
"""An update proportional to the gradient: Adam's first steps would hide its size."""


def test_accumulated_packed_and_padded_batches_make_the_same_step(tiny_model: Path, problems: Path, tmp_path: Path) -> None:
    """The loss is normalised over the supervised tokens of the whole batch, however it is cut (pain: loss scale under accumulation)."""
    whole = train(tmp_path / "whole", make_config(tiny_model, problems, max_steps=2, learning_rate=1.0, extra=SGD))
    parts = train(tmp_path / "parts", make_config(tiny_model, problems, max_steps=2, micro_batch_size=2, learning_rate=1.0, extra=SGD))
    padded = make_config(tiny_model, problems, max_steps=2, packing="none", micro_batch_size=4, learning_rate=1.0, extra=SGD | {"train_sampling_strategy": "random"})
    assert max(float(tensor.abs().max()) for name, tensor in whole.items() if "lora_B" in name) > 0.01, "nothing was learned"
    assert_close(whole, parts)
    assert_close(whole, train(tmp_path / "padded", padded))
    assert_close(whole, train(tmp_path / "recomputed", make_config(tiny_model, problems, max_steps=2, gradient_checkpointing=True, learning_rate=1.0, extra=SGD)))
    assert losses(tmp_path / "whole") == pytest.approx(losses(tmp_path / "parts"), rel=1e-4)
    rows = [json.loads(line) for line in (tmp_path / "whole/metrics.jsonl").read_text().splitlines()]
    assert rows[1]["supervised_tokens"] < rows[1]["tokens"]


class Act(TrainerCallback):
    """Do something at the end of a step."""

    def __init__(self, step: int, act: Any) -> None:
        self.step, self.act = step, act

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == self.step:
            self.act()


def test_ctrl_c_saves_and_the_resumed_run_equals_the_uninterrupted(
    tiny_model: Path, problems: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Pain point 24: step N+1 after a resume equals the uninterrupted run's, bit for bit."""
    config = make_config(tiny_model, problems, max_steps=4, save_steps=50, lora={"dropout": 0.1})
    expected = train(tmp_path / "uninterrupted", config)
    folder = tmp_path / "interrupted"
    fit = training.fit

    def fit_and_press(trainer: Any, checkpoints: Path) -> None:
        trainer.add_callback(Act(2, lambda: os.kill(os.getpid(), signal.SIGINT)))
        fit(trainer, checkpoints)

    logger = logging.getLogger("finetune")
    monkeypatch.setattr(logger, "propagate", True)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(training, "fit", fit_and_press)
        run = Run.create(folder, "recipe: sft\n")
        sft.train(config, run)
    run._lock.close()
    assert f"resume={folder}" in caplog.text
    stopped = len(losses(folder))
    assert stopped in (2, 3) and (folder / f"sft/checkpoints/checkpoint-{stopped}/{training.MARKER}").exists()
    assert not (folder / "sft/adapter").exists()
    resumed = train(folder, config)
    assert all(torch.equal(resumed[name], expected[name]) for name in expected)
    assert losses(folder) == losses(tmp_path / "uninterrupted")


def test_out_of_memory_halves_the_micro_batch_and_keeps_the_gradient(
    tiny_model: Path, problems: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """The allocator's own error, raised in the middle of a backward pass that has left gradients already."""
    config = make_config(tiny_model, problems, max_steps=2, micro_batch_size=4, learning_rate=1.0, extra=SGD)
    expected = train(tmp_path / "enough", config)
    fit = training.fit

    def fit_with_little_memory(trainer: Any, checkpoints: Path) -> None:
        def backward(module: Any, inputs: Any, outputs: Any) -> None:
            if outputs[0].shape[1] > 120 and trainer.state.global_step == 1:
                torch.empty(1 << 60, dtype=torch.uint8)

        trainer.model.get_base_model().get_decoder().layers[0].mlp.register_full_backward_hook(backward)
        fit(trainer, checkpoints)

    monkeypatch.setattr(training, "fit", fit_with_little_memory)
    monkeypatch.setattr(logging.getLogger("finetune"), "propagate", True)
    found = train(tmp_path / "little", config)
    assert "out of memory at step 2: micro-batches are computed in 2 parts" in caplog.text
    assert_close(found, expected)
    counts = [json.loads((tmp_path / name / "metrics.jsonl").read_text().splitlines()[-1])["supervised_tokens"] for name in ("enough", "little")]
    assert counts[0] == counts[1]


def test_out_of_memory_with_one_example_says_what_to_do(
    tiny_model: Path, problems: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fit = training.fit

    def fit_without_memory(trainer: Any, checkpoints: Path) -> None:
        trainer.model.get_base_model().get_decoder().layers[0].mlp.register_full_backward_hook(lambda *_: torch.empty(1 << 60, dtype=torch.uint8))
        fit(trainer, checkpoints)

    monkeypatch.setattr(training, "fit", fit_without_memory)
    with pytest.raises(UserError, match="one example at a time.*sft.gradient_checkpointing=true, or lower sft.max_length"):
        train(tmp_path / "run", make_config(tiny_model, problems))


def test_a_loss_that_is_not_finite_stops_with_rows_and_checkpoint(tiny_model: Path, problems: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError) as error:
        train(tmp_path / "run", make_config(tiny_model, problems, max_steps=9, learning_rate=1e35, warmup_steps=2, micro_batch_size=2))
    message = str(error.value)
    assert "at step" in message and f"{problems.name}:" in message or "Rows of the worst micro-batch: " in message
    assert "not recorded" not in message and "lower sft.learning_rate" in message
    checkpoint = training.last_checkpoint(tmp_path / "run/sft/checkpoints")
    assert str(checkpoint or "none yet") in message
    if checkpoint:
        kept = load_file(checkpoint / "adapter_model.safetensors")
        assert all(torch.isfinite(tensor).all() for tensor in kept.values()), "a checkpoint after the accident was kept"


def test_the_best_checkpoint_is_kept_and_training_stops_early(tiny_model: Path, problems: Path, tmp_path: Path) -> None:
    """With a learning rate that soon ruins the model, the adapter is an early checkpoint's."""
    config = make_config(
        tiny_model, problems, max_steps=12, validation_size=8, patience=2, best_by="loss", learning_rate=100.0, warmup_steps=3,
        spike_factor=None,
    )
    found = train(tmp_path / "run", config)
    state = json.loads(max((tmp_path / "run/sft/checkpoints").glob("checkpoint-*/trainer_state.json"), key=lambda path: path.stat().st_mtime).read_text())
    validations = {row["step"]: row["eval_loss"] for row in state["log_history"] if "eval_loss" in row}
    best = min(validations, key=validations.__getitem__)
    assert max(validations) < 12 and best == max(validations) - 2, validations
    kept = load_file(tmp_path / f"run/sft/checkpoints/checkpoint-{best}/adapter_model.safetensors")
    assert all(torch.equal(found[name], kept[name]) for name in kept)


def test_validation_by_accuracy_runs_short_answers(tiny_model: Path, problems: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("finetune.validation.MAX_NEW_TOKENS", 4)
    config = make_config(tiny_model, problems, max_steps=1, validation_size=4, best_by="accuracy", quantization="nf4")
    train(tmp_path / "run", config)
    state = json.loads((tmp_path / "run/sft/checkpoints/checkpoint-1/trainer_state.json").read_text())
    assert state["best_metric"] == 0.0
    assert any("eval_loss" in row and row["eval_accuracy"] == 0.0 for row in state["log_history"])


def rows_of(model: Path, problems: Path) -> tuple[list[dict[str, Any]], Config]:
    config = make_config(model, problems)
    tokenizer = AutoTokenizer.from_pretrained(model)
    dataset = data.sft_dataset(list(data_formats.read(str(problems)))[:6], tokenizer, config)
    return [dataset[index] for index in range(len(dataset))], config


def test_nf4_lora_step_equals_plain_peft_and_transformers(tiny_model: Path, problems: Path) -> None:
    """Loss and gradient of a packed QLoRA batch against peft + transformers on the padded batch, 1e-3 relative."""
    rows, config = rows_of(tiny_model, problems)
    choices = hardware.Choices("cpu", "float32", "sdpa", "nf4", ())
    results = []
    for ours in (True, False):
        base = models.load_base(tiny_model, ModelConfig(path=str(tiny_model)), choices)
        torch.manual_seed(0)
        model = get_peft_model(base, PeftLoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM", init_lora_weights=False))
        if ours:
            packing.prepare(base, "batch")
            total, count = sft.nll(model, packing.flatten(rows))
            loss = total / count
        else:
            batch = packing.pad(rows, pad_token_id=0)
            loss = model(**{key: batch[key] for key in ("input_ids", "attention_mask", "labels")}).loss
        loss.backward()
        results.append((loss.detach(), {name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None}))
    (our_loss, ours_gradients), (loss, gradients) = results
    assert abs(our_loss - loss) < 1e-3 * loss
    assert ours_gradients.keys() == gradients.keys() and len(gradients) == 2 * 7 * 2
    for name, gradient in gradients.items():
        assert (ours_gradients[name] - gradient).norm() < 1e-3 * gradient.norm(), name


def test_an_eval_pass_leaves_the_gradients_of_4_bit_layers_alone(tiny_model: Path, problems: Path) -> None:
    """bitsandbytes repacks 4-bit weights on a CPU at the first forward pass in eval mode; the layers before then get no gradient."""
    rows, _ = rows_of(tiny_model, problems)
    batch = packing.pad(rows, pad_token_id=0)
    base = models.load_base(tiny_model, ModelConfig(path=str(tiny_model)), hardware.Choices("cpu", "bfloat16", "sdpa", "nf4", ()))
    torch.manual_seed(0)
    model: PeftModel = get_peft_model(base, PeftLoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM", init_lora_weights=False))
    gradients = []
    for _ in range(2):
        model.train()
        model.zero_grad()
        sft.nll(model, batch)[0].backward()
        gradients.append({name: parameter.grad.clone() for name, parameter in model.named_parameters() if parameter.grad is not None})
        model.eval()
        with torch.no_grad():
            model(input_ids=batch["input_ids"])
    assert all(torch.equal(gradients[0][name], gradients[1][name]) for name in gradients[0])


def test_a_model_whose_loss_is_not_what_we_compute_is_refused(tiny_model: Path, problems: Path) -> None:
    """A model that scales its logits after the LM head (Cohere, Granite) would train on another loss."""
    rows, config = rows_of(tiny_model, problems)
    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    dataset = data.sft_dataset(list(data_formats.read(str(problems)))[:6], tokenizer, config)
    base = AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32)
    model = get_peft_model(base, PeftLoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM"))
    packing.prepare(base, "batch")
    sft.verify_loss(model, dataset, packing.flatten)
    base.get_output_embeddings().register_forward_hook(lambda module, inputs, output: output * 50)
    with pytest.raises(UserError, match="this architecture .llama. is not supported"):
        sft.verify_loss(model, dataset, packing.flatten)


def test_adapters_train_in_fp32_on_a_bf16_base(tiny_model: Path, problems: Path, tmp_path: Path) -> None:
    """Pain point 15: TRL casts them to the base's dtype; a GradScaler then raises, and small updates are lost."""
    config = make_config(tiny_model, problems, max_steps=1, quantization="nf4")
    config.model.dtype = "bfloat16"
    adapter = train(tmp_path / "run", config)
    assert {tensor.dtype for tensor in adapter.values()} == {torch.float32}
    moved = [tensor for name, tensor in adapter.items() if "lora_B" in name]
    assert all((tensor != tensor.bfloat16().float()).any() for tensor in moved), "rounded to bf16"


def test_lora_plus_and_neftune(tiny_model: Path, problems: Path, tmp_path: Path) -> None:
    plain = train(tmp_path / "plain", make_config(tiny_model, problems, max_steps=1))
    plus = train(tmp_path / "plus", make_config(tiny_model, problems, max_steps=1, loraplus_ratio=4.0))
    for name in plain:
        if "lora_B" in name:  # begins at 0
            assert plain[name].abs().max() > 0
            torch.testing.assert_close(plus[name], 4 * plain[name], rtol=1e-3, atol=1e-6)
        else:
            assert torch.equal(plus[name], plain[name])
    noisy = train(tmp_path / "noisy", make_config(tiny_model, problems, max_steps=1, packing="none", neftune_alpha=5.0))
    quiet = train(tmp_path / "quiet", make_config(tiny_model, problems, max_steps=1, packing="none"))
    assert any(not torch.equal(noisy[name], quiet[name]) for name in quiet)
    with pytest.raises(UserError, match="Set sft.packing=none"):
        SftConfig(neftune_alpha=5.0)


def test_a_row_that_supervises_no_end_is_refused(tiny_model: Path, problems: Path) -> None:
    """Pain points 1 and 22: pad may equal EOS and the template may lack a generation block, the EOS is supervised all the same."""
    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    tokenizer.pad_token = tokenizer.eos_token
    assert "generation %}" not in tokenizer.chat_template
    config = make_config(tiny_model, problems)
    examples = list(data_formats.read(str(problems)))[:4]
    dataset = data.sft_dataset(examples, tokenizer, config)
    for row in dataset:
        assert row["labels"][-2] == tokenizer.eos_token_id or row["labels"][-1] == tokenizer.eos_token_id
    batch = packing.pad([dataset[index] for index in range(4)], tokenizer.pad_token_id)
    assert int((batch["labels"] == tokenizer.eos_token_id).sum()) == 4
    tokenizer.chat_template = "{% for message in messages %}{{ message['content'] + '\n' }}{% endfor %}"
    with pytest.raises(UserError, match="does not end an assistant turn with EOS"):
        data.sft_dataset(examples, tokenizer, config)


def test_nothing_is_cut_silently(tiny_model: Path, problems: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    """Pain point 21: TRL cuts the end off at max_length 1024, labels all -100 and loss 0; here every left-out row is counted."""
    monkeypatch.setattr(logging.getLogger("finetune"), "propagate", True)
    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    examples = list(data_formats.read(str(problems)))
    config = make_config(tiny_model, problems, max_length=44)
    with caplog.at_level(logging.INFO, logger="finetune"):
        kept = data.sft_dataset(examples, tokenizer, config)
    assert max(kept["length"]) <= 44 and 0 < len(kept) < 60
    assert f"{60 - len(kept)} left out in whole or in part" in caplog.text
    cut = data.sft_dataset(examples, tokenizer, make_config(tiny_model, problems, max_length=44, over_length="truncate_prompt"))
    assert len(cut) == 60 and all(tokenizer.eos_token_id in row["labels"] for row in cut)
    with pytest.raises(UserError, match=f"{60 - len(kept)} examples are longer than sft.max_length=44"):
        data.sft_dataset(examples, tokenizer, make_config(tiny_model, problems, max_length=44, over_length="error"))
    with pytest.raises(UserError, match="no example is left to train on"):
        data.sft_dataset(examples, tokenizer, make_config(tiny_model, problems, max_length=5))
