"""TRL's GRPOTrainer with our sampling, scoring, process supervision and dynamic sampling."""

import logging
from typing import Any

import torch
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from trl import GRPOTrainer
from trl.trainer.utils import split_tensor_dict

from finetune import curriculum, generation, process, scoring, training
from finetune.config import GrpoConfig
from finetune.errors import UserError
from finetune.rollout import DensePolicy
from finetune.samples import Samples

log = logging.getLogger("finetune")

MEAN_OVER_ROWS = {"grpo": True, "dr_grpo": True, "dapo": False, "cispo": False}
"""Whether TRL's loss is a mean over the completions of a micro-batch (True) or a sum over a fixed number of tokens."""


class Trainer(GRPOTrainer):
    """GRPOTrainer that samples from and scores with a dense copy of the policy, and works only where there is something to learn.

    The objective is TRL's own `_compute_loss`. What differs: completions come from finetune.generation, log-probabilities from
    finetune.scoring, completions whose gradient is zero are left out of the forward pass, groups without variance may be
    replaced (`dynamic_sampling`), and advantages may come from steps (`process`).
    """

    def __init__(
        self, *args: Any, metrics: training.Metrics, samples: Samples, settings: GrpoConfig, engine: str, **kwargs: Any
    ) -> None:
        super().__init__(*args, **kwargs)
        self.metrics, self.samples = metrics, samples
        self.settings = settings
        self.verifier = process.find(settings.process) if settings.process else None
        self.dense: DensePolicy | None = None
        self.engine = engine
        self.scores_densely = False
        self.rows: list[dict[str, Any]] = []
        self.known_rewards: torch.Tensor | None = None
        self.sampled: tuple[Any, list[list[int]], torch.Tensor] = ([], [], torch.empty(0))
        self.last_logps = torch.empty(0)
        self.micro_batches: list[dict[str, Any]] = []
        if settings.dynamic_sampling and self.accelerator.num_processes > 1:
            raise UserError(f"grpo.dynamic_sampling={settings.dynamic_sampling}: works in one process only. Set it to 0.")

    # -- sampling -------------------------------------------------------------------------------------------------------

    def sampler(self) -> Any:
        """The model to sample from, with the policy's present weights."""
        policy = self.accelerator.unwrap_model(self.model)
        if self.engine == "policy":
            return policy
        if self.dense is None:
            self.dense = DensePolicy(policy)
            self.scores_densely = (
                self.dense.trains and self.accelerator.num_processes == 1 and not self._entropy_bonus_enabled
                and scoring.has_plain_head(self.dense.model)
            )
            if self.args.gradient_checkpointing:
                self.dense.model.gradient_checkpointing_enable({"use_reentrant": False})
            log.debug("grpo: log-probabilities come from %s", "the dense copy" if self.scores_densely else "the policy, by TRL")
        self.dense.hold("default", self.state.global_step)
        return self.dense.model

    def _generate_single_turn(
        self, prompt_ids: list[list[int]], images: Any, multimodal_fields: Any, num_generations: int, has_tool_images: bool = False
    ) -> tuple[list[list[int]], list[list[float]]]:
        """One completion for each entry of `prompt_ids` (prompts come repeated) and the log-probabilities of its tokens."""
        completions = generation.generate(
            self.sampler(), self.processing_class, prompt_ids, max_new_tokens=self.max_completion_length,
            batch_size=len(prompt_ids), temperature=self.temperature, top_p=self.top_p, top_k=self.top_k,
        )
        sampled = sum(len(completion.ids) for completion in completions)
        self.metrics.count(sum(map(len, prompt_ids)) + sampled, sampled)
        entropy = sum(completion.entropy * len(completion.ids) for completion in completions) / sampled
        self._metrics["train"]["entropy"].append(entropy)
        return [completion.ids for completion in completions], [completion.logprobs for completion in completions]

    def _generate(self, prompts: list[Any]) -> tuple[Any, ...]:
        """TRL's, and then up to `dynamic_sampling` more rounds for the groups in which all completions earn the same.

        Their prompts give way to others of the data, here and in the batch's rows; both lists are changed in place.
        """
        ids, completion_ids, tool_mask, completions, logps, *rest = super()._generate(prompts)
        size, replaced = self.num_generations, 0
        if self.settings.dynamic_sampling:
            earned = super()._calculate_rewards(self.rows, prompts, completions, completion_ids)
            for _ in range(self.settings.dynamic_sampling):
                flat = (earned * self.reward_weights).nansum(1).view(-1, size).std(1) < 1e-8
                if not flat.any():
                    break
                places = flat.repeat_interleave(size).nonzero()[:, 0].tolist()
                for first in places[::size]:
                    row = self.train_dataset[int(torch.randint(len(self.train_dataset), ()))]
                    self.rows[first : first + size] = [dict(row) for _ in range(size)]
                    prompts[first : first + size] = [row["prompt"]] * size
                again = super()._generate([prompts[place] for place in places])
                for kept, new in zip((ids, completion_ids, completions, logps), (again[0], again[1], again[3], again[4]), strict=True):
                    for place, value in zip(places, new, strict=True):
                        kept[place] = value
                earned[places] = super()._calculate_rewards(*([part[place] for place in places] for part in (
                    self.rows, prompts, completions, completion_ids)))
                replaced += len(places) // size
            self.known_rewards = earned
            self._metrics["train"]["replaced_groups"].append(replaced)
        return ids, completion_ids, tool_mask, completions, logps, *rest

    def _calculate_rewards(self, inputs: Any, prompts: Any, completions: Any, completion_ids_list: Any) -> torch.Tensor:
        """(completions, rewards); those that dynamic sampling has worked out are not worked out again."""
        if self.known_rewards is None:
            earned = super()._calculate_rewards(inputs, prompts, completions, completion_ids_list)
        else:
            earned, self.known_rewards = self.known_rewards, None
        self.sampled = completions, completion_ids_list, earned
        self.samples.record(self.state.global_step, inputs, completions, earned.tolist())
        return earned

    def _generate_and_score_completions(self, inputs: list[dict[str, Any]]) -> dict[str, Any]:
        """TRL's batch, with advantages (completions, tokens) in place of (completions) under process supervision."""
        self.rows = inputs
        batch = super()._generate_and_score_completions(inputs)
        if self.verifier is None:
            return batch
        completions, ids, earned = self.sampled
        steps = [process.split(self.processing_class, row) for row in ids]
        columns = {name: [row[name] for row in inputs] for name in inputs[0] if name != "prompt"} | {
            "prompts": [row["prompt"] for row in inputs], "completions": completions,
        }
        outcomes = (earned * self.reward_weights.to(earned.device)).nansum(1).tolist()
        values, ends = process.verify(self.verifier, steps, outcomes, columns)
        batch["advantages"] = process.advantages(
            values, ends, self.num_generations, batch["completion_ids"].shape[1], self.scale_rewards != "none"
        ).to(batch["completion_ids"].device)
        judged = [value for own in values for value in own[:-1]]
        self._metrics["train"]["rewards/process/mean"].append(sum(judged) / max(1, len(judged)))
        self._metrics["train"]["process/steps"].append(len(judged) / len(values))
        return batch

    def _prepare_inputs(self, generation_batch: Any) -> dict[str, Any]:
        """TRL's buffer of micro-batches without its shuffle: a group stays together, so its prompt is computed once."""
        if self._step % (self.args.steps_per_generation * self.num_iterations) == 0 or not self.micro_batches:
            batch = self._generate_and_score_completions(generation_batch)
            self.micro_batches = split_tensor_dict(batch, self.args.steps_per_generation)
        return self.micro_batches[self._step % self.args.steps_per_generation]

    # -- scoring and loss -----------------------------------------------------------------------------------------------

    def _get_per_token_logps_and_entropies(
        self, model: Any, input_ids: torch.Tensor, attention_mask: torch.Tensor, logits_to_keep: int, batch_size: int | None = None,
        **options: Any,
    ) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None]:
        """(log-probabilities, entropies, None) of the last `logits_to_keep` tokens, from the dense copy of the active adapter."""
        if self.dense is None or not self.scores_densely:
            scored = super()._get_per_token_logps_and_entropies(
                model, input_ids, attention_mask, logits_to_keep, batch_size, **options
            )
            self.last_logps = scored[0].detach()
            return scored
        policy = self.accelerator.unwrap_model(model)
        disabled = next(iter(self.dense.layers.values())).disable_adapters
        self.dense.hold(None if disabled else policy.active_adapter, self.state.global_step)
        self.dense.model.train(self.args.gradient_checkpointing and torch.is_grad_enabled())
        size = batch_size or len(input_ids)
        parts = [
            scoring.completion_logps(
                self.dense.model, input_ids[start : start + size], attention_mask[start : start + size], logits_to_keep, self.temperature
            )
            for start in range(0, len(input_ids), size)
        ]
        logps, entropies = (torch.cat(series) for series in zip(*parts, strict=True))
        self.last_logps = logps.detach()
        return logps, entropies, None

    def _compute_loss(self, model: Any, inputs: dict[str, Any]) -> torch.Tensor:
        """TRL's loss over the completions that have a gradient; it and its gradient are those over all of them."""
        count = len(inputs["completion_ids"])
        share = 1.0
        if self.beta == 0 and self.loss_type in MEAN_OVER_ROWS and self.top_entropy_quantile == 1 and not self._entropy_bonus_enabled:
            learning = inputs["advantages"].view(count, -1).ne(0).any(1) & inputs["completion_mask"].any(1)
            if not learning.any():
                return sum(parameter.sum() for parameter in model.parameters() if parameter.requires_grad) * 0.0
            inputs = {name: value[learning] if value.dim() else value for name, value in inputs.items()}
            share = float(learning.float().mean()) if MEAN_OVER_ROWS[self.loss_type] else 1.0
        loss = super()._compute_loss(model, inputs) * share
        self._metrics["train"]["entropy"].pop()  # the sampler's entropy, of all completions, is logged in its place
        if "old_per_token_logps" not in inputs:
            # What was sampled from against what is trained, KL by the k3 estimator: 0 up to rounding while both are the same policy.
            ratio = (self.last_logps - inputs["sampling_per_token_logps"])[inputs["completion_mask"].bool()]
            if len(ratio):
                self._metrics["train"]["rollout_kl"].append(float((ratio.exp() - 1 - ratio).mean()))
        return loss


class RefreshReference(TrainerCallback):
    """Iterative GRPO (DeepSeekMath, algorithm 1): at the start of each outer iteration the reference becomes the policy."""

    def __init__(self, settings: GrpoConfig) -> None:
        self.settings = settings

    def on_step_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        step = state.global_step
        if step and step == curriculum.iteration_start(step, self.settings.max_steps, self.settings.iterations):
            refresh_reference(kwargs["model"])
            log.info("grpo: the reference is the policy after step %d", step)


@torch.no_grad()
def refresh_reference(policy: torch.nn.Module) -> None:
    """Copy the adapter `default` into the frozen adapter `ref`: no second base in memory."""
    for name, parameter in policy.named_parameters():
        if ".default." in name:
            policy.get_parameter(name.replace(".default.", ".ref.")).copy_(parameter)
