"""What an adapter is, and the few helpers adapters share."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

from .dialogue import canonical, clean_text
from .errors import DataFormatError, SkipRow, nearest, shorten
from .example import Example, Message
from .gold import is_sentinel, to_answer, type_of
from .options import Options, listed

Row = dict[str, Any]


class Record(NamedTuple):
    """A row and where it stood: `number` is 1-based, a line of a JSONL file or a row of any other."""

    row: Row
    number: int
    path: str
    changes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Adapter:
    """One format.

    convert: row, context -> the row's example. It may raise SkipRow, and DataFormatError for a column that is missing
        or of a wrong kind.
    fits: what in the row shows that it is of this format ("columns question and answer, '####' in answer"), or None.
    columns: the columns it reads; the ones in `required` must be there.
    rank: 3 a data set's own signature, 2 a family's columns, 1 two columns many sets share. format=auto takes the
        highest rank that fits and refuses when two formats of that rank do.
    expand: for formats whose records are not examples one by one (several dialogues in a row, a tree over many rows):
        records -> records that are.
    note: what whoever reads such data must know (a licence that forbids training), shown by `inspect`.
    """

    convert: Callable[[Row, Context], Example]
    fits: Callable[[Row], str | None]
    columns: tuple[str, ...]
    required: tuple[str, ...]
    rank: int
    expand: Callable[[Iterator[Record]], Iterator[Record]] | None = None
    note: str | None = None


@dataclass
class Context:
    """What an adapter knows besides the row; `changes` is where it counts what it had to change."""

    options: Options
    adapter: Adapter
    changes: Counter[str]

    def text(self, row: Row, column: str, *, required: bool = True) -> str:
        """The text in `column`, cleaned, "" when it is absent or null and not required.

        Numbers and booleans are written as text. Raises DataFormatError for a missing column or a list or object in it,
        and SkipRow when a required one is blank.
        """
        if column not in row:
            if not required:
                return ""
            raise missing_column(column, row, self.adapter)
        value = row[column]
        if not isinstance(value, str):
            if isinstance(value, (list, dict)):
                kind = "a list" if isinstance(value, list) else "an object"
                raise DataFormatError(f"column {column!r} holds {kind}: {shorten(value)}", "It must hold text")
            value = to_answer(value) or ""
        if required and not value.strip():
            raise SkipRow(f"{column} is blank")
        return clean_text(value, self.changes)

    def listed(self, row: Row, column: str) -> list[Any]:
        """The list in `column`; [] when it is absent or null. Raises DataFormatError when it holds anything else."""
        value = row.get(column)
        if value is None:
            return []
        if not isinstance(value, list):
            raise DataFormatError(f"column {column!r} holds {shorten(value)}", "It must hold a list")
        return value

    def dialogue(self, turns: object, *, prompt_only: bool = False) -> list[Message]:
        """Canonical messages of raw turns; changes are counted."""
        return canonical(
            turns, self.changes, opening=self.options.opening, prompt_only=prompt_only, roles=self.options.roles
        )

    def problem(
        self,
        question: str,
        target: str | None,
        *,
        answer: str | None = None,
        solution: str | None = None,
        answer_type: str | None = None,
        system: str = "",
        meta: Mapping[str, Any] | None = None,
    ) -> Example:
        """A single-turn example: the question and, when `target` is a text, the assistant's turn."""
        messages: list[Message] = [{"role": "system", "content": system}] if system.strip() else []
        messages.append({"role": "user", "content": question})
        if target is not None and target.strip():
            messages.append({"role": "assistant", "content": target, "train": True})
        elif answer is None:
            raise SkipRow("neither a solution nor an answer")
        return example(messages, answer=answer, solution=solution, answer_type=answer_type, meta=meta)


def example(
    messages: list[Message],
    *,
    answer: str | None = None,
    solution: str | None = None,
    answer_type: str | None = None,
    meta: Mapping[str, Any] | None = None,
) -> Example:
    """An Example with the answer's type named and teacher moves taken from the turns into meta["moves"]."""
    meta = dict(meta or {})
    if any("moves" in message for message in messages):
        meta["moves"] = [message.pop("moves", []) for message in messages if message["role"] == "assistant"]
        for message in messages:
            message.pop("moves", None)
    if answer is not None and answer_type is None:
        answer_type = type_of(answer)
    return Example(messages, answer, answer_type, solution or None, "", meta)


def gold(value: Any) -> str | None:
    """The answer a column states; None for null, blanks and words that mean there is none (proof, notfound)."""
    answer = to_answer(value)
    return None if answer is None or is_sentinel(answer) else answer


def has(row: Row, *columns: str) -> bool:
    """Whether all columns are there."""
    return all(column in row for column in columns)


def first_of(row: Row, columns: tuple[str, ...]) -> str | None:
    """The first of these columns that is there."""
    return next((column for column in columns if column in row), None)


def is_text(row: Row, *columns: str) -> bool:
    """Whether all columns are there and hold text."""
    return all(isinstance(row.get(column), str) for column in columns)


def pick(row: Row, *columns: str) -> Row:
    """The named columns that are there and not null, for meta."""
    return {column: row[column] for column in columns if row.get(column) is not None}


def missing_column(column: str, row: Row, adapter: Adapter) -> DataFormatError:
    """A column mistake: the columns found, the ones expected, the nearest match, and the option that mends it."""
    close = nearest(column, row)
    guess = (
        f"The nearest column is {close!r}: try columns={{{column}: {close!r}}}"
        if close
        else (f"Name it with columns={{{column}: 'its name in the file'}}, or choose another format")
    )
    return DataFormatError(
        f"no column {column!r}; columns found: {listed(repr(name) for name in row)}",
        f"Expected columns: {listed(adapter.required)}. {guess}",
    )


def rename(row: Row, columns: Mapping[str, str]) -> Row:
    """The row with the format's column names. Raises DataFormatError when a named column is not in the file."""
    renamed = {name: value for name, value in row.items() if name not in columns and name not in columns.values()}
    for name, source in columns.items():
        if source not in row:
            close = nearest(source, row)
            raise DataFormatError(
                f"columns.{name} names {source!r}, which is not in the file; columns found: {listed(repr(n) for n in row)}",
                f"The nearest is {close!r}" if close else "Name one of them",
            )
        renamed[name] = row[source]
    return renamed
