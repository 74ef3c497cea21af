"""Find training questions that stand in an evaluation set: exactly, normalised, or sharing a run of 13 words."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator

from .example import Example, normalise

# A word is a run of letters and digits; in scripts written without blanks, each character.
_WORD = re.compile(r"[\u3040-\u30ff\u3400-\u9fff\uac00-\ud7af]|[^\W_\u3040-\u30ff\u3400-\u9fff\uac00-\ud7af]+")
_SHORTEST = 8  # words: shorter questions are only looked up whole


class ContaminationIndex:
    """The questions of evaluation sets, to look training texts up in.

    A run of `n` words that two different questions of the index share is a set phrase ("Express your answer as a common
    fraction ...") and tells nothing, so it is left out. A question of 8 to n words counts as one run. n = 13 follows
    the GPT-3 paper (arXiv:2005.14165, appendix C).
    """

    def __init__(self, questions: Iterable[str] = (), *, n: int = 13) -> None:
        self._n = n
        self._exact: set[str] = set()
        self._normalised: set[str] = set()
        self._runs: dict[
            int, dict[int, int]
        ] = {}  # length in words -> hash of the run -> number of its question, -1: shared
        self._count = 0
        for question in questions:
            self.add(question)

    def __len__(self) -> int:
        """How many different questions the index holds."""
        return self._count

    def add(self, question: str) -> None:
        """Add an evaluation question."""
        normal = normalise(question)
        self._exact.add(question.strip())
        if not normal or normal in self._normalised:
            return
        self._normalised.add(normal)
        self._count += 1
        words = _WORD.findall(normal)
        length = min(self._n, len(words))
        if length < _SHORTEST:
            return
        runs = self._runs.setdefault(length, {})
        for run in _runs(words, length):
            if runs.setdefault(run, self._count) != self._count:
                runs[run] = -1

    def match(self, text: str) -> str | None:
        """Why `text` is contaminated: "exact", "normalised" or "13-gram"; None when it is not."""
        if text.strip() in self._exact:
            return "exact"
        normal = normalise(text)
        if normal in self._normalised:
            return "normalised"
        words = _WORD.findall(normal)
        for length, runs in self._runs.items():
            if any(runs.get(run, -1) != -1 for run in _runs(words, length)):
                return f"{self._n}-gram"
        return None

    def match_example(self, example: Example) -> str | None:
        """The first reason found in what an example shows the model: its questions, and its system and user turns."""
        shown = [message["content"] for message in example.messages if message["role"] in ("system", "user")]
        for text in dict.fromkeys([*example.questions, *shown]):
            reason = self.match(text)
            if reason is not None:
                return reason
        return None


def _runs(words: list[str], length: int) -> Iterator[int]:
    for start in range(len(words) - length + 1):
        yield hash(" ".join(words[start : start + length]))
