"""Supervised fine-tuning: TRL's SFTTrainer on an NF4 base (QLoRA), loss on the answers and their EOS only."""

import functools
import logging
from typing import Any

import torch
from accelerate.utils.memory import should_reduce_batch_size
from datasets import Dataset
from peft import PeftModel
from peft.optimizers import create_loraplus_optimizer
from transformers import EarlyStoppingCallback, TrainerControl
from trl import SFTConfig, SFTTrainer

from finetune import data, hardware, models, packing, training, validation, variants
from finetune.config import Config
from finetune.errors import UserError
from finetune.loss import chunked_nll
from finetune.packing import Batch
from finetune.run import Result, Run

log = logging.getLogger("finetune")


class Trainer(SFTTrainer):
    """SFTTrainer whose loss passes only supervised positions through the LM head, in chunks.

    TRL does so too, but only where Triton runs; elsewhere it projects every position (trl.trainer.utils.add_fused_lm_head).
    """

    control: TrainerControl
    optimizer: torch.optim.Optimizer | None

    def __init__(
        self, *args: Any, metrics: training.Metrics, validate: validation.Validation | None = None, loraplus_ratio: float | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(*args, **kwargs)
        self.model_accepts_loss_kwargs = True  # compute_loss divides by the accumulated batch's tokens itself, for any architecture
        self.metrics = metrics
        self.validate = validate
        self.loraplus_ratio = loraplus_ratio
        self.halvings = 0
        self.accumulated: list[Batch] = []

    def compute_loss(self, model: Any, inputs: Batch, return_outputs: bool = False, num_items_in_batch: Any = None) -> Any:
        """Sum of the supervised tokens' negative log-likelihoods over their number in the whole accumulated batch."""
        total, supervised = nll(self.accelerator.unwrap_model(model), inputs)
        loss = total / (num_items_in_batch if num_items_in_batch is not None else supervised)
        self.metrics.count(sum(inputs["lengths"]), supervised)
        self.metrics.watch(inputs["ids"], total / supervised)
        return (loss, {"loss": loss}) if return_outputs else loss

    def training_step(self, model: Any, inputs: Batch, num_items_in_batch: Any = None) -> torch.Tensor:
        """One micro-batch; when memory runs out, it and all later ones are computed in halves, with the same gradient.

        Raises UserError where there is no memory for a single example.
        """
        if not self.accumulated:
            self.counted = self.metrics.tokens, self.metrics.supervised_tokens
        self.accumulated.append(inputs)
        micro_batches = [inputs]
        while True:
            try:
                losses = [self.run_parts(model, batch, num_items_in_batch) for batch in micro_batches]
                break
            except RuntimeError as error:
                if not should_reduce_batch_size(error):
                    raise
                self.halve(error)
            # The backward pass that broke off has left a part of its gradient: compute the step's micro-batches anew.
            micro_batches = self.accumulated
            model.zero_grad()
            self.metrics.tokens, self.metrics.supervised_tokens = self.counted
            self.metrics.micro_batches.clear()
            if torch.cuda.is_available():
                torch.cuda.empty_cache()
        if self.accelerator.sync_gradients:
            self.accumulated = []
        return losses[-1]

    def run_parts(self, model: Any, inputs: Batch, num_items_in_batch: Any) -> torch.Tensor:
        """Forward and backward of a micro-batch in 2 ** halvings parts; returns their summed loss."""
        parts = [inputs]
        for _ in range(self.halvings):
            parts = [half for part in parts for half in packing.halves(part)]
        losses = [super(Trainer, self).training_step(model, part, num_items_in_batch) for part in parts]
        return torch.stack(losses).sum()

    def halve(self, error: RuntimeError) -> None:
        """Note that micro-batches are to be halved once more; raises UserError where they are single examples already."""
        examples = max(len(batch["lengths"]) for batch in self.accumulated)
        if examples <= 2**self.halvings:
            raise UserError(
                f"sft: out of memory at step {self.state.global_step + 1} with one example at a time ({str(error).splitlines()[0]}). "
                "Set sft.gradient_checkpointing=true, or lower sft.max_length."
            ) from error
        self.halvings += 1
        log.warning(
            "out of memory at step %d: micro-batches are computed in %d parts from here on, with the same batch and gradient",
            self.state.global_step + 1, 2**self.halvings,
        )

    def evaluate(self, eval_dataset: Any = None, ignore_keys: Any = None, metric_key_prefix: str = "eval") -> dict[str, float]:
        """Figures of the validation examples, as transformers.Trainer.evaluate hands them to callbacks and to the best checkpoint."""
        assert self.validate is not None
        figures = self.validate(self.accelerator.unwrap_model(self.model))
        self.log(dict(figures))
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, figures)
        return figures

    def create_optimizer(self, model: Any = None) -> torch.optim.Optimizer:
        """transformers' optimizer, or LoRA+'s, whose B matrices learn faster."""
        if self.loraplus_ratio is None or self.optimizer is not None:
            return super().create_optimizer(model)
        kind, settings = self.get_optimizer_cls_and_kwargs(self.args, self.model)
        self.optimizer = create_loraplus_optimizer(self.model, kind, loraplus_lr_ratio=self.loraplus_ratio, **settings)
        return self.optimizer


