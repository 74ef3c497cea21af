"""Containers and encodings: told from content, read to the last row, or refused with a message."""

from __future__ import annotations

import csv
import gzip
import json
import tracemalloc

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

import data_formats
from data_formats import DataFormatError

ROWS = [{"question": f"What is {n} + {n}?", "answer": f"It is {2 * n}.\n#### {2 * n}"} for n in range(1, 6)]
ANSWERS = ["2", "4", "6", "8", "10"]
LINES = "".join(json.dumps(row) + "\n" for row in ROWS)


def answers(path, **options):
    return [example.answer for example in data_formats.read(path, **options)]


def write(folder, content, name="file.bin"):
    path = folder / name
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


def table_text(delimiter):
    import io

    text = io.StringIO()
    writer = csv.DictWriter(text, ["question", "answer"], delimiter=delimiter)
    writer.writeheader()
    writer.writerows(ROWS)
    return text.getvalue()


def parquet_bytes():
    sink = pa.BufferOutputStream()
    pq.write_table(pa.Table.from_pylist(ROWS), sink)
    return sink.getvalue().to_pybytes()


def arrow_bytes(opener):
    sink = pa.BufferOutputStream()
    table = pa.Table.from_pylist(ROWS)
    with opener(sink, table.schema) as writer:
        writer.write_table(table, max_chunksize=2)
    return sink.getvalue().to_pybytes()


CONTAINERS = {
    "JSON Lines": LINES,
    "JSON array": json.dumps(ROWS),
    "JSON array indented": json.dumps(ROWS, indent=1),
    "array in data": json.dumps({"version": 1, "data": ROWS}),
    "array in rows, hub API": json.dumps({"rows": [{"row_idx": n, "row": row} for n, row in enumerate(ROWS)]}),
    "object of rows": json.dumps({f"k{n}": row for n, row in enumerate(ROWS)}),
    "object of objects of rows": json.dumps({"set": {f"k{n}": row for n, row in enumerate(ROWS)}, "other": {}}),
    "concatenated indented objects": "".join(json.dumps(row, indent=2) + "\n" for row in ROWS),
    "CSV": table_text(","),
    "TSV": table_text("\t"),
    "CSV with ;": table_text(";"),
    "CSV with |": table_text("|"),
    "CSV for Excel": "sep=;\r\n" + table_text(";"),
    "CSV with a BOM": "\ufeff" + table_text(","),
    "Parquet": parquet_bytes(),
    "Arrow file": arrow_bytes(pa.ipc.new_file),
    "Arrow stream": arrow_bytes(pa.ipc.new_stream),
}


@pytest.mark.parametrize("packed", [False, True], ids=["plain", "gzip"])
@pytest.mark.parametrize("kind", CONTAINERS)
def test_container_is_told_from_content(tmp_path, kind, packed):
    content = CONTAINERS[kind]
    content = content.encode() if isinstance(content, str) else content
    path = write(tmp_path, gzip.compress(content) if packed else content, "wrong_name.txt")
    assert answers(path) == ANSWERS
    assert ("gzip" in data_formats.inspect(path).container) is packed


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16", "utf-32"])
@pytest.mark.parametrize("kind", ["JSON Lines", "JSON array", "CSV"])
def test_byte_order_marks(tmp_path, kind, encoding):
    assert answers(write(tmp_path, CONTAINERS[kind].encode(encoding))) == ANSWERS


@pytest.mark.parametrize("encoding", ["cp1252", "gbk", "shift_jis", "utf-16-le"])
def test_encoding_option(tmp_path, encoding):
    word = "café" if encoding == "cp1252" else "数学"
    path = write(tmp_path, json.dumps({"question": word, "answer": "#### 1"}, ensure_ascii=False).encode(encoding))
    with pytest.raises(DataFormatError, match="encoding="):
        answers(path)
    assert next(data_formats.read(path, encoding=encoding)).question == word


def test_bad_byte_is_named_by_line_wherever_it_stands(tmp_path):
    path = write(tmp_path, LINES.encode() * 2000 + b'{"question": "caf\xe9", "answer": "#### 1"}\n')
    with pytest.raises(DataFormatError, match=r"line 10001: byte 0xe9 at position 18 is not utf-8"):
        answers(path)


