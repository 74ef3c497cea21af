"""Which container a path is, told from its first bytes and not from its name, and its records."""

from __future__ import annotations

import gzip
import io
import itertools
import json
import re
import zlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO

from .adapter import Record
from .errors import DataFormatError, nearest, shorten
from .json_documents import Documents
from .json_rows import jsonl
from .options import Options, listed
from .procedural import PREFIX, generate
from .tables import arrow_rows, csv_rows, delimiter_of, parquet_rows, xml_rows

HEAD = 1 << 16  # bytes looked at
_LONGEST_LINE = 1 << 18  # characters of a line looked at
_SUFFIXES = (".json", ".jsonl", ".ndjson", ".csv", ".tsv", ".parquet", ".arrow", ".xml")
_HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
_BOMS = (
    (b"\xef\xbb\xbf", "utf-8-sig"),
    (b"\xff\xfe\x00\x00", "utf-32"),
    (b"\x00\x00\xfe\xff", "utf-32"),
    (b"\xff\xfe", "utf-16"),
    (b"\xfe\xff", "utf-16"),
)
_REFUSED = (
    (b"PK\x03\x04", "a zip archive or an Excel workbook", "Unpack it, or save the sheet as CSV"),
    (b"BZh", "a bzip2 file", "Unpack it"),
    (b"\xfd7zXZ", "an xz file", "Unpack it"),
    (b"\x28\xb5\x2f\xfd", "a zstandard file", "Unpack it"),
    (b"SQLite format 3", "an SQLite database", "Export the table as CSV"),
    (b"%PDF", "a PDF document", "Give the data as JSON Lines, CSV or Parquet"),
    (b"version https://git-lfs", "a Git LFS pointer: the data itself is not here", "Fetch it with `git lfs pull`"),
    (b"\x80\x02", "a Python pickle", "Pickles can run code and are not read: save it as JSON Lines or Parquet"),
    (b"\x80\x03", "a Python pickle", "Pickles can run code and are not read: save it as JSON Lines or Parquet"),
    (b"\x80\x04", "a Python pickle", "Pickles can run code and are not read: save it as JSON Lines or Parquet"),
    (b"\x80\x05", "a Python pickle", "Pickles can run code and are not read: save it as JSON Lines or Parquet"),
)


@dataclass
class Source:
    """Records and where they come from. `unit` is what a record's number counts: "line" or "row"."""

    records: Iterator[Record | DataFormatError]
    container: str
    unit: str = "row"
    several: bool = False
    notes: list[str] = field(default_factory=list)


def open_source(path: str, options: Options) -> Source:
    """The records of a file, a folder of files, a saved `datasets` folder, a hub data set or "reasoning_gym:<name>".

    Raises DataFormatError for what is not there, not readable or of no known kind.
    """
    if path.startswith(PREFIX):
        return Source(generate(path, options), "reasoning_gym generator")
    place = Path(path)
    try:
        if place.is_dir():
            return _folder(place, options)
        if place.exists():
            if options.split is not None and not _holds_splits(place):
                raise DataFormatError(f"split={options.split!r} of a single file", "Leave split out", path=path)
            return _file(place, options)
    except (OSError, ValueError) as error:
        if isinstance(error, DataFormatError):
            raise
        raise _unopened(path, error) from None
    if _HUB_NAME.fullmatch(path) and place.suffix not in (*_SUFFIXES, ".gz", ".txt"):
        return _hub(path, options)
    close = nearest(place.name, (p.name for p in place.parent.iterdir())) if place.parent.is_dir() else None
    raise DataFormatError("no such file", f"Did you mean {close!r}?" if close else "Check the path", path=path)


def _unopened(path: str, error: Exception) -> DataFormatError:
    if isinstance(error, (EOFError, zlib.error, gzip.BadGzipFile)):
        return DataFormatError(f"a broken gzip file ({error})", "Get a whole copy of the file", path=path)
    return DataFormatError(f"cannot be opened ({error})", "Check the path and its permissions", path=path)


# One file


def _open(place: Path) -> IO[bytes]:
    """The file's bytes, unpacked when they are gzip."""
    file = place.open("rb")
    if file.read(2) == b"\x1f\x8b":
        file.seek(0)
        return gzip.GzipFile(fileobj=file)  # type: ignore[return-value]
    file.seek(0)
    return file


def _file(place: Path, options: Options) -> Source:
    path = str(place)
    try:
        with _open(place) as file:
            head = file.read(HEAD)
    except (OSError, EOFError, zlib.error) as error:
        raise _unopened(path, error) from None
    packed = " in gzip" if place.open("rb").read(2) == b"\x1f\x8b" else ""
    if not head.strip():
        raise DataFormatError("the file is empty", "It must hold at least one row", path=path)
    for start, kind, fix in _REFUSED:
        if head.startswith(start):
            raise DataFormatError(f"the file is {kind}", fix, path=path)
    source = _binary(place, head, packed) or _text(place, head, packed, options)
    source.records = _guarded(source.records, place, options)
    return source


