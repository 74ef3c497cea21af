"""Group relative policy optimisation (DeepSeekMath, arXiv 2402.03300, section 4): TRL's GRPOTrainer on the SFT adapter."""

import logging
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from trl import GRPOConfig
from trl.rewards import get_soft_overlong_punishment

from finetune import curriculum, data, diagnosis, golden, hardware, models, rollout, training
from finetune.config import Config, GrpoConfig
from finetune.errors import UserError
from finetune.grpo_trainer import RefreshReference, Trainer
from finetune.rewards import guard
from finetune.run import Result, Run
from finetune.samples import Samples

log = logging.getLogger("finetune")

PRESETS: dict[str, dict[str, Any]] = {
    # DeepSeekMath: k3 estimator without bias correction, advantages over the group's standard deviation, one update a rollout.
    "paper": {
        "loss_type": "grpo", "scale_rewards": "group", "beta": 0.04, "use_bias_correction_kl": False,
        "num_iterations": 1, "epsilon": 0.2,
    },
    # DAPO (arXiv 2503.14476): token-level loss, clip-higher, no KL, cut-off completions out of the loss.
    "dapo": {
        "loss_type": "dapo", "scale_rewards": "group", "beta": 0.0, "num_iterations": 1, "epsilon": 0.2, "epsilon_high": 0.28,
        "mask_truncated_completions": True,
    },
    # Dr. GRPO (arXiv 2503.20783): no division by the length nor by the standard deviation.
    "dr_grpo": {"loss_type": "dr_grpo", "scale_rewards": "none", "beta": 0.0, "num_iterations": 1, "epsilon": 0.2},
    # GSPO (arXiv 2507.18071): one importance ratio a sequence; epsilons of the paper's section 5.1.
    "gspo": {
        "loss_type": "grpo", "importance_sampling_level": "sequence", "scale_rewards": "group", "beta": 0.0,
        "num_iterations": 1, "epsilon": 3e-4, "epsilon_high": 4e-4,
    },
    # CISPO (MiniMax-M1, arXiv 2506.13585): the clipped ratio weights the log-probability and is not differentiated.
    "cispo": {"loss_type": "cispo", "scale_rewards": "group", "beta": 0.0, "num_iterations": 1, "epsilon_high": 5.0},
}
"""The TRL arguments of each objective (trl.GRPOConfig)."""


def train(config: Config, run: Run) -> Result:
    """The grpo stage: the SFT adapter goes on as the policy; where beta > 0 its frozen copy is the reference, never the base.

    Writes `grpo/adapter`. Raises UserError where there is no gold answer, no known reward, or the loss is not finite.
    """
    choices = hardware.choose(config, hardware.detect())
    training.prepare_machine(config, choices)
    base = models.resolve(config.model.path)
    tokenizer = models.load_tokenizer(base, config.model)
    dataset = data.grpo_dataset(data.load(config, run).train, config)
    functions = guard.guarded(config.grpo.rewards, config.grpo.reward_seconds)
    dataset = golden.golden_check(dataset, functions, config.grpo)

    torch.manual_seed(config.seed)
    start = models.start_adapter(config, run)
    model = models.load_base(base, config.model, choices)
    # A PeftModel, not a peft_config: TRL then keeps a frozen copy of the adapter as reference, not the bare base.
    policy = models.load_adapter(model, start, trainable=True) if start else models.new_adapter(model, config.lora)
    log.info("grpo: starts from %s", start or "a new adapter on the base")
    checkpoints = run.path("grpo/checkpoints")
    settings = config.grpo
    engine, reason = rollout.choose(policy, settings.engine)
    log.info("grpo: samples from %s: %s", engine, reason)
    sampler = rollout.sampling_model(policy, engine)
    diagnosis.probe(sampler, tokenizer, dataset, functions, config, run)
    ordered = order(dataset, sampler, tokenizer, config, run)
    del sampler  # the trainer makes its own; two copies would not fit where one just does
    metrics, watch = training.Metrics(run, "grpo"), diagnosis.Watch(run, settings)
    punished = overlong(settings)
    paid = settings.rewards | {function.__name__: 1.0 for function in punished}
    with models.fp32_adapter(policy):
        trainer = Trainer(
            model=policy,
            args=GRPOConfig(**trainer_arguments(config, choices, checkpoints)),
            reward_funcs=functions + punished,
            train_dataset=ordered,
            processing_class=tokenizer,
            callbacks=[metrics, watch, training.CheckpointMarker()] + ([RefreshReference(settings)] if settings.iterations > 1 else []),
            metrics=metrics,
            samples=Samples(run, paid, settings.group_size, settings.max_steps, Console(stderr=True)),
            settings=settings,
            engine=engine,
        )
    with diagnosis.checkpoint_on_failure(trainer):
        training.fit(trainer, checkpoints)
    watch.conclude()
    with run.output("grpo/adapter") as folder:
        models.save_adapter(trainer.model, tokenizer, folder)
    inputs = {"base": base} | ({"adapter": start} if start else {}) | data.inputs(config, run)
    return Result(inputs, ["grpo/adapter"], training.peak_gpu_memory())


