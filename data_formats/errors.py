"""The one error a bad file raises, and the signal by which an adapter sets a single row aside."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path


class DataFormatError(ValueError):
    """A file, a row or an option cannot be used as it stands.

    Attributes: `path` (the file, or None), `row` (1-based row or line, or None), `unit` ("line" or "row"), `found`
    (what is there), `fix` (what was expected and what to do). The message holds all of them in one line of plain
    English.
    """

    def __init__(
        self, found: str, fix: str, *, path: str | Path | None = None, row: int | None = None, unit: str = "row"
    ) -> None:
        self.found, self.fix, self.row, self.unit = found, fix, row, unit
        self.path = None if path is None else str(path)
        place = ", ".join(part for part in (self.path, f"{unit} {row}" if row is not None else None) if part)
        super().__init__(f"{place}: {found}. {fix}" if place else f"{found}. {fix}")

    def at(self, path: str | Path, row: int | None, unit: str) -> DataFormatError:
        """The same error with its place, for code that met the fault without knowing where it stood."""
        return DataFormatError(self.found, self.fix, path=path, row=row, unit=unit)


class SkipRow(Exception):
    """Raised by an adapter: the row is set aside and counted under `reason`, a phrase that like rows share."""

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.reason = reason


def nearest(name: str, known: Iterable[str]) -> str | None:
    """The known name closest to `name` (case and blanks aside), or None when nothing is close."""
    import difflib  # only needed for a message: it is slow to import

    plain = {str(k).strip().casefold().replace(" ", "_"): str(k) for k in known}
    close = difflib.get_close_matches(str(name).strip().casefold().replace(" ", "_"), plain, n=1, cutoff=0.55)
    return plain[close[0]] if close else None


def shorten(value: object, width: int = 60) -> str:
    """repr() of a value from a file, short enough for a message."""
    text = repr(value if not isinstance(value, str) else value[: width + 1])
    return text if len(text) <= width else text[: width - 1] + "…"
