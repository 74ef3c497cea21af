"""Rows of JSON Lines and JSON text, streamed: no more than one row and one block of text in memory."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import IO, Any

from .adapter import Record
from .errors import DataFormatError, shorten

BLOCK = 1 << 16  # characters read at a time
_JOIN_LINES = 200  # lines a string with a bare newline may span


class _Duplicate(ValueError):
    """A key stands twice in one object with different values."""


class JsonReader:
    """Decodes rows; `changes` collects what was repaired in the row at hand."""

    def __init__(self) -> None:
        self.changes: list[str] = []
        self._strict = json.JSONDecoder(object_pairs_hook=_object, parse_constant=self._constant)
        self._lax = json.JSONDecoder(object_pairs_hook=_object, parse_constant=self._constant, strict=False)

    def _constant(self, _: str) -> None:
        self.changes.append("NaN or Infinity read as missing")

    def decode(self, text: str, position: int = 0, *, lax: bool = False) -> tuple[Any, int]:
        """(value, end) at `position`; `lax` takes control characters in strings. May raise ValueError, RecursionError."""
        return (self._lax if lax else self._strict).raw_decode(text, position)

    def taken(self) -> tuple[str, ...]:
        """The changes since the last call."""
        changes, self.changes = tuple(dict.fromkeys(self.changes)), []
        return changes


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    value = dict(pairs)
    if len(value) != len(pairs):
        for name, item in pairs:
            if value[name] != item:
                raise _Duplicate(f"the key {name!r} stands twice with different values")
    return value


def explain(error: ValueError | RecursionError, text: str) -> tuple[str, str]:
    """(found, fix) for JSON that does not parse."""
    start = text.lstrip()[:200]
    if isinstance(error, RecursionError):
        return "JSON nested too deeply", "Flatten the row"
    if isinstance(error, _Duplicate):
        return str(error), "Keep one of them"
    if start.startswith(("{'", "[{'", "{None", "{True")):
        return f"a Python literal, not JSON: {shorten(start)}", "Write rows with json.dumps, not str()"
    if not isinstance(error, json.JSONDecodeError):
        return f"JSON that Python cannot hold ({error})", "Write the value as text"
    if error.msg.startswith("Unterminated string") or error.pos >= len(text.rstrip()):
        return (
            f"JSON cut off: {shorten(text[-60:])}",
            "The file or the line is truncated, or a string holds a bare newline: get a whole copy",
        )
    return (
        f"invalid JSON at column {error.pos + 1} ({error.msg}): {shorten(text[error.pos : error.pos + 60])}",
        "Mend that row",
    )


def jsonl(lines: IO[str], path: str) -> Iterator[Record | DataFormatError]:
    """Records of a JSON Lines text, a row a line; blank lines are passed over. Lines end with LF only: U+2028 is text.

    A row whose string holds a bare newline is read together with its next lines and counted as changed. A line that
    cannot be read comes out as a DataFormatError, and the reading can go on after it.
    """
    reader = JsonReader()
    number = 0
    pending: list[str] = []
    while True:
        line = pending.pop() if pending else lines.readline()
        if not line:
            return
        number += 1
        text = line.strip(" \t\r\n\ufeff\x00")
        if not text:
            continue
        first = number
        try:
            value, end = reader.decode(text)
            if end != len(text):
                reader.taken()
                yield DataFormatError(
                    f"text after the row's end: {shorten(text[end:])}",
                    "Write one JSON object a line",
                    path=path,
                    row=first,
                    unit="line",
                )
                continue
        except (ValueError, RecursionError) as error:
            reader.taken()
            following: list[str] = []
            joined = None
            if isinstance(error, json.JSONDecodeError) and error.msg.startswith(
                ("Unterminated string", "Invalid control")
            ):
                joined = _join(reader, text, lines, pending, following)
            if joined is None:
                pending += reversed(following)
                yield DataFormatError(*explain(error, text), path=path, row=first, unit="line")
                continue
            value, number = joined, number + len(following)
            reader.changes.append("bare newline or control character inside a string")
        if not isinstance(value, dict):
            reader.taken()
            yield DataFormatError(
                f"a row that is no JSON object: {shorten(value)}",
                'Write {"column": value, ...}',
                path=path,
                row=first,
                unit="line",
            )
            continue
        yield Record(value, first, path, reader.taken())


def _join(reader: JsonReader, text: str, lines: IO[str], pending: list[str], following: list[str]) -> Any:
    """The value that starts in `text` and goes on over the next lines (added to `following`), or None."""
    while len(following) < _JOIN_LINES and len(text) < BLOCK:
        line = pending.pop() if pending else lines.readline()
        try:
            if not line:
                value, end = reader.decode(text, lax=True)
            else:
                following.append(line)
                text = f"{text}\n{line.rstrip()}"
                value, end = reader.decode(text, lax=True)
        except json.JSONDecodeError as error:
            if not line or not error.msg.startswith("Unterminated string"):
                return None
            continue
        except (ValueError, RecursionError):
            return None
        return value if end == len(text) else None
    return None
