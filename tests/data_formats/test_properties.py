"""Whatever the bytes or rows, only DataFormatError comes out, and what is read is canonical and accounted for."""

from __future__ import annotations

import contextlib
import json
import tempfile
from pathlib import Path

import pytest
from formats_for_tests import is_canonical
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import data_formats
from data_formats import FORMATS, DataFormatError
from data_formats.dialogue import canonical
from data_formats.errors import SkipRow

RELAXED = settings(deadline=None, max_examples=150, suppress_health_check=[HealthCheck.too_slow])
COLUMNS = sorted({column for adapter in FORMATS.values() for column in adapter.columns})
SCALARS = (
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(max_size=30)
    | st.sampled_from(
        [
            "#### 5",
            "\\boxed{1}",
            "Teacher: (focus)hi|EOM|Student: x",
            "Tutor: a\nStudent: b",
            "[1",
            "a ** b\n#### 3",
            "A) 1 B) 2",
        ]
    )
)
TURNS = st.fixed_dictionaries(
    {},
    optional={
        name: SCALARS | st.sampled_from(["user", "assistant", "system", "tool", "human", "gpt", "Teacher", "student"])
        for name in ("role", "from", "user", "content", "value", "text", "train", "tool_calls")
    },
)
VALUES = st.recursive(
    SCALARS | TURNS | st.lists(TURNS, max_size=4),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=6,
)
ROWS = st.dictionaries(st.sampled_from(COLUMNS) | st.text(max_size=8), VALUES, max_size=6)


def read_bytes(content: bytes, format: str = "auto", **options) -> data_formats.Inspection | None:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "file"
        path.write_bytes(content)
        with contextlib.suppress(DataFormatError):
            reader = data_formats.read(path, format, **options)
            for example in reader:
                if not example.meta.get("language_modelling"):
                    assert is_canonical(example.messages, prompt_only=example.completion is None)
            found = reader.inspection
            assert found.read == found.kept + found.skipped
            return found
    return None


@RELAXED
@given(st.binary(max_size=300))
def test_any_bytes(content):
    read_bytes(content)


@RELAXED
@given(st.text(alphabet='{}[]",:\\ntfu0-1e.<>/Problem question,answer;\n\r\t#\u2028\ufeff', max_size=120))
def test_any_text(content):
    read_bytes(content.encode())


@RELAXED
@given(st.lists(ROWS, min_size=1, max_size=4), st.sampled_from(["auto", *FORMATS]), st.sampled_from(["error", "skip"]))
def test_any_rows_in_any_format(rows, format, bad_rows):
    text = "\n".join(json.dumps(row) for row in rows)
    read_bytes(text.encode("utf-8", "surrogatepass"), format, bad_rows=bad_rows)


@pytest.mark.parametrize("format", FORMATS)
@settings(deadline=None, max_examples=25, suppress_health_check=[HealthCheck.too_slow])
@given(data=st.data())
def test_rows_with_the_columns_of_each_format(format, data):
    columns = FORMATS[format].columns
    row = data.draw(st.fixed_dictionaries({}, optional=dict.fromkeys(columns, VALUES)))
    read_bytes(json.dumps([row]).encode(), format, bad_rows="skip")


@RELAXED
@given(st.lists(TURNS, max_size=6) | VALUES, st.booleans())
def test_any_turns_become_canonical_or_are_set_aside(turns, prompt_only):
    from collections import Counter

    with contextlib.suppress(SkipRow):
        messages = canonical(turns, Counter(), opening="Hello.", prompt_only=prompt_only)
        assert is_canonical(messages, prompt_only=messages[-1]["role"] == "user")


@RELAXED
@given(st.lists(st.tuples(st.text(min_size=1), st.text(min_size=1)), min_size=1, max_size=5))
def test_rows_survive_every_container(pairs):
    import csv
    import io

    rows = [{"prompt": f"p{prompt}", "completion": f"c{completion}"} for prompt, completion in pairs]
    table = io.StringIO()
    writer = csv.DictWriter(table, ["prompt", "completion"], lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    kept = []
    for text in ("\n".join(map(json.dumps, rows)), json.dumps(rows), json.dumps({"data": rows})):
        found = read_bytes(text.encode())
        kept.append(found.kept if found else None)
    assert kept == [len(rows)] * 3
    if "\x00" not in table.getvalue() and "\r" not in table.getvalue():
        found = read_bytes(table.getvalue().encode("utf-8", "replace"))
        assert found is not None and found.kept == len(rows)