def _binary(place: Path, head: bytes, packed: str) -> Source | None:
    path = str(place)
    if head.startswith(b"PAR1"):
        return Source(parquet_rows(_seekable(place, packed), path), f"Parquet{packed}")
    if head.startswith((b"ARROW1", b"\xff\xff\xff\xff")):
        return Source(arrow_rows(_seekable(place, packed), path), f"Arrow{packed}")
    return None


def _seekable(place: Path, packed: str) -> IO[bytes]:
    if not packed:
        return place.open("rb")
    import tempfile

    unpacked = tempfile.TemporaryFile()
    with _open(place) as file:
        while block := file.read(1 << 20):
            unpacked.write(block)
    unpacked.seek(0)
    return unpacked


def _encoding(head: bytes, options: Options, path: str) -> str:
    marked = next((name for bom, name in _BOMS if head.startswith(bom)), None)
    if options.encoding is not None:
        return "utf-8-sig" if options.encoding.replace("_", "-").casefold() in ("utf-8", "utf8") else options.encoding
    if marked is None and head.count(b"\x00") > len(head) // 4:
        order = "le" if head[1:2] == b"\x00" else "be"
        raise DataFormatError(
            "many zero bytes and no byte-order mark", f"If it is UTF-16, say encoding='utf-16-{order}'", path=path
        )
    return marked or "utf-8-sig"


def _text(place: Path, head: bytes, packed: str, options: Options) -> Source:
    path = str(place)
    encoding = _encoding(head, options, path)

    def text(newline: str = "\n") -> IO[str]:
        return io.TextIOWrapper(_open(place), encoding=encoding, errors="strict", newline=newline)

    try:
        with text() as file:
            start, whole = _first_line(file)
            second = _first_line(file)[0]
    except (UnicodeError, EOFError, OSError, zlib.error) as error:
        raise _undecoded(place, error, options) from None
    if not start:
        raise DataFormatError("the file is empty", "It must hold at least one row", path=path)
    suffix = packed if encoding == "utf-8-sig" else f" in {encoding}{packed}"
    if start.startswith("<"):
        if re.match(r"<!doctype html|<html|<head|<body|<script", start, re.IGNORECASE):
            raise DataFormatError(
                "the file is an HTML page, not data",
                "The download gave an error or a login page: fetch it again",
                path=path,
            )
        return Source(xml_rows(_open(place), path), f"XML{packed}")
    notes: list[str] = []
    if start.startswith("["):
        return Source(Documents(text(), path, options.split, notes).records(), f"JSON array{suffix}", notes=notes)
    if start.startswith("{"):
        if whole and _is_jsonl(start, second):
            return Source(jsonl(text(), path), f"JSON Lines{suffix}", "line")
        return Source(Documents(text(), path, options.split, notes).records(), f"JSON{suffix}", notes=notes)
    delimiter = delimiter_of(start)
    if start.casefold().startswith("sep=") and len(start) == 5:
        delimiter = start[4]
    elif delimiter not in start and start not in _single_columns(options):
        raise DataFormatError(
            f"text that is neither JSON, XML nor a table: {shorten(start)}",
            "Give JSON Lines, JSON, CSV, TSV, Parquet or Arrow; a table needs a header line",
            path=path,
        )
    name = {"\t": "TSV", ",": "CSV"}.get(delimiter, f"CSV with {delimiter!r}")
    return Source(csv_rows(text(""), path, delimiter), f"{name}{suffix}")


def _single_columns(options: Options) -> tuple[str, ...]:
    """Header lines of one column that are taken for a table."""
    return ("text", "question", "problem", "prompt", "messages", "conversations", *options.columns.values())


def _first_line(file: IO[str]) -> tuple[str, bool]:
    """(the next line that is not blank, whether it is whole): a text on one line may be of any size."""
    while line := file.readline(_LONGEST_LINE):
        if text := line.strip(" \t\r\n\ufeff\x00"):
            return text, line.endswith("\n") or len(line) < _LONGEST_LINE
    return "", True


def _is_jsonl(first: str, second: str) -> bool:
    """Whether a text that starts with "{" is JSON Lines: its first line is a whole object and another line follows.

    A first line that is broken, and not the start of a pretty-printed object, is JSON Lines too: its fault is named
    there.
    """
    try:
        _, end = json.JSONDecoder(strict=False).raw_decode(first)
    except (ValueError, RecursionError):
        return not first.endswith(("{", "[", ",", ":")) and bool(second)
    return bool(second) or end < len(first)


def _holds_splits(place: Path) -> bool:
    """A JSON object may hold its splits under keys: {"train": [...], "test": [...]}."""
    with _open(place) as file:
        return file.read(HEAD).lstrip(b"\xef\xbb\xbf \t\r\n").startswith(b"{")


def _guarded(
    records: Iterator[Record | DataFormatError], place: Path, options: Options
) -> Iterator[Record | DataFormatError]:
    """Faults of decoding and unpacking, wherever the reading meets them, as DataFormatError."""
    try:
        yield from records
    except DataFormatError:
        raise
    except (UnicodeError, EOFError, OSError, zlib.error) as error:
        raise _undecoded(place, error, options) from None


