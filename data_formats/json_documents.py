"""Rows of a JSON text that is not JSON Lines: an array, an object of rows, an object around an array, a single row.

Streamed: one row at a time, whatever the size of the array.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import IO, Any

from .adapter import Record, Row
from .errors import DataFormatError, shorten
from .json_rows import BLOCK, JsonReader, explain
from .options import listed

# Keys under which files keep their list of rows. (`messages`, `conversations` and the like belong to a single row.)
SPLITS = ("train", "training", "validation", "valid", "val", "dev", "test")
WRAPPERS = ("data", "rows", "examples", "records", "items", "samples", "questions", "problems", "dataset", *SPLITS)
_BLANK = " \t\r\n\ufeff"


class Documents:
    """Walks a JSON text. `records` yields its rows; `split` chooses among several lists of rows."""

    def __init__(self, text: IO[str], path: str, split: str | None, notes: list[str]) -> None:
        self._text, self._path, self._split, self._notes = text, path, split, notes
        self._reader = JsonReader()
        self._buffer, self._at, self._ended = "", 0, False
        self._number = 0

    def records(self) -> Iterator[Record | DataFormatError]:
        """The rows, numbered from 1. Raises DataFormatError where the text cannot be followed any further."""
        while start := self._peek():
            if start == "[":
                yield from self._array()
            elif start == "{":
                yield from self._object()
            else:
                raise self._error(f"text that is no JSON object or array: {shorten(self._ahead())}")

    # The text

    def _more(self) -> bool:
        block = "" if self._ended else self._text.read(max(BLOCK, len(self._buffer) - self._at))
        self._ended = not block
        self._buffer, self._at = self._buffer[self._at :] + block, 0
        return not self._ended

    def _peek(self) -> str:
        while True:
            while self._at < len(self._buffer):
                if self._buffer[self._at] not in _BLANK:
                    return self._buffer[self._at]
                self._at += 1
            if not self._more():
                return ""

    def _take(self, expected: str) -> str:
        found = self._peek()
        if not found:
            raise self._error("the file ends in the middle", "It is truncated: get a whole copy")
        if found not in expected:
            raise self._error(f"expected one of {expected} and found {shorten(self._ahead())}")
        self._at += 1
        return found

    def _value(self) -> Any:
        if not self._peek():
            raise self._error("the file ends in the middle", "It is truncated: get a whole copy")
        lax = False
        while True:
            try:
                value, end = self._reader.decode(self._buffer, self._at, lax=lax)
            except json.JSONDecodeError as error:
                if not lax and error.msg.startswith("Invalid control"):
                    lax = True
                    continue
                cut = error.msg.startswith("Unterminated string") or error.pos >= len(self._buffer) - 16
                seen = self._buffer  # error.pos counts in it; reading on moves the buffer
                if cut and self._more():
                    continue
                found, fix = explain(error, seen)
                raise self._error(found, fix) from None
            except (ValueError, RecursionError) as error:
                raise self._error(*explain(error, self._ahead())) from None
            if end == len(self._buffer) and self._more():
                continue  # a number may go on in the next block
            self._at = end
            if lax:
                self._reader.changes.append("bare newline or control character inside a string")
            return value

    def _ahead(self) -> str:
        return self._buffer[self._at : self._at + 60]

    def _error(self, found: str, fix: str = "Mend the file there") -> DataFormatError:
        return DataFormatError(found, fix, path=self._path, row=self._number + 1)

    # Its rows

    def _row(self, value: Any, name: str | None = None) -> Iterator[Record | DataFormatError]:
        if isinstance(value, dict) and "row_idx" in value and isinstance(value.get("row"), dict):
            value = value["row"]  # the hub's rows API
        if name is not None and isinstance(value, dict) and value and all(isinstance(v, dict) for v in value.values()):
            for inner, row in value.items():  # an object of objects of rows: CIMA
                yield from self._row(row, inner)
            return
        if name is not None and value == {}:
            self._notes.append(f"{name!r} is empty")
            return
        changes = self._reader.taken()
        self._number += 1
        if not isinstance(value, dict):
            yield DataFormatError(
                f"a row that is no JSON object: {shorten(value)}",
                'Write {"column": value, ...}',
                path=self._path,
                row=self._number,
            )
            return
        yield Record(value if name is None else {"id": name, **value}, self._number, self._path, changes)

    def _array(self) -> Iterator[Record | DataFormatError]:
        self._take("[")
        if self._peek() == "]":
            self._at += 1
            return
        while True:
            yield from self._row(self._value())
            if self._take(",]") == "]":
                return

    def _object(self) -> Iterator[Record | DataFormatError]:
        """An object of objects is one of rows; one with a list of objects under a known key wraps that list."""
        self._take("{")
        pairs: Row = {}
        lists: list[str] = []
        rows = False
        closed = self._peek() == "}"
        self._at += closed
        while not closed:
            name = self._value()
            if not isinstance(name, str):
                raise self._error(f"a key that is no text: {shorten(name)}")
            if name in pairs:
                raise self._error(f"the key {name!r} stands twice", "Keep one of them")
            self._take(":")
            if name.casefold() in (*WRAPPERS, self._split) and self._peek() == "[" and self._opens_rows():
                lists.append(name)
                if self._split is None and len(lists) > 1:
                    raise self._error(
                        f"several lists of rows: {listed(map(repr, lists))}", f"Choose one: split={lists[0]!r}"
                    )
                if self._split in (None, name) or (self._split not in SPLITS and len(lists) == 1):
                    yield from self._array()
                else:
                    self._value()
            else:
                value = self._value()
                if rows or (pairs and all(isinstance(v, dict) for v in (*pairs.values(), value)) and len(pairs) == 1):
                    if not isinstance(value, dict):
                        raise self._error(f"rows by name, and {name!r} that is none: {shorten(value)}")
                    if not rows:
                        first_name, first = pairs.popitem()
                        yield from self._row(first, first_name)
                    rows = True
                    yield from self._row(value, name)
                else:
                    pairs[name] = value
            closed = self._take(",}") == "}"
        if lists:
            if pairs:
                self._notes.append(f"beside {lists[0]!r} the file holds {listed(map(repr, pairs))}, which are not rows")
        elif len(pairs) == 1 and isinstance(value := next(iter(pairs.values())), dict):
            yield from self._row(value, next(iter(pairs)))
        elif not rows:
            yield from self._row(pairs)

    def _opens_rows(self) -> bool:
        """Whether the array at hand starts with an object that is a row, not a turn with a role."""
        at = self._at + 1
        while True:
            rest = self._buffer[at:].lstrip(_BLANK)
            if len(rest) > 400 or not self._more_from_here():
                break
            at = self._at + 1
        if rest.startswith("]"):
            return True
        return rest.startswith("{") and not any(f'"{key}"' in rest[:40] for key in ("role", "content", "from", "value"))

    def _more_from_here(self) -> bool:
        block = "" if self._ended else self._text.read(BLOCK)
        self._ended = not block
        self._buffer, self._at = self._buffer[self._at :] + block, 0
        return not self._ended
