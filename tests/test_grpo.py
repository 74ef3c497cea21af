"""GRPO against the formulas of the papers, worked out by hand in float64 on a tiny model."""

from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, PeftModel, get_peft_model
from rich.console import Console
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerBase
from transformers.trainer_utils import SaveStrategy
from trl import GRPOConfig

from finetune import grpo, process, training
from finetune.config import GrpoConfig
from finetune.grpo_trainer import RefreshReference, Trainer, refresh_reference
from finetune.run import Run
from finetune.samples import Samples

GROUP, LENGTH, STEPS = 4, 12, 2


def varied(completion_ids: list[list[int]], **columns: Any) -> list[float]:
    """A reward that differs between any two completions and depends on nothing else."""
    return [(sum(ids) % 7) / 7 for ids in completion_ids]


def constant(completion_ids: list[list[int]], **columns: Any) -> list[float]:
    """A reward under which no group has variance."""
    return [1.0 for _ in completion_ids]


def by_prompt(completion_ids: list[list[int]], kind: list[str], **columns: Any) -> list[float]:
    """No variance on prompts of kind `flat`, some on the others."""
    return [0.5 if name == "flat" else (sum(ids) % 7) / 7 for ids, name in zip(completion_ids, kind, strict=True)]


def rows(count: int = 8) -> Dataset:
    return Dataset.from_list(
        [
            {"prompt": [{"role": "user", "content": f"{index} + 3 = " + "1" * (index % 3)}], "answer": str(index + 3), "answer_type": "",
             "id": f"row-{index}", "kind": "flat" if index % 2 else "varied"}
            for index in range(count)
        ]
    )


def policy_with_adapter(folder: Path) -> PeftModel:
    """The tiny model with an adapter that is not zero, as after SFT."""
    torch.manual_seed(0)
    model = get_peft_model(
        AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32),
        LoraConfig(r=4, lora_alpha=8, target_modules="all-linear", task_type="CAUSAL_LM"),
    )
    generator = torch.Generator().manual_seed(1)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.data = 0.05 * torch.randn(parameter.shape, generator=generator)
    return model


class Recorder(Trainer):
    """Keeps what each optimizer step saw: the batch, the adapter before it, the loss and the gradient."""

    def _compute_loss(self, model: Any, inputs: dict[str, Any]) -> torch.Tensor:
        before = {name: parameter.detach().double() for name, parameter in model.named_parameters() if ".default." in name}
        loss = super()._compute_loss(model, inputs)
        trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
        gradient = torch.autograd.grad(loss, trainable, retain_graph=True, allow_unused=True)
        self.records.append((inputs, before, loss.detach(), gradient, self.current_gradient_accumulation_steps))
        return loss


