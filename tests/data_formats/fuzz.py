"""Fuzz data_formats.read with atheris: no exception but DataFormatError may come out. Not collected by pytest.

python tests/data_formats/fuzz.py -max_total_time=600 CORPUS_FOLDER
"""

from __future__ import annotations

import contextlib
import logging
import sys
import tempfile
from pathlib import Path

import atheris

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

with atheris.instrument_imports(include=["data_formats"]):
    import data_formats

logging.disable(logging.WARNING)
FOLDER = Path(tempfile.mkdtemp(prefix="data_formats_fuzz"))
FORMATS = ["auto", *data_formats.FORMATS]


def one_input(data: bytes) -> None:
    """The first byte chooses the format, the rest is the file."""
    if not data:
        return
    file = FOLDER / "data"
    file.write_bytes(data[1:])
    with contextlib.suppress(data_formats.DataFormatError):
        data_formats.inspect(file, FORMATS[data[0] % len(FORMATS)], bad_rows="skip" if data[0] & 128 else "error")


if __name__ == "__main__":
    atheris.Setup(sys.argv, one_input)
    atheris.Fuzz()
