"""Training examples that hold an evaluation question: found, dropped, counted and listed."""

from collections.abc import Iterable, Iterator
from typing import NamedTuple

import data_formats
from data_formats import Example
from data_formats.contamination import ContaminationIndex
from data_formats.example import question_key
from finetune.config import DataConfig

GENERATED = "reasoning_gym:"


class Contaminated(NamedTuple):
    """A training example that is left out: its id, why (exact, normalised or 13-gram), and the evaluation set it is in."""

    id: str
    reason: str
    found_in: str


class Detector:
    """Looks training examples up in the evaluation sets.

    External sets (data.eval_path and data.decontaminate) are looked up exactly, normalised, and by runs of 13 words (GPT-3,
    arXiv 2005.14165, appendix C). Problems split off the training data itself, and generated ones, are looked up exactly and
    normalised only: problems of one template share long runs without being the same problem.
    """

    def __init__(self, settings: DataConfig, held_out: Iterable[Example]) -> None:
        """`held_out`: the examples that are evaluated on. Reads the files of data.decontaminate; raises DataFormatError for a bad one."""
        self.indices: dict[str, ContaminationIndex] = {}
        self.keys: dict[str, set[str]] = {}
        own = settings.eval_path is None
        self._add(settings.eval_path or "the held-out problems", held_out, whole_only=own or is_generated(settings.eval_path))
        for path in settings.decontaminate:
            self._add(path, data_formats.read(path), whole_only=is_generated(path))

    def _add(self, name: str, examples: Iterable[Example], whole_only: bool) -> None:
        questions = (question for example in examples for question in example.questions)
        if whole_only:
            self.keys[name] = {question_key(question) for question in questions}
        else:
            self.indices[name] = ContaminationIndex(questions)

    def find(self, example: Example) -> Contaminated | None:
        """Where the example's questions, system and user turns stand in an evaluation set, the first place found."""
        for name, index in self.indices.items():
            reason = index.match_example(example)
            if reason is not None:
                return Contaminated(example.id, reason, name)
        for name, keys in self.keys.items():
            if keys and any(question_key(text) in keys for text in shown(example)):
                return Contaminated(example.id, "normalised", name)
        return None


def is_generated(path: str | None) -> bool:
    """Whether a path names a generator of problems."""
    return path is not None and path.startswith(GENERATED)


def shown(example: Example) -> Iterator[str]:
    """The texts of an example that could be an evaluation question."""
    yield from example.questions
    for message in example.messages:
        if message["role"] in ("system", "user"):
            yield message["content"]