def trainer(
    folder: Path, tmp_path: Path, preset: str, reward: Any = varied, extra: dict[str, Any] | None = None, kind: type[Trainer] = Recorder,
    data: Dataset | None = None, batch: int = 2 * GROUP, micro: int = GROUP, **settings: Any,
) -> Trainer:
    """A trainer on the tiny model with the preset's arguments and a learning rate that moves the policy visibly."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    run = Run.create(tmp_path / "run", "made")
    config = GrpoConfig(preset=preset, group_size=GROUP, max_completion_length=LENGTH, max_steps=STEPS, batch_size=batch,
                        micro_batch_size=micro, **settings)
    arguments = GRPOConfig(
        output_dir=str(tmp_path / "checkpoints"), max_steps=config.max_steps, learning_rate=2e-2, per_device_train_batch_size=micro,
        gradient_accumulation_steps=batch // micro, num_generations=GROUP, max_completion_length=LENGTH, temperature=0.9, top_k=0,
        max_grad_norm=0.0, bf16=False, use_cpu=True, report_to="none", save_strategy="no", disable_tqdm=True, seed=3,
        remove_unused_columns=False, shuffle_dataset=False, gradient_checkpointing=False, logging_steps=1,
        **grpo.PRESETS[preset] | (extra or {}),
    )
    made = kind(
        model=policy_with_adapter(folder), args=arguments, reward_funcs=[reward], train_dataset=data or rows(),
        processing_class=tokenizer, metrics=training.Metrics(run, "grpo"), settings=config, engine="dense",
        samples=Samples(run, {"reward": 1.0}, GROUP, STEPS, Console(quiet=True)),
        callbacks=[RefreshReference(config)] if config.iterations > 1 else [],
    )
    made.records = []
    return made


def by_hand(folder: Path, record: tuple, preset: str, temperature: float, reference: dict[str, torch.Tensor]) -> tuple[torch.Tensor, list]:
    """Loss and gradient of one micro-batch from the papers' formulas in float64, by peft's own forward pass.

    On-policy, as all presets are: pi_old is the policy itself, without its gradient.
    """
    inputs, before, _, _, accumulation = record
    model = policy_with_adapter(folder).double()
    ids = torch.cat([inputs["prompt_ids"], inputs["completion_ids"]], 1)
    mask = torch.cat([inputs["prompt_mask"], inputs["completion_mask"]], 1)
    shown, length = inputs["completion_mask"].double(), inputs["completion_ids"].shape[1]

    def logps(weights: dict[str, torch.Tensor]) -> torch.Tensor:
        for name, parameter in model.named_parameters():
            if name in weights:
                parameter.data = weights[name].clone()
        position = (mask.cumsum(1) - 1).clamp(min=0)
        logits = model(input_ids=ids, attention_mask=mask, position_ids=position).logits[:, -length - 1 : -1] / temperature
        return logits.log_softmax(-1).gather(2, inputs["completion_ids"][..., None])[..., 0]

    with torch.no_grad():
        frozen = logps(reference)
    log_pi = logps(before)
    advantages = inputs["advantages"].double()
    advantages = advantages[:, None] if advantages.dim() == 1 else advantages
    ratio = (log_pi - log_pi.detach()).exp()
    if preset == "paper":
        kl = (frozen - log_pi).exp() - (frozen - log_pi) - 1
        objective = torch.minimum(ratio * advantages, ratio.clamp(0.8, 1.2) * advantages) - 0.04 * kl
        loss = -((objective * shown).sum(1) / shown.sum(1)).mean() / accumulation
    elif preset == "dapo":
        objective = torch.minimum(ratio * advantages, ratio.clamp(0.8, 1.28) * advantages)
        loss = -(objective * shown).sum() / inputs["num_items_in_batch"]
    elif preset == "dr_grpo":
        objective = torch.minimum(ratio * advantages, ratio.clamp(0.8, 1.2) * advantages)
        loss = -(objective * shown).sum() / (len(ids) * LENGTH) / accumulation
    elif preset == "gspo":
        ratio = (((log_pi - log_pi.detach()) * shown).sum(1, keepdim=True) / shown.sum(1, keepdim=True)).exp()
        objective = torch.minimum(ratio * advantages, ratio.clamp(1 - 3e-4, 1 + 4e-4) * advantages)
        loss = -((objective * shown).sum(1) / shown.sum(1)).mean() / accumulation
    else:  # cispo
        loss = -(ratio.clamp(max=5.0).detach() * advantages * log_pi * shown).sum() / inputs["num_items_in_batch"]
    return loss.detach(), list(torch.autograd.grad(loss, [p for p in model.parameters() if p.requires_grad]))


def adapter(model: torch.nn.Module, name: str = "default") -> dict[str, torch.Tensor]:
    """The weights of one adapter in float64, under the names of `default`."""
    return {
        key.replace(f".{name}.", ".default."): value.detach().double().clone()
        for key, value in model.named_parameters() if f".{name}." in key
    }


# An untrained model never ends a completion by itself, and DAPO would leave all of them out.
UNMASKED = {"dapo": {"mask_truncated_completions": False}}


@pytest.mark.parametrize("preset", sorted(grpo.PRESETS))
def test_preset_loss_and_gradient_equal_the_formulas(tiny_model: Path, tmp_path: Path, preset: str) -> None:
    made = trainer(tiny_model, tmp_path, preset, extra=UNMASKED.get(preset))
    start = adapter(made.model)
    made.train()
    assert len(made.records) == STEPS * 2
    moved = max(float((made.records[-1][1][name] - value).abs().max()) for name, value in start.items())
    assert moved > 1e-2, "the second step must not repeat the first"
    for record in made.records:
        loss, gradient = by_hand(tiny_model, record, preset, 0.9, start)
        assert abs(float(record[2]) - float(loss)) < 1e-5
        largest = max(float(part.abs().max()) for part in gradient)
        assert largest > 1e-4
        for found, expected in zip(record[3], gradient, strict=True):
            assert float((found.double() - expected).abs().max()) < 1e-5 * max(1.0, largest)


def test_advantages_are_the_groups_normalised_rewards(tiny_model: Path, tmp_path: Path) -> None:
    made = trainer(tiny_model, tmp_path, "paper")
    made.train()
    for inputs, *_ in made.records:
        earned = torch.tensor(varied([ids[: sum(mask)] for ids, mask in zip(
            inputs["completion_ids"].tolist(), inputs["completion_mask"].tolist(), strict=True)]), dtype=torch.float64)
        expected = (earned - earned.mean()) / (earned.std() + 1e-4)
        torch.testing.assert_close(inputs["advantages"].double(), expected, atol=1e-5, rtol=0)


def test_pain_point_20_reference_is_the_sft_adapter_and_kl_starts_at_zero(tiny_model: Path, tmp_path: Path) -> None:
    made = trainer(tiny_model, tmp_path, "paper")
    start = adapter(made.model)
    for name, value in adapter(made.model, "ref").items():
        assert torch.equal(value, start[name])
    made.train()
    kls = [row["kl"] for row in made.state.log_history if "kl" in row]
    assert kls[0] == 0.0 and kls[1] > 0
    for name, value in adapter(made.model, "ref").items():
        assert torch.equal(value, start[name])


def test_kl_is_zero_right_after_each_refresh(tiny_model: Path, tmp_path: Path) -> None:
    made = trainer(tiny_model, tmp_path, "paper", iterations=2)
    made.settings.max_steps = made.args.max_steps = 4
    made.train()
    kls = [row["kl"] for row in made.state.log_history if "kl" in row]
    assert kls[0] == kls[2] == 0.0 and kls[1] > 0 and kls[3] > 0
    assert any(not torch.equal(value, adapter(made.model)[name]) for name, value in adapter(made.model, "ref").items())
    refresh_reference(made.model)
    for name, value in adapter(made.model, "ref").items():
        assert torch.equal(value, adapter(made.model)[name])


def lengths(steps: list[list[str]], **columns: Any) -> list[list[float | None]]:
    """A verifier for noise: the length of a line, none for a line of one character."""
    return [[len(text) / 10 if len(text) != 1 else None for text in texts] for texts in steps]


def test_process_supervision_equals_the_formula(tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(process, "find", lambda name: lengths)
    # An untrained model writes few newlines.
    tokens = AutoTokenizer.from_pretrained(tiny_model)
    monkeypatch.setattr(process, "split", lambda tokenizer, ids: split_every_third(tokens, ids))
    made = trainer(tiny_model, tmp_path, "paper", process="lengths")
    start = adapter(made.model)
    made.train()
    for record in made.records:
        inputs = record[0]
        ids = [row[: sum(mask)] for row, mask in zip(inputs["completion_ids"].tolist(), inputs["completion_mask"].tolist(), strict=True)]
        rewards, ends = [], []
        for row, outcome in zip(ids, varied(ids), strict=True):
            steps = split_every_third(tokens, row)
            given = [(reward, step.end) for reward, step in zip(lengths([[s.text for s in steps]])[0], steps, strict=True) if reward is not None]
            rewards.append([reward for reward, _ in given] + [outcome])
            ends.append([end for _, end in given] + [len(row) - 1])
        pool = torch.tensor([reward for own in rewards for reward in own], dtype=torch.float64)
        expected = torch.zeros(inputs["completion_ids"].shape, dtype=torch.float64)
        for index, (own, last) in enumerate(zip(rewards, ends, strict=True)):
            for token in range(expected.shape[1]):
                expected[index, token] = sum(
                    (reward - pool.mean()) / (pool.std() + 1e-4) for reward, end in zip(own, last, strict=True) if end >= token
                )
        torch.testing.assert_close(inputs["advantages"].double(), expected, atol=1e-5, rtol=0)
        loss, gradient = by_hand(tiny_model, record, "paper", 0.9, start)
        assert abs(float(record[2]) - float(loss)) < 1e-5
        for found, wanted in zip(record[3], gradient, strict=True):
            assert float((found.double() - wanted).abs().max()) < 1e-5 * max(1.0, float(wanted.abs().max()))


def split_every_third(tokenizer: PreTrainedTokenizerBase, ids: list[int]) -> list[process.Step]:
    ends = sorted({*range(2, len(ids), 3), len(ids) - 1})
    return [process.Step(tokenizer.decode(ids[max(0, end - 2) : end + 1]), end) for end in ends]


class Whole(Recorder):
    """Takes a micro-batch as a whole, with what teaches nothing in it."""

    def _compute_loss(self, model: Any, inputs: dict[str, Any]) -> torch.Tensor:
        count = len(inputs["completion_ids"])
        self.taught.append((int(inputs["advantages"].view(count, -1).ne(0).any(1).sum()), count))
        return super()._compute_loss(model, inputs)


@pytest.mark.parametrize("preset", ["dapo", "dr_grpo", "gspo", "cispo"])
def test_groups_without_variance_cost_no_forward_pass_and_change_nothing(tiny_model: Path, tmp_path: Path, preset: str) -> None:
    made = trainer(tiny_model, tmp_path, preset, reward=by_prompt, extra=UNMASKED.get(preset), micro=2 * GROUP, kind=Whole)
    made.taught, scored = [], []
    original = made._get_per_token_logps_and_entropies

    def counted(model: Any, input_ids: torch.Tensor, *arguments: Any, **options: Any) -> Any:
        scored.append(len(input_ids))
        return original(model, input_ids, *arguments, **options)

    made._get_per_token_logps_and_entropies = counted
    start = adapter(made.model)
    made.train()
    # One of the two groups of each step has no variance; in the other, a reward may equal the mean.
    assert all(0 < learning <= GROUP and count == 2 * GROUP for learning, count in made.taught)
    assert scored == [learning for learning, _ in made.taught]
    for record in made.records:
        loss, gradient = by_hand(tiny_model, record, preset, 0.9, start)
        assert abs(float(record[2]) - float(loss)) < 1e-5
        for found, wanted in zip(record[3], gradient, strict=True):
            assert float((found.double() - wanted).abs().max()) < 1e-5 * max(1.0, float(wanted.abs().max()))


def test_a_batch_without_any_variance_leaves_the_policy_alone(tiny_model: Path, tmp_path: Path) -> None:
    made = trainer(tiny_model, tmp_path, "dr_grpo", reward=constant, kind=Trainer)
    start = adapter(made.model)
    made.train()
    assert all(torch.equal(value, start[name]) for name, value in adapter(made.model).items())


def test_dynamic_sampling_replaces_groups_within_its_rounds_and_counts_them(tiny_model: Path, tmp_path: Path) -> None:
    made = trainer(tiny_model, tmp_path, "dr_grpo", reward=by_prompt, dynamic_sampling=12)
    made.train()
    logged = [row for row in made.state.log_history if "replaced_groups" in row]
    assert len(logged) == STEPS and all(row["replaced_groups"] >= 1 for row in logged)
    assert all(row["frac_reward_zero_std"] == 0 for row in logged)
    assert all(inputs["advantages"].ne(0).any(-1).all() for inputs, *_ in made.records)


def test_dynamic_sampling_is_bounded(tiny_model: Path, tmp_path: Path) -> None:
    made = trainer(tiny_model, tmp_path, "dr_grpo", reward=constant, dynamic_sampling=3, kind=Trainer)
    made.train()
    logged = [row for row in made.state.log_history if "replaced_groups" in row]
    assert [row["replaced_groups"] for row in logged] == [6, 6]
    assert all(row["frac_reward_zero_std"] == 1 for row in logged)


def test_sampling_and_training_agree_at_each_step(tiny_model: Path, tmp_path: Path) -> None:
    made = trainer(tiny_model, tmp_path, "dr_grpo")
    made.train()
    assert all(abs(row["rollout_kl"]) < 1e-6 for row in made.state.log_history if "rollout_kl" in row)


def test_a_resumed_run_ends_with_the_same_adapter(tiny_model: Path, tmp_path: Path) -> None:
    """With outer iterations and dynamic sampling, resumed in the second iteration, whose reference comes from the checkpoint."""
    def made(folder: Path) -> Trainer:
        new = trainer(tiny_model, folder, "paper", reward=by_prompt, kind=Trainer, iterations=2, dynamic_sampling=1)
        new.settings.max_steps = new.args.max_steps = 4
        new.args.save_strategy, new.args.save_steps, new.state.save_steps = SaveStrategy.STEPS, 3, 3
        return new

    whole = made(tmp_path / "whole")
    whole.train()
    resumed = made(tmp_path / "resumed")
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole/checkpoints/checkpoint-3"))
    for name in ("default", "ref"):
        expected = adapter(whole.model, name)
        assert all(torch.equal(value, expected[key]) for key, value in adapter(resumed.model, name).items())
    assert [row["kl"] for row in resumed.state.log_history if "kl" in row][-1] > 0


def test_overlong_punishment_falls_over_the_buffer() -> None:
    (punish,) = grpo.overlong(GrpoConfig(max_completion_length=10, overlong_buffer=4))
    assert punish(completion_ids=[[0] * 6, [0] * 8, [0] * 10]) == [0.0, -0.5, -1.0]
    assert grpo.overlong(GrpoConfig()) == []
