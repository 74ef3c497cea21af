"""read and inspect: rows of a file -> examples, with everything counted."""

from __future__ import annotations

import itertools
import logging
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from .adapter import Context, Record, Row, rename
from .containers import open_source
from .detect import SAMPLE, detect
from .errors import DataFormatError, SkipRow, nearest
from .example import Example
from .formats import FORMATS
from .inspection import Inspection
from .options import Options, listed

_log = logging.getLogger(__name__)


def read(path: str | Path, format: str = "auto", **options: Any) -> Reader:
    """The examples of a file, folder, hub data set or "reasoning_gym:<name>", one at a time.

    `format` is a name in FORMATS, or "auto": told from the content. Options are in `Options`. The iterator's
    `inspection` holds the counts so far; when rows were set aside, a warning with the reasons is logged at the end.
    Raises DataFormatError, and nothing else, for a file that cannot be read: at once for what can be seen in its first
    rows, otherwise where the fault stands.
    """
    return Reader(path, format, Options.of(options), log=True)


def inspect(path: str | Path, format: str = "auto", **options: Any) -> Inspection:
    """Read all of it and count: rows read, kept, changed and skipped, by kind, with row numbers."""
    reader = Reader(path, format, Options.of(options), log=False)
    for example in reader:
        reader.inspection.add_example(example)
    return reader.inspection


class Reader(Iterator[Example]):
    """An iterator over examples that counts as it goes (`inspection`)."""

    def __init__(self, path: str | Path, format: str, options: Options, *, log: bool) -> None:
        self._options, self._log_at_end = options, log
        self._named_path = self._stem = ""
        if format != "auto" and format not in FORMATS:
            close = nearest(format, FORMATS)
            hint = f"did you mean {close!r}? " if close else ""
            raise DataFormatError(
                f"unknown format {format!r}", f"{hint}Formats are: auto, {', '.join(FORMATS)}", path=path
            )
        self._source = open_source(str(path), options)
        self.inspection = Inspection(str(path), container=self._source.container, notes=self._source.notes)
        records = self._rows(self._source.records)
        head = list(itertools.islice(records, SAMPLE))
        if not head:
            raise self._nothing_left()
        why = "chosen by the user"
        if format == "auto":
            try:
                format, why = detect([record.row for record in head], options.columns)
            except DataFormatError as error:
                raise error.at(path, None, self._source.unit) from None
        self.inspection.format, self.inspection.why = format, why
        self._adapter = FORMATS[format]
        if self._adapter.note:
            self.inspection.notes.append(self._adapter.note)
        self._check_columns()
        every = itertools.chain(head, records)
        self._examples = self._convert(self._adapter.expand(every) if self._adapter.expand else every)

    def __next__(self) -> Example:
        return next(self._examples)

    def _rows(self, records: Iterator[Record | DataFormatError]) -> Iterator[Record]:
        """Records with the user's filter applied and columns renamed; faults are raised or counted."""
        wanted = {
            name: {str(item) for item in (value if isinstance(value, (list, tuple)) else [value])}
            for name, value in self._options.filter.items()
        }
        for record in records:
            if isinstance(record, DataFormatError):
                self._fault(record)
                continue
            try:
                refused = _refusal(record.row, wanted)
                if self._options.columns and not refused:
                    record = record._replace(row=rename(record.row, self._options.columns))
            except DataFormatError as error:
                self._fault(error.at(record.path, record.number, self._source.unit))
                continue
            if refused:
                self.inspection.skip(self._place(record), refused)
            else:
                yield record

    def _convert(self, records: Iterator[Record]) -> Iterator[Example]:
        counts = self.inspection
        for record in records:
            changes: Counter[str] = Counter(record.changes)
            try:
                example = self._adapter.convert(record.row, Context(self._options, self._adapter, changes))
            except SkipRow as skipped:
                counts.skip(self._place(record), skipped.reason)
                continue
            except DataFormatError as error:
                self._fault(error.at(record.path, record.number, self._source.unit))
                continue
            counts.keep(self._place(record), changes)
            yield self._named(example, record)
            if counts.kept == self._options.limit:
                break
        if not counts.kept:
            raise self._nothing_left()
        if self._log_at_end and counts.skipped:
            _log.warning(
                "%s: %d of %d rows were set aside: %s", counts.path, counts.skipped, counts.read, counts.reasons()
            )

    def _named(self, example: Example, record: Record) -> Example:
        """With its id and the place it came from."""
        if record.path != self._named_path:
            self._named_path, self._stem = record.path, self._file_name(record.path).split(".")[0]
        stem = self._stem
        row = record.row
        own = example.meta.pop("id", None)
        if own is None:
            own = next(
                (row[name] for name in _ID_COLUMNS if isinstance(row.get(name), (str, int)) and row[name] != ""), None
            )
        example.id = f"{stem}:{record.number}" if own is None else str(own)
        example.meta.update(source=stem, format=self.inspection.format, row=record.number)
        return example

    def _file_name(self, path: str) -> str:
        """The file's name, with its folders inside the folder that is read."""
        return str(Path(path).relative_to(self.inspection.path)) if self._source.several else Path(path).name

    def _place(self, record: Record) -> int | str:
        return f"{self._file_name(record.path)}:{record.number}" if self._source.several else record.number

    def _fault(self, error: DataFormatError) -> None:
        if self._options.bad_rows == "error":
            raise error
        place = f"{self._file_name(error.path)}:{error.row}" if self._source.several and error.path else error.row
        self.inspection.skip(place or 0, error.found)

    def _nothing_left(self) -> DataFormatError:
        counts = self.inspection
        if not counts.read:
            return DataFormatError("no rows", "The file must hold at least one row", path=counts.path)
        kind = f"Read as {counts.format} ({counts.why})" if counts.format else "Read before its format was known"
        return DataFormatError(
            f"none of its {counts.read} rows can be used: {counts.reasons()}",
            f"{kind}; check the format and the columns",
            path=counts.path,
        )

    def _check_columns(self) -> None:
        for name in self._options.columns:
            if name not in self._adapter.columns:
                close = nearest(name, self._adapter.columns)
                hint = f"did you mean {close!r}? " if close else ""
                raise DataFormatError(
                    f"columns.{name}: the format {self.inspection.format} reads no such column",
                    f"{hint}It reads: {listed(self._adapter.columns)}",
                    path=self.inspection.path,
                )


_ID_COLUMNS = ("id", "ID", "unique_id", "qid", "idx", "conversation_id", "task_id", "uuid", "index")


def _refusal(row: Row, wanted: Mapping[str, set[str]]) -> str | None:
    """Why the user's filter refuses a row, or None. Raises DataFormatError when it names a column the row lacks."""
    if not row:
        return "empty row"
    for name, values in wanted.items():
        if name not in row:
            close = nearest(name, row)
            raise DataFormatError(
                f"filter.{name} names a column that is not there; columns found: {listed(repr(n) for n in row)}",
                f"The nearest is {close!r}" if close else "Name one of them",
            )
        if str(row[name]) not in values:  # a CSV file holds "5" where the user writes 5
            return f"filtered out by {name}"
    return None