def test_u2028_is_text_and_not_a_line_end(tmp_path):
    row = {"question": "one\u2028two\u0085three\x0bfour", "answer": "#### 1"}
    (example,) = data_formats.read(write(tmp_path, json.dumps(row, ensure_ascii=False) + "\n"))
    assert example.question.startswith("one\u2028two")


def test_nul_bytes_and_control_characters_are_removed_and_counted(tmp_path):
    reader = data_formats.read(write(tmp_path, json.dumps({"question": "a\x00b\x1bc\u200bd", "answer": "#### 1"})))
    assert [example.question for example in reader] == ["abcd"]
    assert reader.inspection.changes["control or zero-width characters removed"].rows == [1]


def test_lone_surrogate_can_be_encoded(tmp_path):
    (example,) = data_formats.read(write(tmp_path, '{"question": "a \\ud800 b", "answer": "#### 1"}'))
    assert example.question.encode() == "a \ufffd b".encode()


REFUSED = {
    "": "the file is empty",
    " \n\t\n": "the file is empty",
    "[]": "no rows",
    "[1, 2]": "a row that is no JSON object: 1",
    '[{"question": "a", "answer": "1"},]': "invalid JSON at column 35 (Expecting value): ']'",
    "question,answer\n": "a header and no rows",
    "<!DOCTYPE html><html></html>": "an HTML page, not data",
    "<a><b>x</b></a>": "XML without <Problem> elements",
    "<ProblemSet><Problem>": "XML that cannot be parsed",
    "version https://git-lfs.github.com/spec/v1\noid": "a Git LFS pointer",
    "PK\x03\x04rest": "a zip archive or an Excel workbook",
    "PAR1 and nothing": "Parquet that cannot be read",
    "ARROW1 and nothing": "Arrow that cannot be read",
    "just a sentence": "neither JSON, XML nor a table",
    "{'question': 'x', 'answer': None}\n{'question': 'y', 'answer': None}\n": "a Python literal, not JSON",
    '{"question": "a", "answer": "#### 1"}\n{"question": "b", "answer": "##': "line 2: JSON cut off",
    '[{"question": "a", "answer": "#### 1"}, {"question": "b", "ans': "JSON cut off",
    '[{"question": "a", "answer": "#### 1"}': "the file ends in the middle",
    '{"question": "a", "answer": "#### 1"} {"question": "b"}\nx': "text after the row's end",
    '{"question": "a" "answer": "#### 1"}\n{"question": "a", "answer": "#### 1"}\n': "line 1: invalid JSON at column 18",
    '{"a": ' + "[" * 100_000 + "\n{}": "nested too deeply",
    '{"question": "a", "answer": 1' + "0" * 5000 + "}\n{}\n": "JSON that Python cannot hold",
    'question,answer\n"open,1\n': "CSV that cannot be parsed",
    "question,answer,question\n1,2,3\n": "the header names 'question' twice",
    '{"train": [{"question": "a"}], "test": [{"question": "b"}]}': "several lists of rows: 'train', 'test'",
    "\x80\x04pickle": "a Python pickle",
}


@pytest.mark.parametrize("content", REFUSED, ids=lambda text: text[:24])
def test_refused(tmp_path, content):
    raw = content.encode("latin-1")
    with pytest.raises(DataFormatError) as caught:
        answers(write(tmp_path, raw))
    assert REFUSED[content] in str(caught.value) and str(tmp_path) in str(caught.value)


def test_broken_gzip(tmp_path):
    path = write(tmp_path, gzip.compress(LINES.encode() * 5000)[:-2000])
    with pytest.raises(DataFormatError, match="a broken gzip file"):
        answers(path)


def test_entity_bomb_is_refused(tmp_path):
    entities = "".join(f'<!ENTITY e{n} "{f"&e{n - 1};" * 10 if n else "x" * 50}">' for n in range(10))
    bomb = f"<!DOCTYPE p [{entities}]><ProblemSet><Problem><Body>&e9;</Body></Problem></ProblemSet>"
    with pytest.raises(DataFormatError, match="XML"):
        answers(write(tmp_path, bomb))


def test_missing_file_names_the_nearest(tmp_path):
    write(tmp_path, LINES, "train.jsonl")
    with pytest.raises(DataFormatError, match="no such file. Did you mean 'train.jsonl'?"):
        answers(tmp_path / "trian.jsonl")