def trainer_arguments(config: Config, choices: hardware.Choices, checkpoints: Path) -> dict[str, Any]:
    """Arguments of trl.GRPOConfig: the common ones, the preset's, then grpo.extra's.

    Raises UserError where they contradict each other.
    """
    settings = config.grpo
    arguments = training.trainer_arguments(config, settings, choices, checkpoints) | {
        "num_generations": settings.group_size,
        "max_completion_length": settings.max_completion_length,
        "temperature": settings.temperature,
        "top_k": 0,
        "reward_weights": list(settings.rewards.values()) + [1.0] * len(overlong(settings)),
        "remove_unused_columns": False,
        "shuffle_dataset": False,  # curriculum.prompt_order has seen to it
        "disable_dropout": True,  # what is sampled from must be what is trained
    }
    arguments |= PRESETS[settings.preset] | settings.extra
    if arguments.get("use_vllm"):
        raise UserError("grpo.extra.use_vllm=true: TRL hands its weights over through 4 bits. Leave it out; see grpo.engine.")
    if settings.iterations > 1 and not arguments["beta"]:
        raise UserError(
            f"grpo.iterations={settings.iterations}: needs a reference, and grpo.preset={settings.preset} has none (beta 0). "
            "Use grpo.preset=paper, or set grpo.extra.beta."
        )
    updates = arguments["num_iterations"]
    if settings.save_steps % updates:
        raise UserError(
            f"grpo.save_steps={settings.save_steps}: expected a multiple of grpo.extra.num_iterations={updates}, so that a resumed run "
            "samples where the first one did."
        )
    return arguments


def overlong(settings: GrpoConfig) -> list[Any]:
    """DAPO's soft overlong punishment (arXiv 2503.14476, equation 13) where it is asked for."""
    if not settings.overlong_buffer:
        return []
    punish = get_soft_overlong_punishment(settings.max_completion_length, settings.overlong_buffer)

    def overlong_punishment(completion_ids: list[list[int]], **columns: Any) -> list[float]:
        return punish(completion_ids=completion_ids)

    return [overlong_punishment]


def order(dataset: Any, sampler: Any, tokenizer: Any, config: Config, run: Run) -> Any:
    """The data in the order of training, one row for each prompt of each step; by pass rates where they are asked for."""
    settings, rates = config.grpo, None
    if settings.pass_samples:
        rates = curriculum.pass_rates(sampler, tokenizer, dataset, settings, config.seed, run)
        kept = curriculum.fitting(rates, settings)
        dataset, rates = dataset.select(kept), [rates[index] for index in kept]
    return dataset.select(
        curriculum.prompt_order(
            len(dataset), settings.batch_size // settings.group_size, settings.max_steps, config.seed, settings.iterations,
            settings.replay, rates if settings.easy_first else None,
        )
    )
