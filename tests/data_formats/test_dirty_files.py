"""Every file of ../shared/data/_dirty: the rows and repairs, or the message."""

from __future__ import annotations

import re

import pytest
from formats_for_tests import SHARED, is_canonical, needs_shared

import data_formats
from data_formats import DataFormatError
from data_formats.contamination import ContaminationIndex
from data_formats.template_tokens import TemplateTokens

pytestmark = needs_shared
DIRTY = SHARED / "_dirty"

# file: (format, answers of the kept rows, changes by kind, skips by reason)
READ = {
    "bare_newline_in_string.jsonl": (
        "gsm8k",
        ["36", "72"],
        {"bare newline or control character inside a string": [1]},
        {},
    ),
    "bom.jsonl": ("gsm8k", ["72", "10", "5"], {}, {}),
    "boxed_variants.jsonl": (
        "math_boxed",
        ["2", "\\frac{1}{\\sqrt{2}}", "7", None, "\\text{Monday}", "12\\text{ cm}^2", "12{,}500", None],
        {},
        {},
    ),
    "contaminated_train.jsonl": ("gsm8k", ["72", "10", "5", "18", "3", "70000"], {}, {}),
    "crlf_blank_lines.jsonl": ("gsm8k", ["72", "10"], {}, {}),
    "csv_blank_cells.csv": ("alpaca", [None], {}, {"output is blank": [2], "empty row": [3]}),
    "csv_embedded_newlines.csv": ("gsm8k", ["30", "4"], {}, {}),
    "csv_semicolon_excel.csv": ("qa_answer", ["5"], {}, {}),
    "hash_answer_variants.jsonl": ("gsm8k", ["1000", "-5", "4", "18.00", "50%", None, "18"], {}, {}),
    "json_array_named.jsonl": ("gsm8k", ["72", "10", "5"], {}, {}),
    "json_wrapped_data_key.json": ("gsm8k", ["72", "10", "5"], {}, {}),
    "jsonl_named.json": ("gsm8k", ["72", "10", "5"], {}, {}),
    "nan_infinity.jsonl": ("gsm8k", ["4"], {}, {"answer is blank": [1]}),
    "utf16le_bom.jsonl": ("gsm8k", ["72"], {}, {}),
}

REFUSED = {
    "cp1252.jsonl": "line 1: byte 0x92 at position 20 is not utf-8. Say how it is written: encoding='cp1252'",
    "csv_ragged.csv": "row 2: 3 cells, while the header has 2 (question, answer): '3,000+1?,3001'",
    "duplicate_keys.jsonl": "the key 'answer' stands twice",
    "empty.jsonl": "the file is empty",
    "lfs_pointer.jsonl": "a Git LFS pointer: the data itself is not here. Fetch it with `git lfs pull`",
    "mixed_keysets.jsonl": "rows of different formats in one file: gsm8k (first in record 1), alpaca (first in record 2)",
    "no_final_answer.jsonl": "rows of different formats in one file: qa_answer (first in record 1), math_boxed (first in record 2)",
    "real_truncated_tail.jsonl": "line 4: JSON cut off",
    "wrong_columns.jsonl": "columns found: 'Question', 'Final Answer'. The nearest format is",
}


@pytest.mark.parametrize("name", READ)
def test_read(name):
    format, answers, changes, skips = READ[name]
    reader = data_formats.read(DIRTY / name)
    examples = list(reader)
    found = reader.inspection
    assert found.format == format
    assert [example.answer for example in examples] == answers
    assert {kind: tally.rows for kind, tally in found.changes.items()} == changes
    assert {reason: tally.rows for reason, tally in found.skips.items()} == skips
    assert all(is_canonical(example.messages) for example in examples)


@pytest.mark.parametrize("name", REFUSED)
def test_refused(name):
    with pytest.raises(DataFormatError, match=re.escape(REFUSED[name])) as caught:
        list(data_formats.read(DIRTY / name))
    assert str(DIRTY / name) in str(caught.value)


