"""Which format a file has, told from its rows, and why."""

from __future__ import annotations

from collections.abc import Iterable

from .adapter import Adapter, Row
from .errors import DataFormatError, nearest
from .formats import FORMATS
from .options import listed

SAMPLE = 64  # rows looked at


def detect(rows: list[Row], columns: Iterable[str] = ()) -> tuple[str, str]:
    """(format, why) of the first rows of a file, among the formats that read the `columns` the user has named.

    Every format that fits a row is a candidate for it; the highest rank wins (Adapter.rank). Rows that no format fits
    are left to the reading, which names their fault. Raises DataFormatError when no format fits any row, when two of
    the same rank fit, or when rows fit different formats.
    """
    candidates = {name: adapter for name, adapter in FORMATS.items() if set(columns) <= set(adapter.columns)}
    votes: dict[str, tuple[int, str]] = {}
    first_row: dict[str, int] = {}
    for number, row in enumerate(rows, 1):
        fitting = {name: why for name, adapter in candidates.items() if (why := adapter.fits(row)) is not None}
        if not fitting:
            continue
        best = max(FORMATS[name].rank for name in fitting)
        names = [name for name in fitting if FORMATS[name].rank == best]
        if len(names) > 1:
            raise DataFormatError(
                f"record {number} fits {' and '.join(names)} equally ({'; '.join(fitting[name] for name in names)})",
                f"Choose one: format={names[0]!r} or format={names[1]!r}",
            )
        count = votes.get(names[0], (0, ""))[0]
        votes[names[0]] = (count + 1, fitting[names[0]])
        first_row.setdefault(names[0], number)
    if not votes:
        raise _nothing_fits(rows[0])
    chosen = _one_of(votes)
    if chosen is None:
        shown = ", ".join(f"{name} (first in record {first_row[name]})" for name in votes)
        raise DataFormatError(
            f"rows of different formats in one file: {shown}", "Split the file, or choose one with format='...'"
        )
    count, why = votes[chosen]
    return chosen, f"{why} ({count} of the first {len(rows)} rows)"


# A few rows of a file may lack what tells a format from its plainer sibling: GSM8K rows without "####", say.
_PLAINER = {
    "gsm8k": ("qa_answer",),
    "gsm8k_socratic": ("gsm8k", "qa_answer"),
    "metamath": ("query_response",),
    "mathinstruct": ("alpaca",),
    "tool_integrated": ("messages",),
    "verl": ("prompt_only",),
}


def _one_of(votes: dict[str, tuple[int, str]]) -> str | None:
    """The one format all rows can be read in; None when there is none."""
    if len(votes) == 1:
        return next(iter(votes))
    for name in votes:
        if all(other == name or other in _PLAINER.get(name, ()) for other in votes):
            return name
    return None


def _nothing_fits(row: Row) -> DataFormatError:
    best: tuple[float, str, Adapter] | None = None
    plain = {str(column).strip().casefold() for column in row}
    for name, adapter in FORMATS.items():
        if name == "custom":
            continue  # it takes whatever the user names, so it is near to everything
        score = 0.0
        for column in adapter.required:
            alike = 0.9 if column.casefold() in plain else 0.4 if nearest(column, row) else 0.0
            score += 1.0 if column in row else alike
        score /= len(adapter.required) + 0.5
        if best is None or score > best[0]:
            best = (score, name, adapter)
    assert best is not None
    _, name, adapter = best
    wrong = [column for column in adapter.required if column not in row]
    close = {column: nearest(column, row) for column in wrong}
    renaming = ", ".join(f"{column}: {found!r}" for column, found in close.items() if found)
    if not wrong:
        guess = f"The nearest format is {name}, but its columns hold something else than it expects; say format={name!r} to see what"
    elif renaming:
        guess = f"The nearest format is {name}, which expects {listed(adapter.required)}: try columns={{{renaming}}}"
    else:
        guess = "Name the columns, for instance columns={question: 'its name', answer: 'its name'}, or choose a format"
    return DataFormatError(
        f"no known format fits; columns found: {listed(repr(column) for column in row)}",
        f"{guess}. Formats are: {', '.join(FORMATS)}",
    )
