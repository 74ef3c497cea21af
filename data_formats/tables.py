"""Rows of CSV, TSV, Parquet, Arrow and ASDiv's XML, streamed."""

from __future__ import annotations

import csv
from collections.abc import Iterator
from typing import IO, Any

from .adapter import Record, Row
from .errors import DataFormatError, shorten
from .options import listed

_DELIMITERS = ",;\t|"
_BATCH = 256  # rows decoded at a time


def delimiter_of(header: str) -> str:
    """The delimiter of a header line: the one that stands most often outside quotes; a comma when none does."""
    counts = dict.fromkeys(_DELIMITERS, 0)
    quoted = False
    for character in header:
        if character == '"':
            quoted = not quoted
        elif not quoted and character in counts:
            counts[character] += 1
    best = max(counts, key=lambda name: counts[name])
    return best if counts[best] else ","


def csv_rows(text: IO[str], path: str, delimiter: str) -> Iterator[Record | DataFormatError]:
    """Records of a CSV text with a header. A blank cell is "". Numbers are those of the records, the header not
    counted.

    A row with more or fewer cells than the header comes out as a DataFormatError. An Excel `sep=;` line is passed over.
    """
    csv.field_size_limit(2**31 - 1)  # the default of 128 KiB is less than a long dialogue
    reader = csv.reader(text, delimiter=delimiter, strict=True)
    header: list[str] | None = None
    number = 0
    while True:
        try:
            cells = next(reader)
        except StopIteration:
            break
        except csv.Error as error:
            raise DataFormatError(
                f"CSV that cannot be parsed ({error})",
                f"Quote cells that hold {shorten(delimiter)}, quotes or newlines, and double the quotes inside",
                path=path,
                row=number + 1,
            ) from None
        if header is None:
            if not "".join(cells).strip() or "".join(cells).casefold() in ("sep=", f"sep={delimiter}"):
                continue
            header = cells
            twice = sorted({name for name in header if name and header.count(name) > 1})
            if twice:
                raise DataFormatError(
                    f"the header names {listed(map(repr, twice))} twice", "Rename one of them", path=path
                )
            continue
        if not cells:
            continue  # a blank line
        number += 1
        if len(cells) != len(header):
            yield DataFormatError(
                f"{len(cells)} cells, while the header has {len(header)} ({listed(header)}): {shorten(delimiter.join(cells))}",
                f"Quote cells that hold {shorten(delimiter)}, or add the missing ones",
                path=path,
                row=number,
            )
        elif not any(cell.strip() for cell in cells):
            yield Record({}, number, path)
        else:
            yield Record({name: cell for name, cell in zip(header, cells, strict=True) if name}, number, path)
    if number == 0:
        raise DataFormatError("a header and no rows" if header else "no rows", "Add rows", path=path)


def parquet_rows(file: IO[bytes], path: str) -> Iterator[Record]:
    """Records of a Parquet file, a few hundred at a time."""
    import pyarrow
    import pyarrow.parquet

    try:
        table = pyarrow.parquet.ParquetFile(file)
        yield from _batches(table.iter_batches(_BATCH), path, 0)
    except (pyarrow.ArrowException, OSError, ValueError, OverflowError) as error:
        raise _unreadable("Parquet", error, path) from None


def arrow_rows(file: IO[bytes], path: str, before: int = 0) -> Iterator[Record]:
    """Records of an Arrow file or stream (what `datasets` saves), numbered after the `before` rows of earlier files."""
    import pyarrow

    try:
        if file.read(6) == b"ARROW1":
            file.seek(0)
            whole = pyarrow.ipc.open_file(file)
            batches: Any = (whole.get_batch(index) for index in range(whole.num_record_batches))
        else:
            file.seek(0)
            batches = pyarrow.ipc.open_stream(file)
        yield from _batches(batches, path, before)
    except (pyarrow.ArrowException, OSError, ValueError, OverflowError) as error:
        raise _unreadable("Arrow", error, path) from None


def _batches(batches: Any, path: str, number: int) -> Iterator[Record]:
    for batch in batches:
        for start in range(0, batch.num_rows, _BATCH):
            for row in batch.slice(start, _BATCH).to_pylist():
                number += 1
                yield Record(row, number, path)


def _unreadable(kind: str, error: Exception, path: str) -> DataFormatError:
    if isinstance(error, DataFormatError):
        return error
    return DataFormatError(
        f"{kind} that cannot be read ({str(error)[:200]})", "Get a whole copy of the file", path=path
    )


def xml_rows(file: IO[bytes], path: str) -> Iterator[Record]:
    """Records of ASDiv's XML: each <Problem ID= Grade= Source=> with its child elements' text.

    Entities defined in the file are refused: data has no use for them, and they can blow up memory.
    """
    import xml.etree.ElementTree as ElementTree

    events = ElementTree.iterparse(file, events=("start", "end"))
    number = 0
    parents: list[Any] = []
    try:
        for event, element in events:
            if event == "start":
                parents.append(element)
                continue
            parents.pop()
            if element.tag == "Problem":
                number += 1
                row: Row = dict(element.attrib)
                for child in element:
                    row[child.tag] = "".join(child.itertext()).strip()
                yield Record(row, number, path)
            if element.tag == "Problem" or not parents:
                element.clear()
                if parents:
                    parents[-1].remove(element)
    except (ElementTree.ParseError, ValueError, LookupError) as error:
        raise DataFormatError(
            f"XML that cannot be parsed ({error})", "Mend the file there", path=path, row=number + 1
        ) from None
    if not number:
        raise DataFormatError(
            "XML without <Problem> elements", "Only ASDiv's XML is read: convert the rest to JSON", path=path
        )
