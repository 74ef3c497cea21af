"""Which prompts GRPO sees and when: pass rates from a first sampling pass, outer iterations with replay, and the order of it all."""

import json
import logging
import random
from typing import TYPE_CHECKING

import torch

from finetune import answers, generation, models
from finetune.config import GrpoConfig
from finetune.errors import UserError
from finetune.run import Run, write_atomic

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

log = logging.getLogger("finetune")


def prompt_order(
    count: int, per_step: int, steps: int, seed: int, iterations: int = 1, replay: float = 0.0, rates: list[float] | None = None
) -> list[int]:
    """Index of the prompt (of `count`) at each of the `per_step` places of `steps` steps.

    The prompts come in shuffled passes, in each from the easiest to the hardest where `rates` has their pass rates. From the
    second of the outer iterations on, a share `replay` of the places is drawn from the earlier iterations' prompts.
    """
    generator = random.Random(seed)
    queue: list[int] = []
    order: list[int] = []
    earlier = 0
    for place in range(steps * per_step):
        if place // per_step == iteration_start(place // per_step, steps, iterations) and place % per_step == 0:
            earlier = place
        if earlier and int((place + 1) * replay) > int(place * replay):
            order.append(generator.choice(order[:earlier]))
            continue
        if not queue:
            queue = generator.sample(range(count), count)
            if rates is not None:
                queue.sort(key=lambda index: rates[index])  # the easiest is taken first, from the end
        order.append(queue.pop())
    return order


def iteration_start(step: int, steps: int, iterations: int) -> int:
    """The step at which the outer iteration of `step` begins; the iterations share the steps evenly.

    >>> [iteration_start(step, 7, 2) for step in range(7)]
    [0, 0, 0, 0, 4, 4, 4]
    """
    length = -(-steps // iterations)
    return step // length * length


def pass_rates(
    model: "PreTrainedModel", tokenizer: "PreTrainedTokenizerBase", dataset: "Dataset", settings: GrpoConfig, seed: int, run: Run
) -> list[float]:
    """Share of right answers among `grpo.pass_samples` completions of each prompt, sampled once and kept in
    grpo/pass_rates.json. Leaves the random state as it was."""
    path = run.path("grpo/pass_rates.json")
    if path.exists():
        return [row["pass_rate"] for row in json.loads(path.read_text(encoding="utf-8"))]
    prompts = [models.encode_chat(tokenizer, prompt, add_generation_prompt=True) for prompt in dataset["prompt"]]
    repeated = [prompt for prompt in prompts for _ in range(settings.pass_samples)]
    log.info("grpo: %d completions for the pass rates of %d prompts", len(repeated), len(prompts))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        completions = generation.generate(
            model, tokenizer, repeated, settings.max_completion_length, settings.batch_size, settings.temperature
        )
    golds = [answer for answer in dataset["answer"] for _ in range(settings.pass_samples)]
    types = [kind or None for kind in dataset["answer_type"] for _ in range(settings.pass_samples)]
    pairs = [(gold, answers.extract(completion.text)) for gold, completion in zip(golds, completions, strict=True)]
    right = answers.verify(pairs, answer_types=types)
    size = settings.pass_samples
    rates = [sum(right[start : start + size]) / size for start in range(0, len(right), size)]
    rows = [{"id": name, "pass_rate": rate} for name, rate in zip(dataset["id"], rates, strict=True)]
    write_atomic(path, json.dumps(rows, indent=1))
    return rates


def fitting(rates: list[float], settings: GrpoConfig) -> list[int]:
    """Indices of the prompts whose pass rate is within grpo.min_pass_rate and grpo.max_pass_rate; how many are not is logged.

    Raises UserError where too few are left for one step.
    """
    kept = [index for index, rate in enumerate(rates) if settings.min_pass_rate <= rate <= settings.max_pass_rate]
    below = sum(rate < settings.min_pass_rate for rate in rates)
    above = sum(rate > settings.max_pass_rate for rate in rates)
    log.info("grpo: %d prompts kept by pass rate; left out %d too hard, %d too easy", len(kept), below, above)
    if len(kept) < settings.batch_size // settings.group_size:
        raise UserError(
            f"grpo.min_pass_rate={settings.min_pass_rate}, grpo.max_pass_rate={settings.max_pass_rate}: keep {len(kept)} of {len(rates)} "
            f"prompts ({below} too hard, {above} too easy), fewer than the {settings.batch_size // settings.group_size} of one step. "
            "Widen the range, or give other problems."
        )
    return kept
