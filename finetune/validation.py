"""Loss and accuracy on examples kept out of training, to choose the best checkpoint by and to stop early."""

import logging
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from peft import PeftModel

from data_formats import Example
from finetune import answers, data, generation, models, packing
from finetune.config import Config
from finetune.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

log = logging.getLogger("finetune")

MAX_NEW_TOKENS = 256
"""Longest answer while validating, tokens."""

ARGUMENTS: dict[str, dict[str, Any]] = {
    name: {
        "eval_strategy": "steps", "load_best_model_at_end": True, "metric_for_best_model": f"eval_{name}",
        "greater_is_better": name == "accuracy", "save_total_limit": 3,
    }
    for name in ("loss", "accuracy")
}
"""transformers.TrainingArguments for each `sft.best_by`."""


class Validation:
    """Measures a model on fixed examples: `validation(model)` -> {eval_loss: nats a supervised token, eval_accuracy: 0 to 1}.

    eval_accuracy is there where sft.best_by asks for it. Raises UserError where no example has what is asked for.
    """

    def __init__(
        self, examples: list[Example], tokenizer: "PreTrainedTokenizerBase", config: Config, collate: Callable[..., packing.Batch],
        nll: Callable[..., tuple[torch.Tensor, int]],
    ) -> None:
        self.tokenizer, self.collate, self.nll = tokenizer, collate, nll
        self.batch_size = config.sft.micro_batch_size
        self.dataset = data.sft_dataset(examples, tokenizer, config)
        self.problems = [example for example in examples if example.answer is not None] if config.sft.best_by == "accuracy" else []
        if config.sft.best_by == "accuracy" and not self.problems:
            raise UserError("sft.best_by=accuracy: no validation example has a gold answer. Set sft.best_by=loss.")
        self.prompts = [
            models.encode_chat(tokenizer, data.prompt_messages(problem, config.data.prompt), add_generation_prompt=True)
            for problem in self.problems
        ]

    @torch.no_grad()
    def __call__(self, model: PeftModel) -> dict[str, float]:
        model.eval()
        total, tokens = 0.0, 0
        for start in range(0, len(self.dataset), self.batch_size):
            rows = [self.dataset[index] for index in range(start, min(start + self.batch_size, len(self.dataset)))]
            batch = {key: value.to(model.device) if isinstance(value, torch.Tensor) else value for key, value in self.collate(rows).items()}
            loss, supervised = self.nll(model, batch)
            total, tokens = total + float(loss), tokens + supervised
        figures = {"eval_loss": total / tokens}
        if self.problems:
            figures["eval_accuracy"] = self.accuracy(model)
        model.train()
        log.info("validation: %s", "  ".join(f"{name.removeprefix('eval_')} {value:.4f}" for name, value in figures.items()))
        return figures

    def accuracy(self, model: PeftModel) -> float:
        """Share of the problems that a greedy answer solves."""
        causal_lm = model.get_base_model()
        attention = causal_lm.config._attn_implementation
        causal_lm.set_attn_implementation("sdpa" if attention == packing.PACKED_SDPA else attention)
        completions = generation.generate(model, self.tokenizer, self.prompts, MAX_NEW_TOKENS, self.batch_size)
        causal_lm.set_attn_implementation(attention)
        found = [(str(problem.answer), answers.extract(completion.text) or "") for problem, completion in zip(self.problems, completions, strict=True)]
        return sum(answers.verify(found)) / len(found)
