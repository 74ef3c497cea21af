"""The report: one offline HTML file with curves, accuracy, samples before and after, configuration and lineage."""

import io
import json
import logging
from pathlib import Path
from typing import Any

import matplotlib
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from finetune import inspect
from finetune.config import Config
from finetune.run import Result, Run, write_atomic
from finetune.samples import read as read_samples

matplotlib.use("Agg")
from matplotlib import pyplot  # noqa: E402  (the backend must be chosen first)

log = logging.getLogger("finetune")

SAMPLES = 6
"""Held-out problems shown with the answers of every model."""


def write(config: Config, run: Run) -> Result:
    """The report stage: `report.html` from what the run directory holds; a part that is not there is left out."""
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent / "templates"), autoescape=True, undefined=StrictUndefined,
        trim_blocks=True, lstrip_blocks=True,
    )
    results = read_json(run.dir / "evaluate" / "results.json")
    page = environment.get_template("report.html").render(
        config=config,
        config_yaml=(run.dir / "config.yaml").read_text(encoding="utf-8"),
        stages=run.manifest["stages"],
        data=read_json(run.dir / "data.json"),
        inspected=inspected_sources(run),
        curves=[curve for stage in ("sft", "grpo") for curve in curves(run, stage)],
        results=results,
        accuracy=accuracy_bars(results) if results and "references" not in results else None,
        samples=samples(results["rows"]) if results else [],
        diagnosis=read_json(run.dir / "grpo" / "diagnosis.json"),
        sampled=read_samples(run.dir / "grpo" / "samples.jsonl"),
        certificate=read_json(run.dir / "merged" / "certificate.json"),
    )
    write_atomic(run.dir / "report.html", page)
    log.info("report: %s", run.dir / "report.html")
    return Result({}, ["report.html"])


def read_json(path: Path) -> Any:
    """The file's content, or None where there is no such file."""
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else None


def inspected_sources(run: Run) -> list[dict[str, Any]]:
    """The pages of the inspect stage, each with its `lines` of (title, text); none where it did not run."""
    found = read_json(run.dir / "inspect.json")
    return [page | {"lines": list(inspect.lines(page))} for page in found["sources"]] if found else []


def samples(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Problems on which the models differ first, then others."""
    def differs(row: dict[str, Any]) -> bool:
        return len({completions[0]["correct"] for completions in row["completions"].values()}) > 1

    return sorted(rows, key=differs, reverse=True)[:SAMPLES]


def curves(run: Run, stage: str) -> list[Markup]:
    """Plots of the stage's loss and, where it has one, reward by step."""
    rows = run.metrics(stage)
    return [
        line_plot([row["step"] for row in rows if key in row], [row[key] for row in rows if key in row], f"{stage}: {title}", title)
        for key, title in (("loss", "loss"), ("reward", "reward"), ("frac_reward_zero_std", "groups without variance"), ("kl", "KL"))
        if any(key in row for row in rows) and not (stage == "grpo" and key == "loss")
    ]


def line_plot(steps: list[int], values: list[float], title: str, label: str) -> Markup:
    """An SVG line, with the mean of the last ten values over it."""
    figure, axes = pyplot.subplots(figsize=(4.6, 2.6))
    axes.plot(steps, values, color="#9bb8d3", linewidth=1)
    smooth = [sum(values[max(0, i - 9) : i + 1]) / len(values[max(0, i - 9) : i + 1]) for i in range(len(values))]
    axes.plot(steps, smooth, color="#1f5f99", linewidth=2)
    axes.set(title=title, xlabel="step", ylabel=label)
    axes.grid(alpha=0.25)
    return svg(figure)


def accuracy_bars(results: dict[str, Any]) -> Markup:
    """An SVG of each model's accuracy with its 95% interval."""
    names = list(results["models"])
    values = [100 * results["models"][name]["accuracy"] for name in names]
    intervals = [results["models"][name]["interval"] for name in names]
    errors = [
        [value - 100 * low for value, (low, _) in zip(values, intervals, strict=True)],
        [100 * high - value for value, (_, high) in zip(values, intervals, strict=True)],
    ]
    figure, axes = pyplot.subplots(figsize=(4.6, 2.6))
    axes.bar(names, values, yerr=errors, capsize=5, color=["#b9c4cf", "#7fa6c9", "#3d7db8", "#1f5f99"][: len(names)])
    axes.set(title="held-out accuracy, 95% interval", ylabel="%", ylim=(0, 100))
    return svg(figure)


def svg(figure: Any) -> Markup:
    """The figure as inline SVG."""
    with io.StringIO() as file:
        figure.savefig(file, format="svg", bbox_inches="tight")
        pyplot.close(figure)
        text = file.getvalue()
    return Markup(text[text.index("<svg") :])
