"""Accuracy on held-out problems: the base, each trained adapter and the merged weights, with intervals and paired tests."""

import json
import logging
import math
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.progress import track
from rich.table import Table

from data_formats import Example
from finetune import answers, data, generation, hardware, models, training
from finetune.config import Config
from finetune.run import Result, Run, write_atomic

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

log = logging.getLogger("finetune")


def wilson(successes: int, total: int) -> tuple[float, float]:
    """95% confidence interval of a share (Wilson's score interval).

    >>> [round(bound, 3) for bound in wilson(50, 100)]
    [0.404, 0.596]
    """
    if total == 0:
        return 0.0, 1.0
    z, share = 1.959964, successes / total
    centre = (share + z * z / (2 * total)) / (1 + z * z / total)
    half = z * math.sqrt(share * (1 - share) / total + z * z / (4 * total * total)) / (1 + z * z / total)
    return max(0.0, centre - half), min(1.0, centre + half)


def mcnemar(gained: int, lost: int) -> float:
    """Two-sided exact p-value that two models are equally good, from the problems that only one of them solved (McNemar).

    >>> mcnemar(0, 0), mcnemar(10, 0)
    (1.0, 0.001953125)
    """
    discordant = gained + lost
    tail = sum(math.comb(discordant, k) for k in range(min(gained, lost) + 1)) / 2**discordant
    return min(1.0, 2 * tail)


def evaluate(config: Config, run: Run) -> Result:
    """The evaluate stage: `evaluate/results.json` and a table.

    The models are the base and, as far as they are there, model.adapter or the run's adapters on the full-precision base, and
    the merged folder. The results hold each problem's prompt, completions, extracted answers and verdicts.
    """
    choices = hardware.choose(config, hardware.detect())
    if config.evaluate.dtype != "auto":
        choices = replace(choices, dtype=config.evaluate.dtype)
    training.prepare_machine(config, choices)
    base = models.resolve(config.model.path)
    problems = data.load(config, run).held_out[: config.evaluate.limit]

    rows: list[dict[str, Any]] = [{"id": problem.id, "gold": problem.answer, "completions": {}} for problem in problems]
    inputs = {"base": base} | data.inputs(config, run)
    summaries: dict[str, dict[str, Any]] = {}
    for name, folder, model, tokenizer in candidates(config, run, base, choices):
        inputs[name] = folder
        summaries[name] = solve(name, model, tokenizer, problems, rows, config)
        log.info("evaluate: %s solves %.1f%% of %d", name, 100 * summaries[name]["accuracy"], len(problems))
    results = {
        "data": config.data.eval_path or config.data.path,
        "problems": len(problems),
        "k": config.evaluate.k,
        "models": summaries,
        "comparisons": [compare(rows, first, second) for first, second in pairs(list(summaries))],
        "rows": rows,
    }
    with run.output("evaluate") as output:
        write_atomic(output / "results.json", json.dumps(results, indent=1, ensure_ascii=False))
    Console(stderr=True).print(table(results))
    log.debug("results:\n%s", json.dumps({key: value for key, value in results.items() if key != "rows"}, indent=1))
    return Result(inputs, ["evaluate"], training.peak_gpu_memory())


def candidates(
    config: Config, run: Run, base: Path, choices: hardware.Choices
) -> Iterator[tuple[str, Path, "PreTrainedModel", "PreTrainedTokenizerBase"]]:
    """Each model to evaluate: (name, folder, model, tokenizer); one is in memory at a time, adapters share the base."""
    trained = {"adapter": Path(config.model.adapter)} if config.model.adapter else {}
    trained |= {stage: run.dir / stage / "adapter" for stage in ("sft", "grpo") if (run.dir / stage / "adapter").is_dir()}
    tokenizer = models.load_tokenizer(base, config.model)
    model = models.load_base(base, config.model, choices, quantize=False)
    yield "base", base, model, tokenizer
    for name, folder in trained.items():
        adapted = models.load_adapter(model, folder)
        yield name, folder, adapted, models.load_tokenizer(folder, config.model) if has_tokenizer(folder) else tokenizer
        model = adapted.unload()
    merged = run.dir / "merged"
    if merged.is_dir():
        del model
        yield "merged", merged, models.load_base(merged, config.model, choices, quantize=False), models.load_tokenizer(merged, config.model)


