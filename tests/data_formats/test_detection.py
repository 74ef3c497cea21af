"""format=auto, the user's columns, filters and options: what is chosen, and what a mistake says."""

from __future__ import annotations

import csv
import json
import subprocess
import sys

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

import data_formats
from data_formats import DataFormatError

USER, ASSISTANT = {"role": "user", "content": "1+1?"}, {"role": "assistant", "content": "2"}


def write(folder, *rows, name="data.jsonl"):
    path = folder / name
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


FITS = {
    "messages": {"messages": [USER, ASSISTANT]},
    "sharegpt": {"conversations": [{"from": "human", "value": "1+1?"}, {"from": "gpt", "value": "2"}]},
    "alpaca": {"instruction": "Add.", "input": "1+1", "output": "2"},
    "prompt_completion": {"prompt": [USER], "completion": [ASSISTANT]},
    "prompt_only": {"prompt": "1+1?", "answer": "2"},
    "query_response": {"query": "1+1?", "response": "2"},
    "text": {"text": "1+1 is 2."},
    "qa_answer": {"question": "1+1?", "answer": "2"},
    "multiple_choice": {"question": "1+1?", "choices": ["1", "2"], "answer": 1},
    "gsm8k": {"question": "1+1?", "answer": "1+1=2\n#### 2"},
    "gsm8k_socratic": {"question": "1+1?", "answer": "What is 1+1? ** It is 2.\n#### 2"},
    "math_boxed": {"problem": "1+1?", "solution": "$\\boxed{2}$", "messages": [USER, ASSISTANT], "source": "numina"},
    "metamath": {"query": "1+x=2?", "response": "The answer is: 1", "type": "GSM_FOBAR", "original_question": "1+1?"},
    "mathinstruct": {"source": "data/CoT/gsm_train.json", "instruction": "1+1?", "output": "The answer is 2."},
    "openmathinstruct": {
        "problem": "1+1?",
        "generated_solution": "2",
        "expected_answer": "2",
        "problem_source": "math",
    },
    "word_problem": {"Body": "One and one", "Question": "How many?", "Answer": 2.0},
    "theoremqa": {"Question": "1+1?", "Answer": 2, "Answer_type": "integer", "Picture": None},
    "verl": {"data_source": "x", "prompt": [USER], "reward_model": {"style": "rule", "ground_truth": "2"}},
    "tool_integrated": {"messages": [USER, ASSISTANT], "gt": "2"},
    "dialog_history": {"problem": "1+1?", "dialog_history": [{"text": "Well?", "user": "Teacher"}]},
}


@pytest.mark.parametrize("format", FITS)
def test_auto(tmp_path, format):
    reader = data_formats.read(write(tmp_path, FITS[format]))
    assert len(list(reader)) == 1
    assert reader.inspection.format == format and "column" in reader.inspection.why


def test_two_formats_that_fit_equally_are_refused(tmp_path):
    path = write(tmp_path, {"messages": [USER, ASSISTANT], "conversations": FITS["sharegpt"]["conversations"]})
    with pytest.raises(
        DataFormatError, match="fits messages and sharegpt equally.*format='messages' or format='sharegpt'"
    ):
        data_formats.read(path)
    assert len(list(data_formats.read(path, format="sharegpt"))) == 1


@pytest.mark.parametrize("container", ["csv", "jsonl", "parquet"])
def test_odd_column_names_need_no_code(tmp_path, container):
    rows = [{"Aufgabe": f"{n}+{n}?", "Lösung (kurz)": str(2 * n), "Blatt": "7"} for n in range(3)]
    path = tmp_path / "data"
    if container == "csv":
        with path.open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, rows[0])
            writer.writeheader()
            writer.writerows(rows)
    elif container == "parquet":
        pq.write_table(pa.Table.from_pylist(rows), path)
    else:
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    examples = list(data_formats.read(path, columns={"question": "Aufgabe", "answer": "Lösung (kurz)"}))
    assert [(e.question, e.answer, e.completion) for e in examples] == [
        (f"{n}+{n}?", str(2 * n), str(2 * n)) for n in range(3)
    ]


