"""Training questions that stand in evaluation sets, on the real files."""

from __future__ import annotations

from collections import Counter

import pytest
from formats_for_tests import SHARED, needs_shared

import data_formats
from data_formats.contamination import ContaminationIndex

LONG = "A train leaves the station at noon and travels north at sixty miles an hour until it stops for fuel."


def questions(name):
    return [example.question for example in data_formats.read(SHARED / name)]


@pytest.mark.parametrize(
    "text, reason",
    [
        (LONG, "exact"),
        (f"  {LONG}\n", "exact"),
        (LONG.upper().replace(" ", "  "), "normalised"),
        (f"Please solve: {LONG} Show your work.", "13-gram"),
        ("What is 3+4?", "exact"),
        ("what is  3+4", "normalised"),
        ("What is 3-4?", None),
        ("A train leaves the station.", None),
        ("", None),
    ],
)
def test_reasons(text, reason):
    assert ContaminationIndex([LONG, "What is 3+4?"]).match(text) == reason


def test_a_set_phrase_two_questions_share_is_no_evidence():
    phrase = "express your answer as a common fraction in lowest terms with a positive denominator and nothing else"
    index = ContaminationIndex([f"Find x, and {phrase}", f"Find the sine of y, then {phrase}"])
    assert index.match(f"Find the area of a circle of radius four; {phrase}") is None


def test_chinese_questions_without_blanks():
    question = "珍妮特的鸭子每天下十六颗蛋她每天早上早餐时吃三颗"
    assert ContaminationIndex([question]).match(f"请回答：{question}谢谢") == "13-gram"


@needs_shared
def test_mathdial_holds_200_gsm8k_test_questions():
    index = ContaminationIndex(questions("gsm8k/test.jsonl"))
    reasons = Counter(index.match_example(e) for e in data_formats.read(SHARED / "mathdial" / "test.jsonl"))
    assert reasons == {"exact": 200, None: 399}


@needs_shared
def test_the_other_half_of_mathdial_is_gsm8k_train():
    index = ContaminationIndex(questions("gsm8k/train.jsonl"))
    assert sum(index.match(q) == "exact" for q in questions("mathdial/test.jsonl")) == 399


@needs_shared
def test_ms_swift_example_is_math_test():
    index = ContaminationIndex(questions("math/test.jsonl.gz"))
    assert [index.match(q) for q in questions("ms_swift/rft_math.json")] == ["exact"] * 500


@needs_shared
@pytest.mark.parametrize("name", ["math/train_answers_only_7474.json", "math/train_with_solutions_3682.jsonl"])
def test_one_math_train_problem_is_in_math_test(name):
    index = ContaminationIndex(questions("math/test.jsonl.gz"))
    same = [q for q in questions(name) if index.match(q) in ("exact", "normalised")]
    assert len(same) == 1 and "(0,0)" in same[0] and "(a,11)" in same[0] and "(b,37)" in same[0]


@needs_shared
def test_original_questions_are_looked_up():
    index = ContaminationIndex(
        e.questions[1] for e in data_formats.read(SHARED / "metamath" / "GSM8K_Backward_40_two_keysets.jsonl")
    )
    sample = next(data_formats.read(SHARED / "metamath" / "GSM8K_Backward_40_two_keysets.jsonl"))
    sample.meta["question"] = "another wording"
    sample.messages = [{"role": "user", "content": "another wording"}]
    assert index.match_example(sample) == "exact"