def test_csv_fields_above_128_kib_and_stringified_messages(tmp_path):
    turns = [{"role": "user", "content": "x" * 200_000}, {"role": "assistant", "content": "it's"}]
    for text in (json.dumps(turns), str(turns)):
        path = tmp_path / "messages.csv"
        with path.open("w", newline="") as file:
            csv.writer(file).writerows([["id", "messages"], ["7", text]])
        (example,) = data_formats.read(path)
        assert len(example.question) == 200_000 and example.completion == "it's" and example.id == "7"


def test_blank_csv_cells_are_blank(tmp_path):
    (example,) = data_formats.read(write(tmp_path, "instruction,input,output,system\nAdd 2 and 3,,5,\n"))
    assert [message["content"] for message in example.messages] == ["Add 2 and 3", "5"]


def test_splits_under_keys(tmp_path):
    path = write(tmp_path, json.dumps({"train": ROWS, "test": ROWS[:2]}))
    assert answers(path, split="test") == ANSWERS[:2]
    assert answers(path, split="train") == ANSWERS


def test_single_rows(tmp_path):
    turns = [{"role": "user", "content": "1+1?"}, {"role": "assistant", "content": "2"}]
    for row in (
        {"messages": turns, "id": 1},
        {"conversations": [{"from": "human", "value": "1+1?"}, {"from": "gpt", "value": "2"}]},
    ):
        assert next(data_formats.read(write(tmp_path, json.dumps(row, indent=1)))).completion == "2"


def test_folder_of_files_with_splits(tmp_path):
    (tmp_path / "algebra").mkdir()
    write(tmp_path, LINES, "algebra/train.jsonl")
    write(tmp_path, table_text(","), "test.csv")
    write(tmp_path, "notes", "README.md")
    assert answers(tmp_path) == ANSWERS * 2
    assert [e.id for e in data_formats.read(tmp_path)][4:6] == ["algebra/train:5", "test:1"]
    assert answers(tmp_path, split="train") == ANSWERS
    notes = " ".join(data_formats.inspect(tmp_path).notes)
    assert "algebra/train.jsonl, test.csv" in notes and "files left out: README.md" in notes
    with pytest.raises(DataFormatError, match="no data file of split 'dev'"):
        answers(tmp_path, split="dev")


def test_fault_in_a_folder_names_its_file(tmp_path):
    write(tmp_path, LINES, "a.jsonl")
    write(tmp_path, LINES + "{oops}\n", "b.jsonl")
    with pytest.raises(DataFormatError, match=r"b\.jsonl, line 6"):
        answers(tmp_path)
    skips = data_formats.inspect(tmp_path, bad_rows="skip").skips
    assert [tally.rows for tally in skips.values()] == [["b.jsonl:6"]]


def test_saved_datasets_folders(tmp_path):
    datasets = pytest.importorskip("datasets")
    train = datasets.Dataset.from_list(ROWS)
    train.save_to_disk(tmp_path / "one")
    datasets.DatasetDict(train=train, test=train.select([4, 0])).save_to_disk(tmp_path / "two")
    assert answers(tmp_path / "one") == ANSWERS
    assert answers(tmp_path / "two", split="test") == ["10", "2"]
    with pytest.raises(DataFormatError, match="whose splits are 'train', 'test'"):
        answers(tmp_path / "two")


def test_hub_name_without_a_network_is_one_message():
    pytest.importorskip("datasets")
    with pytest.raises(DataFormatError, match="not a file here, and the hub gives no data set of that name"):
        answers("no-such-owner/no-such-set")


@pytest.mark.parametrize("kind", ["JSON Lines", "JSON array", "object of rows", "CSV", "Parquet"])
def test_memory_does_not_grow_with_rows(tmp_path, kind):
    peaks = []
    for count in (1_000, 10_000):
        rows = [{"question": f"{n} and some words to fill a line?", "answer": f"#### {n}"} for n in range(count)]
        path = tmp_path / f"{count}"
        if kind == "JSON Lines":
            path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        elif kind == "CSV":
            path.write_text("question,answer\n" + "".join(f"{r['question']},{r['answer']}\n" for r in rows))
        elif kind == "Parquet":
            pq.write_table(pa.Table.from_pylist(rows), path, row_group_size=500)
        else:
            path.write_text(json.dumps(rows if kind == "JSON array" else {str(n): row for n, row in enumerate(rows)}))
        del rows
        tracemalloc.start()
        assert sum(1 for _ in data_formats.read(path)) == count
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert peaks[1] < peaks[0] + 1_200_000  # all rows at once would be over 5 MB