def test_columns_of_a_solution_and_of_messages(tmp_path):
    path = write(tmp_path, {"q": "1+1?", "how": "One and one. #### 2", "chat": [USER, ASSISTANT]})
    (worked,) = data_formats.read(path, columns={"question": "q", "solution": "how"})
    assert (worked.answer, worked.solution) == ("2", "One and one. #### 2")
    (chat,) = data_formats.read(path, columns={"messages": "chat"})
    assert chat.completion == "2"


@pytest.mark.parametrize(
    "options, message",
    [
        (
            {"columns": {"question": "Questoin"}},
            "columns.question names 'Questoin'.*found: 'Question', 'Answer '.*nearest is 'Question'",
        ),
        ({"columns": {"quesiton": "Question"}, "format": "qa_answer"}, "reads no such column. did you mean 'question'"),
        (
            {"format": "gsm8k"},
            "no column 'question'; columns found: 'Question', 'Answer '. Expected columns: question, answer. The nearest column is 'Question'",
        ),
        ({}, "no known format fits; columns found: 'Question', 'Answer '"),
        ({"format": "gms8k"}, "unknown format 'gms8k'. did you mean 'gsm8k'"),
        ({"colums": {}}, "unknown option 'colums'. did you mean 'columns'"),
        ({"limit": 0}, "option limit is 0"),
        ({"encoding": "utf-9"}, "option encoding is 'utf-9'"),
        ({"columns": "question"}, "option columns is 'question'. It must be a mapping"),
        (
            {"format": "custom", "columns": {"question": "Question"}, "filter": {"level": 1}},
            "filter.level names a column that is not there",
        ),
    ],
)
def test_mistakes_are_named(tmp_path, options, message):
    path = write(tmp_path, {"Question": "1+1?", "Answer ": "2"})
    with pytest.raises(DataFormatError, match=message):
        list(data_formats.read(path, **options))


def test_a_column_that_holds_an_object(tmp_path):
    path = write(tmp_path, FITS["alpaca"], {**FITS["alpaca"], "output": {"text": "2"}})
    with pytest.raises(DataFormatError, match="line 2: column 'output' holds an object"):
        list(data_formats.read(path))


def test_mixed_types_in_one_column_become_text(tmp_path):
    rows = [{"question": "q", "answer": value} for value in ("2", 2, 2.0, True, [1, 2])]
    assert [e.answer for e in data_formats.read(write(tmp_path, *rows))] == ["2", "2", "2", "True", "[1, 2]"]


def test_filter_and_limit(tmp_path):
    path = write(tmp_path, *({"question": f"{n}?", "answer": str(n), "level": n % 3} for n in range(9)))
    found = data_formats.inspect(path, filter={"level": [0, 2]})
    assert (found.kept, found.skips["filtered out by level"].count) == (6, 3)
    assert len(list(data_formats.read(path, filter={"level": "0"}))) == 3
    assert len(list(data_formats.read(path, limit=4))) == 4


def test_all_rows_dropped_is_an_error(tmp_path):
    path = write(tmp_path, *[{"messages": [USER]}] * 3)
    with pytest.raises(
        DataFormatError, match=r"none of its 3 rows can be used: no assistant turn to learn from \(3: 1, 2, 3\)"
    ):
        list(data_formats.read(path))


@pytest.mark.parametrize(
    "row, message",
    [
        (
            {"ID": 1, "Problem": "q", "Solution": "s", "Answer": 33},
            "nearest format is math_boxed, which expects problem, solution: try columns={problem: 'Problem', solution: 'Solution'}",
        ),
        ({"question": ["a"], "answer": ["1"]}, "its columns hold something else than it expects"),
        ({"prompt": "q", "completions": ["a"], "labels": [True]}, "no known format fits"),
        ({"zzz": 1}, "Name the columns, for instance columns="),
    ],
)
def test_nothing_fits(tmp_path, row, message):
    with pytest.raises(DataFormatError) as caught:
        data_formats.read(write(tmp_path, row))
    assert message in str(caught.value)


def test_one_row_file(tmp_path):
    assert len(list(data_formats.read(write(tmp_path, FITS["gsm8k"])))) == 1


def test_rows_set_aside_are_logged(tmp_path, caplog):
    list(data_formats.read(write(tmp_path, FITS["messages"], {"messages": []})))
    assert "1 of 2 rows were set aside: messages is an empty list (1: 2)" in caplog.text