def has_tokenizer(folder: Path) -> bool:
    """Whether an adapter's folder has the tokenizer that it was trained with."""
    return (folder / "tokenizer_config.json").exists()


def solve(
    name: str, model: "PreTrainedModel", tokenizer: "PreTrainedTokenizerBase", problems: list[Example],
    rows: list[dict[str, Any]], config: Config,
) -> dict[str, Any]:
    """Answer every problem k times, add the completions to `rows` and return the model's summary."""
    settings = config.evaluate
    chats = [data.prompt_messages(problem, config.data.prompt) for problem in problems]
    prompts = [models.encode_chat(tokenizer, chat, add_generation_prompt=True) for chat in chats for _ in range(settings.k)]
    completions: list[generation.Completion] = []
    import torch

    torch.manual_seed(config.seed)
    batches = range(0, len(prompts), settings.batch_size)
    order = sorted(range(len(prompts)), key=lambda index: len(prompts[index]))
    found: dict[int, generation.Completion] = {}
    for start in track(batches, description=f"evaluate {name}", console=Console(stderr=True)):
        indices = order[start : start + settings.batch_size]
        batch = generation.generate(
            model, tokenizer, [prompts[index] for index in indices], settings.max_new_tokens, settings.batch_size,
            settings.temperature, settings.top_p, settings.top_k,
        )
        found |= dict(zip(indices, batch, strict=True))
    completions = [found[index] for index in range(len(prompts))]
    extracted = [answers.extract(completion.text) for completion in completions]
    golds = [str(problem.answer) for problem in problems for _ in range(settings.k)]
    verdicts = answers.verify(list(zip(golds, [text or "" for text in extracted], strict=True)))
    for position, row in enumerate(rows):
        first = position * settings.k
        row["prompt"] = chats[position]
        row["completions"][name] = [
            {
                "text": completions[index].text, "tokens": len(completions[index].ids), "finished": completions[index].finished,
                "extracted": extracted[index], "correct": verdicts[index],
            }
            for index in range(first, first + settings.k)
        ]
    solved = sum(verdicts)
    low, high = wilson(solved, len(verdicts))
    return {
        "accuracy": solved / len(verdicts),
        "interval": [low, high],
        "finished": sum(completion.finished for completion in completions) / len(completions),
        "extracted": sum(text is not None for text in extracted) / len(extracted),
        "mean_tokens": sum(len(completion.ids) for completion in completions) / len(completions),
    }


def pairs(names: list[str]) -> list[tuple[str, str]]:
    """The comparisons worth a line: each model with the one before it, and the last with the first."""
    steps = list(zip(names, names[1:], strict=False))
    return steps + ([(names[0], names[-1])] if len(names) > 2 else [])


def compare(rows: list[dict[str, Any]], first: str, second: str) -> dict[str, Any]:
    """Paired comparison of two models' first completions: problems gained and lost, McNemar's p, identical texts."""
    before = [row["completions"][first][0] for row in rows]
    after = [row["completions"][second][0] for row in rows]
    gained = sum(not a["correct"] and b["correct"] for a, b in zip(before, after, strict=True))
    lost = sum(a["correct"] and not b["correct"] for a, b in zip(before, after, strict=True))
    return {
        "from": first, "to": second, "gained": gained, "lost": lost, "p": mcnemar(gained, lost),
        "identical": sum(a["text"] == b["text"] for a, b in zip(before, after, strict=True)),
    }


def table(results: dict[str, Any]) -> Table:
    """The results as a table for the terminal."""
    shown = Table(title=f"{results['problems']} held-out problems of {results['data']}")
    for column in ("model", "accuracy", "95% interval", "stops by itself", "tokens", "against the one before"):
        shown.add_column(column, justify="left" if column in ("model", "against the one before") else "right")
    against = {comparison["to"]: comparison for comparison in reversed(results["comparisons"])}
    for name, summary in results["models"].items():
        comparison = against.get(name)
        note = ""
        if comparison:
            note = f"+{comparison['gained']} -{comparison['lost']} (p={comparison['p']:.2g}), {comparison['identical']} identical"
        low, high = summary["interval"]
        shown.add_row(
            name, f"{100 * summary['accuracy']:.1f}%", f"{100 * low:.1f}-{100 * high:.1f}%", f"{100 * summary['finished']:.0f}%",
            f"{summary['mean_tokens']:.0f}", note,
        )
    return shown