def _undecoded(place: Path, error: Exception, options: Options) -> DataFormatError:
    if not isinstance(error, UnicodeError):
        return _unopened(str(place), error)
    encoding = options.encoding or "utf-8"
    found, line = f"bytes that are not {encoding} ({error})", None
    with _open(place) as file:
        for number, raw in enumerate(file, 1):
            try:
                raw.decode(encoding)
            except UnicodeDecodeError as bad:
                others = [name for name in ("cp1252", "gbk", "shift_jis", "utf-16") if _decodes(raw, name)]
                found, line = f"byte 0x{raw[bad.start]:02x} at position {bad.start + 1} is not {encoding}", number
                fix = " or ".join(f"encoding={name!r}" for name in others if name != encoding)
                return DataFormatError(
                    found, f"Say how it is written: {fix or 'encoding=...'}", path=place, row=line, unit="line"
                )
            except UnicodeError:
                break
    return DataFormatError(found, "Say how the file is written: encoding=...", path=place)


def _decodes(raw: bytes, encoding: str) -> bool:
    try:
        raw.decode(encoding)
    except UnicodeError:
        return False
    return encoding != "utf-16"


# Several files


def _folder(place: Path, options: Options) -> Source:
    if (place / "dataset_dict.json").is_file():
        splits = json.loads((place / "dataset_dict.json").read_text(encoding="utf-8")).get("splits", [])
        return _saved(place / _chosen(splits, options.split, place), options)
    if (place / "state.json").is_file():
        return _saved(place, options)
    files = sorted(
        p
        for p in place.rglob("*")
        if p.is_file() and not any(part.startswith(".") for part in p.relative_to(place).parts)
    )
    data = [p for p in files if p.suffix in _SUFFIXES or (p.suffix == ".gz" and Path(p.stem).suffix in _SUFFIXES)]
    if options.split is not None:
        data = [p for p in data if options.split in re.split(r"[\W_]+", str(p.relative_to(place)))]
    if not data:
        raise DataFormatError(
            f"a folder with no data file{f' of split {options.split!r}' if options.split else ''}; it holds "
            f"{listed(str(p.relative_to(place)) for p in files)}",
            f"Data files end in {', '.join(_SUFFIXES)}, or in .gz after one of these",
            path=place,
        )
    from dataclasses import replace

    whole = replace(options, split=None)
    notes = [f"files read: {listed(str(p.relative_to(place)) for p in data)}"]
    left = [str(p.relative_to(place)) for p in files if p not in data]
    if left:
        notes.append(f"files left out: {listed(left)}")
    first = _file(data[0], whole)
    rest = (record for p in data[1:] for record in _file(p, whole).records)
    return Source(
        itertools.chain(first.records, rest),
        f"folder of {len(data)} files, the first {first.container}",
        first.unit,
        True,
        notes,
    )


def _chosen(splits: list[str], split: str | None, place: Path | str) -> str:
    if split is None and len(splits) == 1:
        return splits[0]
    if split not in splits:
        raise DataFormatError(
            f"split={split!r} of a data set whose splits are {listed(map(repr, splits))}",
            "Choose one with split=...",
            path=place,
        )
    return split


def _saved(place: Path, options: Options) -> Source:
    """A folder written by datasets.save_to_disk, read without that library."""
    if not (place / "state.json").is_file():
        raise DataFormatError("a saved data set without its state.json", "Save it again", path=place)
    state = json.loads((place / "state.json").read_text(encoding="utf-8"))
    files = [place / item["filename"] for item in state.get("_data_files", [])]
    if not files:
        raise DataFormatError("a saved data set without data files", "Save it again", path=place)

    def records() -> Iterator[Record]:
        number = 0
        for file in files:
            with file.open("rb") as opened:
                for record in arrow_rows(opened, str(place), number):
                    number = record.number
                    yield record

    return Source(_guarded(records(), place, options), f"saved data set of {len(files)} Arrow files")


def _hub(name: str, options: Options) -> Source:
    """A data set of the Hugging Face hub, streamed."""
    try:
        import datasets
    except ImportError as error:
        raise DataFormatError(
            f"`datasets` is not installed ({error})", "pip install datasets, or give a file", path=name
        ) from None
    try:
        splits = datasets.get_dataset_split_names(name, options.config)
        split = _chosen(splits, options.split, name)
        stream = datasets.load_dataset(name, options.config, split=split, streaming=True)
    except DataFormatError:
        raise
    except (OSError, ValueError, RuntimeError, ImportError) as error:
        raise DataFormatError(
            f"not a file here, and the hub gives no data set of that name ({str(error)[:300]})",
            "Check the name, config=... and the network, or give a file",
            path=name,
        ) from None

    def records() -> Iterator[Record]:
        try:
            for number, row in enumerate(stream, 1):
                yield Record(dict(row), number, name)
        except (OSError, ValueError, RuntimeError) as error:
            raise DataFormatError(f"the hub stopped answering ({str(error)[:300]})", "Try again", path=name) from None

    return Source(
        records(), f"hub data set, split {split}", notes=[f"licence: see https://huggingface.co/datasets/{name}"]
    )