def test_every_dirty_file_is_in_a_table():
    files = {p.name for p in DIRTY.iterdir()} - {"SOURCE.md"}
    assert files == READ.keys() | REFUSED.keys() | {"conversations_bad.jsonl"}


def test_conversations_bad():
    found = data_formats.inspect(DIRTY / "conversations_bad.jsonl")
    assert (found.read, found.kept, found.skipped) == (22, 15, 7)
    assert {reason: tally.rows for reason, tally in found.skips.items()} == {
        "no assistant turn to learn from": [4, 5, 6],
        "messages is an empty list": [13],
        "messages is null, not a list of turns": [14],
        "messages is plain text, not a list of turns": [15],
        "the user's first turn is empty": [17],
    }
    assert {kind: tally.rows for kind, tally in found.changes.items()} == {
        "opening user turn added": [1, 7],
        "user turns in a row merged": [2],
        "assistant turns in a row merged": [3],
        "late system turn moved to the front": [8],
        "role renamed": [9, 11],
        "role's case or blanks put right": [10],
        "trailing user turn removed": [12],
        "list read from a JSON string": [16],
        "content parts joined": [18],
        "from and value read as role and content": [20],
    }
    examples = {example.meta["row"]: example for example in data_formats.read(DIRTY / "conversations_bad.jsonl")}
    assert [m["role"] for m in examples[19].messages] == ["user", "assistant", "tool", "assistant"]
    assert examples[21].messages[-1]["train"] is False
    text, found_tokens = TemplateTokens(["<|im_end|>", "<|im_start|>"]).guard(examples[22].messages)
    assert found_tokens == {"<|im_end|>": 1, "<|im_start|>": 1} and "<|im_end|>" not in text[0]["content"]


def test_cp1252_is_read_when_said():
    (example,) = data_formats.read(DIRTY / "cp1252.jsonl", encoding="cp1252")
    assert example.question == "Janet’s café sells 3 pies at £2 – how much?"


def test_truncated_tail_can_be_set_aside():
    found = data_formats.inspect(DIRTY / "real_truncated_tail.jsonl", bad_rows="skip")
    assert (found.read, found.kept) == (4, 3)
    assert [tally.rows for tally in found.skips.values()] == [[4]]


def test_ragged_row_can_be_set_aside():
    found = data_formats.inspect(DIRTY / "csv_ragged.csv", bad_rows="skip")
    assert (found.read, found.kept, [tally.rows for tally in found.skips.values()]) == (2, 1, [[2]])


def test_wrong_columns_are_read_when_named():
    columns = {"question": "Question", "answer": "Final Answer"}
    found = data_formats.inspect(DIRTY / "wrong_columns.jsonl", columns=columns, bad_rows="skip")
    assert (found.format, found.read, found.kept) == ("qa_answer", 2, 1)
    with pytest.raises(DataFormatError, match="line 2: columns.question names 'Question', which is not in the file"):
        list(data_formats.read(DIRTY / "wrong_columns.jsonl", columns=columns))


def test_rows_without_a_final_answer_have_none():
    found = data_formats.inspect(DIRTY / "no_final_answer.jsonl", format="math_boxed", bad_rows="skip")
    assert {reason: tally.rows for reason, tally in found.skips.items() if "nothing to check" in reason} == {
        "answer is 'notfound': nothing to check": [3],
        "answer is 'proof': nothing to check": [4],
    }
    assert found.answers == {"none": 1}


def test_contaminated_rows_are_found_for_each_reason():
    index = ContaminationIndex(e.question for e in data_formats.read(SHARED / "gsm8k" / "test.jsonl"))
    reasons = [index.match_example(e) for e in data_formats.read(DIRTY / "contaminated_train.jsonl")]
    assert reasons == [None, None, None, "exact", "normalised", "13-gram"]