def nll(model: PeftModel, batch: Batch) -> tuple[torch.Tensor, int]:
    """Sum of -log p over the supervised tokens of a padded or packed batch (fp32, nats), and their number."""
    causal_lm = model.get_base_model()
    labels = batch["labels"][:, 1:]
    supervised = labels != -100
    dtype = causal_lm.config.dtype
    if "position_ids" in batch:
        apart = packing.boundaries(batch["lengths"], causal_lm.config._attn_implementation, labels.device)
        where = {"position_ids": batch["position_ids"], **apart}
    else:
        where = {"attention_mask": batch["attention_mask"]}
    # The adapter's weights are fp32 and compute in the base's dtype, as in any mixed-precision training; without autocast peft
    # would cast every activation up instead (peft.tuners.lora.bnb.Linear4bit.forward).
    with torch.autocast(labels.device.type, dtype, enabled=dtype != torch.float32):
        hidden = causal_lm.get_decoder()(input_ids=batch["input_ids"], use_cache=False, **where)[0][:, :-1]
    return chunked_nll(hidden[supervised], causal_lm.get_output_embeddings(), labels[supervised]), int(supervised.sum())


@torch.no_grad()
def verify_loss(model: PeftModel, dataset: Dataset, collate: Any) -> None:
    """Prove `nll` on this model before training: a batch of the two shortest examples against the plain model, one at a time.

    Raises UserError where they differ: a model that scales its logits, say, or an attention that lets packed examples meet.
    """
    lengths = dataset["length"]
    order = sorted(range(len(dataset)), key=lengths.__getitem__)[:2]
    rows = [dataset[index] for index in order]
    model.eval()
    batch = {key: value.to(model.device) if isinstance(value, torch.Tensor) else value for key, value in collate(rows).items()}
    found, count = nll(model, batch)
    causal_lm = model.get_base_model()
    attention = causal_lm.config._attn_implementation
    causal_lm.set_attn_implementation("sdpa" if attention == packing.PACKED_SDPA else attention)
    expected = torch.zeros((), device=model.device)
    for ids, labels in packing.examples(rows):
        target = torch.tensor(labels, device=model.device)[1:]
        with torch.autocast(model.device.type, causal_lm.config.dtype, enabled=causal_lm.config.dtype != torch.float32):
            logits = model(input_ids=torch.tensor([ids], device=model.device)).logits[0, :-1].float()
        expected += torch.nn.functional.cross_entropy(logits, target, ignore_index=-100, reduction="sum")
    causal_lm.set_attn_implementation(attention)
    model.train()
    if abs(found - expected) > 0.02 * abs(expected) + 0.01 * count:
        raise UserError(
            f"This model's loss on two examples is {float(expected) / count:.4f} a token, and {float(found) / count:.4f} the way it would be "
            f"trained. Set sft.packing=none; if that does not help, this architecture ({causal_lm.config.model_type}) is not supported."
        )


def train(config: Config, run: Run) -> Result:
    """The sft stage: data -> tokens (verified) -> QLoRA -> `sft/adapter`.

    Raises UserError where a sample has no supervised EOS, nothing is left to train on, the loss is not finite or jumps, or
    memory does not suffice for one example; KeyboardInterrupt after Ctrl-C, with the last step saved.
    """
    settings = config.sft
    choices = hardware.choose(config, hardware.detect())
    training.prepare_machine(config, choices)
    base = models.resolve(config.model.path)
    tokenizer = models.load_tokenizer(base, config.model)
    token_rows = variants.train_tokens(config.lora, tokenizer)
    examples = data.load(config, run).train
    if settings.validation_size is not None:
        examples, chosen = data.split(examples, settings.validation_size, config.seed)
    dataset = data.sft_dataset(examples, tokenizer, config)
    collate = functools.partial(packing.pad, pad_token_id=tokenizer.pad_token_id) if settings.packing == "none" else packing.flatten

    torch.manual_seed(config.seed)
    policy = variants.start(models.load_base(base, config.model, choices), base, config, dataset, token_rows, tokenizer.pad_token_id)
    packing.prepare(policy.get_base_model(), settings.packing)
    verify_loss(policy, dataset, collate)
    initial = variants.keep_initial(policy, config.lora, run)
    checkpoints = run.path("sft/checkpoints")
    arguments = training.trainer_arguments(config, settings, choices, checkpoints) | {
        "max_length": None,  # data.sft_dataset has seen to the length
        "dataset_kwargs": {"skip_prepare_dataset": True},
        "train_sampling_strategy": "group_by_length" if settings.packing == "none" else "random",
        "remove_unused_columns": False,
        "neftune_noise_alpha": settings.neftune_alpha,
    }
    metrics = training.Metrics(run, "sft", settings.spike_factor)
    callbacks = [metrics, training.CheckpointMarker()]
    validate = None
    if settings.validation_size is not None:
        validate = validation.Validation(chosen, tokenizer, config, collate, nll)
        arguments |= validation.ARGUMENTS[settings.best_by] | {"eval_steps": settings.save_steps}
        if settings.patience is not None:
            callbacks.append(EarlyStoppingCallback(settings.patience))
    with models.fp32_adapter(policy):
        trainer = Trainer(
            model=policy,
            args=SFTConfig(**arguments | settings.extra),
            train_dataset=dataset,
            eval_dataset=validate.dataset if validate else None,
            data_collator=collate,
            processing_class=tokenizer,
            callbacks=callbacks,
            metrics=metrics,
            validate=validate,
            loraplus_ratio=settings.loraplus_ratio,
        )
    training.fit(trainer, checkpoints)
    if validate is not None:
        log.info("best by %s: %s, %s", settings.best_by, trainer.state.best_metric, trainer.state.best_model_checkpoint)
    with run.output("sft/adapter") as folder:
        models.save_adapter(trainer.model, tokenizer, folder, initial)
    return Result({"base": base} | data.inputs(config, run), ["sft/adapter"], training.peak_gpu_memory())
