"""The answers of a running evaluation on disk, so that a killed one goes on where it was."""

import json
import logging
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from finetune.engines import Answer
from finetune.run import write_atomic

log = logging.getLogger("finetune")


class Rows:
    """`rows.jsonl`: a line that says what is evaluated and how, then a line for each problem that a model has answered.

    What another configuration wrote is not used: the file begins anew. A line cut off by a kill is dropped.
    """

    def __init__(self, path: Path, fingerprint: str) -> None:
        self.path = path
        self.header = json.dumps({"fingerprint": fingerprint})
        self.answers: dict[tuple[str, int], list[Answer]] = {}
        lines = path.read_text(encoding="utf-8").splitlines(keepends=True) if path.exists() else []
        if lines and lines[0].strip() == self.header:
            for line in lines[1:]:
                if line.endswith("\n"):
                    row = json.loads(line)
                    self.answers[row["model"], row["problem"]] = [Answer(**answer) for answer in row["answers"]]
            log.info("evaluate: %d answered problems are there already", len(self.answers))
        elif lines:
            log.info("evaluate: %s is of another evaluation, it begins anew", path)
        self._write_all()

    def has(self, model: str, problems: Sequence[int]) -> bool:
        """Whether the model has answered all of these problems (by index)."""
        return all((model, problem) in self.answers for problem in problems)

    def add(self, model: str, problems: Sequence[int], answers: Sequence[list[Answer]]) -> None:
        """Append a batch, in the place of what is there of it already."""
        partial = [key for problem in problems if (key := (model, problem)) in self.answers]
        for key in partial:
            del self.answers[key]
        if partial:
            self._write_all()
        self.answers |= {(model, problem): found for problem, found in zip(problems, answers, strict=True)}
        with open(self.path, "a", encoding="utf-8") as file:
            file.write("".join(self._line(model, problem) for problem in problems))

    def _write_all(self) -> None:
        write_atomic(self.path, self.header + "\n" + "".join(self._line(*key) for key in self.answers))

    def _line(self, model: str, problem: int) -> str:
        answers = [asdict(answer) for answer in self.answers[model, problem]]
        return json.dumps({"model": model, "problem": problem, "answers": answers}, ensure_ascii=False) + "\n"
