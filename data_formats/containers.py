"""Which container a path is (told from its first bytes, not its name), and its records."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from .adapter import Record
from .errors import DataFormatError
from .json_rows import jsonl
from .options import Options
from .procedural import PREFIX, generate


@dataclass
class Source:
    """Records and what is known of where they come from. `unit` is what a record's number counts: "line" or "row"."""

    records: Iterator[Record | DataFormatError]
    container: str
    unit: str = "row"
    several: bool = False
    notes: list[str] = field(default_factory=list)


def open_source(path: str, options: Options) -> Source:
    """The records of a path. Raises DataFormatError."""
    if path.startswith(PREFIX):
        return Source(generate(path, options), "reasoning_gym generator")
    return Source(jsonl(Path(path).open(encoding="utf-8-sig", newline="\n"), path), "JSON Lines", "line")
