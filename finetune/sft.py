"""Supervised fine-tuning: TRL's SFTTrainer on an NF4 base (QLoRA), loss on the answers and their EOS only."""

import logging
from typing import Any

import torch
from transformers import DataCollatorForSeq2Seq
from trl import SFTConfig, SFTTrainer

from finetune import data, hardware, models, training
from finetune.config import Config
from finetune.run import Result, Run

log = logging.getLogger("finetune")

CHUNK = 1024
"""Supervised tokens whose logits are in memory at a time."""


class Trainer(SFTTrainer):
    """SFTTrainer whose loss passes only supervised positions through the LM head, in chunks, and counts tokens.

    TRL does so too, but only where Triton runs; elsewhere it projects every position (trl.trainer.utils.add_fused_lm_head).
    """

    def __init__(self, *args: Any, metrics: training.Metrics, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.metrics = metrics

    def compute_loss(self, model: Any, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None) -> Any:
        """Sum of the supervised tokens' negative log-likelihoods over their number in the whole accumulated batch."""
        labels = inputs["labels"][:, 1:]
        causal_lm = self.accelerator.unwrap_model(model).get_base_model()
        hidden = causal_lm.model(input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"], use_cache=False)[0][:, :-1]
        supervised = labels != -100
        count = num_items_in_batch if num_items_in_batch is not None else supervised.sum()
        loss = chunked_nll(hidden[supervised], causal_lm.lm_head, labels[supervised]) / count
        if self.model.training:
            self.metrics.count(int(inputs["attention_mask"].sum()), int(supervised.sum()))
        return (loss, {"loss": loss}) if return_outputs else loss


def chunked_nll(hidden: torch.Tensor, lm_head: torch.nn.Module, labels: torch.Tensor) -> torch.Tensor:
    """Sum of -log p(label); hidden (N, width), labels (N). Logits are computed, and computed again for the gradient, CHUNK rows
    at a time, so that memory does not grow with N x vocabulary."""

    def piece(rows: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.cross_entropy(lm_head(rows).float(), targets, reduction="sum")

    total = hidden.new_zeros((), dtype=torch.float32)
    for start in range(0, len(labels), CHUNK):
        rows, targets = hidden[start : start + CHUNK], labels[start : start + CHUNK]
        total = total + torch.utils.checkpoint.checkpoint(piece, rows, targets, use_reentrant=False)
    return total


def train(config: Config, run: Run) -> Result:
    """The sft stage: data -> tokens (verified) -> QLoRA -> `sft/adapter`.

    Raises UserError where a sample has no supervised EOS, nothing is left to train on, or the loss is not finite.
    """
    choices = hardware.choose(config, hardware.detect())
    training.prepare_machine(config, choices)
    base = models.resolve(config.model.path)
    tokenizer = models.load_tokenizer(base, config.model)
    dataset = data.sft_dataset(data.load(config, run).train, tokenizer, config)

    torch.manual_seed(config.seed)
    policy = models.new_adapter(models.load_base(base, config.model, choices), config.lora)
    checkpoints = run.path("sft/checkpoints")
    arguments = training.trainer_arguments(config, config.sft, choices, checkpoints) | {
        "max_length": None,  # data.sft_dataset has seen to the length
        "dataset_kwargs": {"skip_prepare_dataset": True},
        "train_sampling_strategy": "group_by_length",
        "remove_unused_columns": True,
    }
    metrics = training.Metrics(run, "sft")
    with models.fp32_adapter(policy):
        trainer = Trainer(
            model=policy,
            args=SFTConfig(**arguments | config.sft.extra),
            train_dataset=dataset,
            data_collator=DataCollatorForSeq2Seq(tokenizer, label_pad_token_id=-100),
            processing_class=tokenizer,
            callbacks=[metrics, training.CheckpointMarker()],
            metrics=metrics,
        )
    training.fit(trainer, checkpoints)
    with run.output("sft/adapter") as folder:
        models.save_adapter(trainer.model, tokenizer, folder)
    return Result({"base": base} | data.inputs(config, run), ["sft/adapter"], training.peak_gpu_memory())
