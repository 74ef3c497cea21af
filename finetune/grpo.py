"""Group relative policy optimisation (DeepSeekMath, arXiv 2402.03300, section 4): TRL's GRPOTrainer on the SFT adapter."""

import logging
from typing import Any

import torch
from trl import GRPOConfig, GRPOTrainer

from finetune import data, diagnosis, generation, hardware, models, training
from finetune.config import Config
from finetune.rewards import guard
from finetune.rollout import DensePolicy
from finetune.run import Result, Run

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


class Trainer(GRPOTrainer):
    """GRPOTrainer that samples from a dense copy of the policy and counts tokens."""

    def __init__(self, *args: Any, metrics: training.Metrics, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.metrics = metrics
        self.dense: DensePolicy | None = None
        self.dense_step = -1

    def _generate_single_turn(
        self, prompt_ids: list[list[int]], images: Any, multimodal_fields: Any, num_generations: int, has_tool_images: bool = False
    ) -> tuple[list[list[int]], None]:
        """Sample one completion for each entry of `prompt_ids` (prompts come repeated) from the refreshed dense copy."""
        if self.dense is None:
            self.dense = DensePolicy(self.accelerator.unwrap_model(self.model))
        elif self.dense_step != self.state.global_step:
            self.dense.refresh()
        self.dense_step = self.state.global_step
        completions = generation.generate(
            self.dense.model, self.processing_class, prompt_ids, max_new_tokens=self.max_completion_length,
            batch_size=len(prompt_ids), temperature=self.temperature, top_p=self.top_p, top_k=self.top_k,
        )
        if self.model.training:
            sampled = sum(len(completion.ids) for completion in completions)
            self.metrics.count(sum(map(len, prompt_ids)) + sampled, sampled)
        return [completion.ids for completion in completions], None


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

    torch.manual_seed(config.seed)
    start = models.start_adapter(config, run)
    model = models.load_base(base, config.model, choices)
    # A PeftModel, not a peft_config: TRL then keeps a frozen copy of the adapter as reference, not the bare base.
    policy = models.load_adapter(model, start, trainable=True) if start else models.new_adapter(model, config.lora)
    log.info("grpo: starts from %s", start or "a new adapter on the base")
    checkpoints = run.path("grpo/checkpoints")
    settings = config.grpo
    arguments = training.trainer_arguments(config, settings, choices, checkpoints) | {
        "num_generations": settings.group_size,
        "max_completion_length": settings.max_completion_length,
        "temperature": settings.temperature,
        "top_k": 0,
        "reward_weights": list(settings.rewards.values()),
        "remove_unused_columns": False,
    }
    metrics = training.Metrics(run, "grpo")
    with models.fp32_adapter(policy):
        trainer = Trainer(
            model=policy,
            args=GRPOConfig(**arguments | PRESETS[settings.preset] | settings.extra),
            reward_funcs=functions,
            train_dataset=dataset,
            processing_class=tokenizer,
            callbacks=[metrics, training.CheckpointMarker()],
            metrics=metrics,
        )
    with diagnosis.checkpoint_on_failure(trainer):
        training.fit(trainer, checkpoints)
    with run.output("grpo/adapter") as folder:
        models.save_adapter(trainer.model, tokenizer, folder)
    inputs = {"base": base} | ({"adapter": start} if start else {}) | data.inputs(config, run)
    return Result(inputs, ["grpo/adapter"], training.peak_gpu_memory())