def test_duplicates_and_conflicts(tmp_path):
    rows = [
        {"question": q, "answer": a}
        for q, a in (("1+1?", "2"), ("1 + 1 ?", "2"), ("1+1", "2"), ("1+1?", "3"), ("1-1?", "0"))
    ]
    found = data_formats.inspect(write(tmp_path, *rows))
    assert (found.duplicates, found.conflicts.count) == (2, 1)
    assert found.conflicts.rows == ["data:4"]


def test_choices_as_letter_index_text_and_arc(tmp_path):
    rows = [
        {"question": "?", "choices": ["x", "y"], "answer": 1},
        {"question": "?", "choices": ["x", "y"], "answer": "y"},
        {"question": "?", "options": {"A": "x", "B": "y"}, "answer": "b"},
        {"question": "?", "choices": {"text": ["x", "y"], "label": ["A", "B"]}, "answerKey": "B"},
        {"question": "?", "options": ["A)x", "B)y"], "correct": "B"},
        {"question": "?", "options": "(A) x (B) y", "Answer": "(B)"},
    ]
    examples = list(data_formats.read(write(tmp_path, *rows)))
    assert [(e.answer, e.answer_type) for e in examples] == [("B", "choice")] * 6
    found = data_formats.inspect(write(tmp_path, rows[0], {**rows[0], "answer": "z"}))
    assert found.skips["the answer is none of the options"].rows == [2]


def test_asdiv_xml(tmp_path):
    path = tmp_path / "ASDiv.xml"
    path.write_text(
        '<?xml version="1.0" encoding="UTF-8"?>\n<Machine-Reading-Corpus-File><ProblemSet>'
        '<Problem ID="nluds-0001" Grade="1" Source="http://x"><Body>Seven red apples and two green apples are in the basket.</Body>'
        "<Question>How many apples are in the basket?</Question><Solution-Type>Addition</Solution-Type>"
        "<Answer>9 (apples)</Answer><Formula>7+2=9</Formula></Problem>"
        '<Problem ID="nluds-0002" Grade="2" Source="x"><Body>Twelve red and 5 blue</Body><Question>How many of each?</Question>'
        "<Solution-Type>Sum</Solution-Type><Answer>12 (red); 5 (blue)</Answer><Formula>12;5</Formula></Problem>"
        '<Problem ID="nluds-0003" Grade="2" Source="x"><Body>A.</Body><Question>Who?</Question><Answer>Mrs. Hilt</Answer></Problem>'
        "</ProblemSet></Machine-Reading-Corpus-File>",
        encoding="utf-8",
    )
    first, second, third = data_formats.read(path)
    assert (first.id, first.answer, first.meta["unit"], first.meta["Grade"]) == ("nluds-0001", "9", "apples", "1")
    assert (second.answer, second.answer_type) == ("[12, 5]", "list")
    assert second.question == "Twelve red and 5 blue. How many of each?"
    assert (third.answer, third.answer_type) == ("Mrs. Hilt", "text")


def test_import_is_light():
    code = "import sys, data_formats; print([m for m in ('torch', 'pyarrow', 'datasets', 'reasoning_gym', 'finetune') if m in sys.modules])"
    assert (
        subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip() == "[]"
    )


def test_keys_tell_problems_apart_by_signs_and_decimals_only():
    from data_formats.example import question_key

    same = ["What is 3.5 + 4, please?", "what is 3.5 +\u00a04 please", "What is 3.5 + 4,please"]
    assert len({question_key(text) for text in same}) == 1
    assert len({question_key(text) for text in ("3+4", "3-4", "3.4", "34", "3,4", "(3.4)", ".34")}) == 7


def test_an_answer_column_of_prose_is_a_solution_and_not_a_gold_answer(tmp_path):
    prose = "First we add one and one.\nThen we are done with it."
    (example,) = data_formats.read(write(tmp_path, {"question": "1+1?", "answer": prose}))
    assert (example.answer, example.solution, example.completion) == (None, prose, prose)
    (prompt,) = data_formats.read(write(tmp_path, {"prompt": "1+1?", "solution": prose}))
    assert (prompt.answer, prompt.solution) == (None, prose)
    (boxed,) = data_formats.read(write(tmp_path, {"prompt": "1+1?", "solution": "so $\\boxed{2}$"}))
    assert boxed.answer == "2"
