"""The options every adapter understands. One table, in Options."""

from __future__ import annotations

import codecs
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, fields
from typing import Any

from .errors import DataFormatError, nearest, shorten


@dataclass(frozen=True)
class Options:
    """Options of `read` and `inspect`; unknown ones are errors.

    | option | default | what it does |
    |---|---|---|
    | columns | {} | the format's column -> the file's column: {"question": "my_col"} |
    | filter | {} | the file's column -> the value or values to keep: {"level": ["Level 5"]}; the rest is counted as skipped |
    | roles | {} | more speaker names: {"lehrer": "assistant"} |
    | encoding | None | of a text file; None: UTF-8, or what its byte-order mark says |
    | split | None | part of a folder, saved `datasets` folder or hub data set: "train" |
    | config | None | configuration of a hub data set: "main" |
    | limit | None | stop after this many examples |
    | bad_rows | "error" | "error": a row that cannot be parsed or lacks a column stops the reading; "skip": it is counted |
    | strip_calculator | True | remove GSM8K's <<48/2=24>> marks |
    | boxed_answer | True | a solution that ends in "#### 72" is taught as "The answer is \\boxed{72}." |
    | ground_truth_in_system | False | tutoring: put the reference solution into the tutor's system prompt |
    | opening | "Hello." | the user turn put before a dialogue that the assistant begins |
    | seed, size, params | 0, 1000, {} | reasoning_gym only: which problems, how many, and the generator's own parameters |
    """

    columns: Mapping[str, str] = field(default_factory=dict)
    filter: Mapping[str, Any] = field(default_factory=dict)
    roles: Mapping[str, str] = field(default_factory=dict)
    encoding: str | None = None
    split: str | None = None
    config: str | None = None
    limit: int | None = None
    bad_rows: str = "error"
    strip_calculator: bool = True
    boxed_answer: bool = True
    ground_truth_in_system: bool = False
    opening: str = "Hello."
    seed: int = 0
    size: int = 1000
    params: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name in ("columns", "filter", "roles", "params"):
            if not isinstance(getattr(self, name), Mapping):
                raise _wrong(name, getattr(self, name), "a mapping")
        for name in ("columns", "roles"):
            for key, value in getattr(self, name).items():
                if not isinstance(key, str) or not isinstance(value, str):
                    raise _wrong(name, {key: value}, "a mapping of names to names")
        for name in ("strip_calculator", "boxed_answer", "ground_truth_in_system"):
            if not isinstance(getattr(self, name), bool):
                raise _wrong(name, getattr(self, name), "true or false")
        for role in self.roles.values():
            if role not in ("system", "user", "assistant", "tool"):
                raise _wrong("roles", role, "one of system, user, assistant, tool")
        if self.bad_rows not in ("error", "skip"):
            raise _wrong("bad_rows", self.bad_rows, '"error" or "skip"')
        for name in ("seed", "size"):
            if isinstance(getattr(self, name), bool) or not isinstance(getattr(self, name), int):
                raise _wrong(name, getattr(self, name), "a whole number")
        if self.size < 1:
            raise _wrong("size", self.size, "at least 1")
        if self.limit is not None and (
            isinstance(self.limit, bool) or not isinstance(self.limit, int) or self.limit < 1
        ):
            raise _wrong("limit", self.limit, "a whole number of at least 1, or none")
        if not isinstance(self.opening, str) or not self.opening.strip():
            raise _wrong("opening", self.opening, "a text that is not blank")
        if self.encoding is not None:
            try:
                codecs.lookup(self.encoding)
            except (LookupError, TypeError, ValueError):
                raise _wrong(
                    "encoding", self.encoding, "an encoding Python knows, such as cp1252, gbk or utf-16"
                ) from None

    @classmethod
    def of(cls, options: Mapping[str, Any]) -> Options:
        """Options from keyword arguments. Raises DataFormatError for an unknown name, with the nearest known one."""
        known = [f.name for f in fields(cls)]
        for name in options:
            if name not in known:
                close = nearest(name, known)
                hint = f"did you mean {close!r}? " if close else ""
                raise DataFormatError(f"unknown option {name!r}", f"{hint}Options are: {', '.join(known)}")
        return cls(**options)


def _wrong(name: str, value: object, expected: str) -> DataFormatError:
    return DataFormatError(f"option {name} is {shorten(value)}", f"It must be {expected}")


def listed(names: Iterable[str]) -> str:
    """Names as a message shows them; long lists are cut."""
    names = [str(name)[:40] for name in names]
    return ", ".join(names[:20]) + (f", … ({len(names)} in all)" if len(names) > 20 else "") or "(none)"
