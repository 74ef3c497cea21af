"""Several sources read as one, and splits that never put a problem on both sides."""

from __future__ import annotations

import hashlib
import random
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from .errors import DataFormatError, shorten
from .example import Example, question_key
from .reader import read


@dataclass(frozen=True)
class Source:
    """One source of a mixture.

    path, format, options: as in `read` (columns, filter and so on are options).
    weight: its share of the mixture, relative to the other weights; all sources have one or none has.
    cap: at most this many of its examples, drawn evenly from the whole source (they are held in memory).
    """

    path: str | Path
    format: str = "auto"
    weight: float | None = None
    cap: int | None = None
    options: Mapping[str, Any] = field(default_factory=dict)


class Mixture(Iterator[Example]):
    """The examples of several sources, deterministic under `seed`; `taken` counts them by path as they come.

    Without weights: all of the first source, then all of the second, and so on. With weights: each next example comes
    from a source drawn by weight, and the mixture ends when the drawn source has no more, since the shares could not be
    kept beyond; `ended_by` then names it. Sources are streamed. Raises DataFormatError for impossible weights or caps
    and for bad files.
    """

    def __init__(self, sources: Iterable[Source], seed: int = 0) -> None:
        self._sources = list(sources)
        self.taken: Counter[str] = Counter()
        self.ended_by: str | None = None
        _check(self._sources)
        self._examples = self._weighted(seed) if self._sources[0].weight is not None else self._one_by_one(seed)

    def __next__(self) -> Example:
        return next(self._examples)

    def _one_by_one(self, seed: int) -> Iterator[Example]:
        for place, source in enumerate(self._sources):
            for example in _examples(source, seed + place):
                self.taken[str(source.path)] += 1
                yield example

    def _weighted(self, seed: int) -> Iterator[Example]:
        draw = random.Random(seed)
        streams = [_examples(source, seed + place) for place, source in enumerate(self._sources)]
        weights = [source.weight or 0.0 for source in self._sources]
        while True:
            place = draw.choices(range(len(streams)), weights)[0]
            example = next(streams[place], None)
            if example is None:
                self.ended_by = str(self._sources[place].path)
                return
            self.taken[str(self._sources[place].path)] += 1
            yield example


def _check(sources: list[Source]) -> None:
    if not sources:
        raise DataFormatError("a mixture of no sources", "Name at least one")
    weights = [source.weight for source in sources]
    if any(weight is None for weight in weights) and any(weight is not None for weight in weights):
        raise DataFormatError(
            f"weights {weights}: some sources have one, some have none", "Give all of them a weight, or none"
        )
    for source in sources:
        if source.weight is not None and not 0 < source.weight < float("inf"):
            raise DataFormatError(f"weight {shorten(source.weight)}", "A weight is above 0", path=source.path)
        if source.cap is not None and source.cap < 1:
            raise DataFormatError(f"cap {shorten(source.cap)}", "A cap is at least 1", path=source.path)


def _examples(source: Source, seed: int) -> Iterator[Example]:
    examples: Iterator[Example] = read(source.path, source.format, **source.options)
    return examples if source.cap is None else iter(sample(examples, source.cap, seed))


def sample(examples: Iterable[Example], count: int, seed: int) -> list[Example]:
    """`count` examples drawn evenly, or all when there are fewer, in their order. Holds `count` in memory."""
    draw = random.Random(seed)
    kept: list[tuple[int, Example]] = []
    for number, example in enumerate(examples):
        if len(kept) < count:
            kept.append((number, example))
        elif (place := draw.randrange(number + 1)) < count:
            kept[place] = (number, example)
    return [example for _, example in sorted(kept, key=lambda pair: pair[0])]


def problem_key(example: Example) -> str:
    """The key of the problem an example is about: of the question it was rewritten from, where there is one."""
    return question_key(example.questions[-1])


def split_by_problem(
    examples: Iterable[Example], fraction: float, seed: int = 0
) -> tuple[list[Example], list[Example]]:
    """(train, held out): `fraction` of the problems, not of the rows, is held out, so that no problem stands on both
    sides.

    Which ones depends on `seed` and the problems alone, not on their order. At least one problem stays on each side
    when there are two or more. Raises ValueError unless 0 < fraction < 1.
    """
    if not 0 < fraction < 1:
        raise ValueError(f"fraction is {fraction}: it must stand between 0 and 1")
    order = [(problem_key(example), example) for example in examples]
    ranked = sorted(
        {key for key, _ in order}, key=lambda key: hashlib.blake2b(f"{seed}:{key}".encode(), digest_size=8).digest()
    )
    count = min(max(round(fraction * len(ranked)), 1), len(ranked) - 1)
    held = set(ranked[:count])
    return [e for key, e in order if key not in held], [e for key, e in order if key in held]
