"""Sampled completions with what each reward gave them: a table in the terminal and grpo/samples.jsonl for the report."""

import json
import statistics
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from finetune.run import Run, write_atomic

TABLES = 5
"""Tables in a run, spread evenly over its steps."""
SHOWN = 300
"""Characters of a completion in the terminal."""


class Samples:
    """Keeps the best, the worst and a middling completion of one group, at TABLES steps of the run."""

    def __init__(self, run: Run, rewards: dict[str, float], group_size: int, max_steps: int, console: Console) -> None:
        self.path = run.path("grpo/samples.jsonl")
        self.names, self.weights = list(rewards), list(rewards.values())
        self.group_size, self.console = group_size, console
        self.every = max(1, max_steps // TABLES)
        self.last_step: int | None = None

    def record(self, step: int, rows: list[dict[str, Any]], completions: list[list[dict[str, str]]], rewards: list[list[float]]) -> None:
        """Take a batch of `step` (from 0): rows of the data, completions and rewards (completions, rewards), a group after another.

        The group with the widest spread is kept. What was written for this step or a later one, before a resume, is replaced.
        """
        if step % self.every or step == self.last_step:
            return
        self.last_step = step
        totals = [sum(weight * value for weight, value in zip(self.weights, values, strict=True)) for values in rewards]
        starts = range(0, len(totals), self.group_size)
        start = max(starts, key=lambda first: statistics.pstdev(totals[first : first + self.group_size]))
        ranked = sorted(range(start, min(start + self.group_size, len(totals))), key=lambda index: -totals[index])
        kept = [
            {
                "step": step, "id": rows[index]["id"], "prompt": rows[index]["prompt"][-1]["content"], "gold": rows[index]["answer"],
                "completion": completions[index][-1]["content"], "rewards": dict(zip(self.names, rewards[index], strict=True)),
                "total": totals[index],
            }
            for index in dict.fromkeys((ranked[0], ranked[len(ranked) // 2], ranked[-1]))
        ]
        earlier = [row for row in read(self.path) if row["step"] < step]
        write_atomic(self.path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in earlier + kept))
        self.console.print(table(kept))


def read(path: Path) -> list[dict[str, Any]]:
    """The rows of a samples.jsonl; none where there is no such file."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n") if line] if path.exists() else []


def table(rows: list[dict[str, Any]]) -> Table:
    """One group's completions with each reward and their weighted sum."""
    first = rows[0]
    title = f"step {first['step'] + 1}, {first['id']} (gold: {first['gold']}): best, middling and worst completion"
    shown = Table(title=Text(title), show_lines=True)  # Text: what a model writes is no markup
    for column in ("completion", "rewards", "total"):
        shown.add_column(column, justify="right" if column == "total" else "left", overflow="fold")
    for row in rows:
        text = row["completion"] if len(row["completion"]) <= SHOWN else row["completion"][:SHOWN] + " ..."
        earned = "\n".join(f"{name.rpartition('.')[2]} {value:.2f}" for name, value in row["rewards"].items())
        shown.add_row(Text(text), earned, f"{row['total']:.2f}")
    return shown
