"""Read the formats tutoring and maths data come in, into one shape, with everything that was changed or set aside
counted.

    for example in data_formats.read("train.jsonl"):
        print(example.messages, example.answer)
    print(data_formats.inspect("train.jsonl"))

Pure Python; pyarrow is imported for Parquet and Arrow files, `datasets` for hub names, reasoning_gym for its problems.
"""

from .errors import DataFormatError
from .example import Example
from .formats import FORMATS
from .inspection import Inspection
from .options import Options
from .reader import Reader, inspect, read

__all__ = ["FORMATS", "DataFormatError", "Example", "Inspection", "Options", "Reader", "inspect", "read"]
