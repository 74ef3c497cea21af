"""Mixtures and splits by problem."""

from __future__ import annotations

import json

import pytest
from formats_for_tests import SHARED, needs_shared

import data_formats
from data_formats import DataFormatError, Example
from data_formats.mixture import Mixture, Source, problem_key, split_by_problem


def source(folder, name, count, **options):
    path = folder / name
    path.write_text(
        "".join(json.dumps({"question": f"{name} {n}?", "answer": f"#### {n}"}) + "\n" for n in range(count))
    )
    return Source(path, **options)


def ids(mixture):
    return [example.id for example in mixture]


def test_without_weights_every_example_comes_once(tmp_path):
    mixture = Mixture([source(tmp_path, "a", 3), source(tmp_path, "b", 2)])
    assert ids(mixture) == ["a:1", "a:2", "a:3", "b:1", "b:2"]
    assert sorted(mixture.taken.values()) == [2, 3]


def test_weights_are_shares_and_the_seed_decides(tmp_path):
    sources = [source(tmp_path, "a", 4000, weight=3), source(tmp_path, "b", 4000, weight=1.0)]
    first, again, other = (Mixture(sources, seed) for seed in (1, 1, 2))
    taken = ids(first)
    assert taken == ids(again) != ids(other)
    share = sum(name.startswith("a") for name in taken) / len(taken)
    assert share == pytest.approx(0.75, abs=0.03)
    assert first.ended_by.endswith("a") and sum(first.taken.values()) == len(taken) == len(set(taken))


def test_caps_are_drawn_from_the_whole_source(tmp_path):
    capped = [source(tmp_path, "a", 100, cap=10)]
    first = ids(Mixture(capped, 1))
    assert len(first) == 10 and first == ids(Mixture(capped, 1)) != ids(Mixture(capped, 2))
    assert max(int(name.split(":")[1]) for name in first) > 50


def test_each_source_has_its_own_format_columns_and_filter(tmp_path):
    path = tmp_path / "odd.csv"
    path.write_text("frage,loesung,stufe\n1+1?,2,a\n2+2?,4,b\n")
    odd = Source(
        path, "qa_answer", options={"columns": {"question": "frage", "answer": "loesung"}, "filter": {"stufe": "b"}}
    )
    assert [e.answer for e in Mixture([source(tmp_path, "a", 1), odd])] == ["0", "4"]


@pytest.mark.parametrize("weights", [(1, None), (0, 1), (-1, 2), (float("inf"), 1)])
def test_impossible_weights(tmp_path, weights):
    with pytest.raises(DataFormatError, match="weight"):
        Mixture([source(tmp_path, str(place), 1, weight=weight) for place, weight in enumerate(weights)])


def test_no_sources_and_no_cap(tmp_path):
    with pytest.raises(DataFormatError, match="no sources"):
        Mixture([])
    with pytest.raises(DataFormatError, match="cap 0"):
        Mixture([source(tmp_path, "a", 1, cap=0)])


def rows(*questions):
    return [
        Example([{"role": "user", "content": q}, {"role": "assistant", "content": "x", "train": True}], id=str(n))
        for n, q in enumerate(questions)
    ]


def test_split_holds_out_problems_whatever_their_order():
    examples = rows(*(f"Problem number {n // 3}?" for n in range(300)))
    train, held = split_by_problem(examples, 0.2, seed=5)
    assert len(held) == 60 and len(train) == 240
    assert not {e.key for e in train} & {e.key for e in held}
    assert {e.key for e in split_by_problem(examples[::-1], 0.2, seed=5)[1]} == {e.key for e in held}
    assert {e.key for e in split_by_problem(examples, 0.2, seed=6)[1]} != {e.key for e in held}


def test_case_and_spacing_do_not_part_a_problem():
    train, held = split_by_problem(rows("What is 2 + 2?", "what is  2 + 2 ?", "Something else"), 0.5)
    assert sorted(len(side) for side in (train, held)) == [1, 2]


def test_rewritten_questions_stay_with_their_original():
    examples = rows("a b c d", "e f g h", "i j k l")
    examples[0].meta["original_question"] = "E F g h?"
    assert problem_key(examples[0]) == problem_key(examples[1])


def test_one_problem_is_never_split_and_bad_fractions_are_refused():
    assert split_by_problem(rows("same", "same"), 0.5)[1] == []
    with pytest.raises(ValueError, match="between 0 and 1"):
        split_by_problem(rows("a"), 1.0)


@needs_shared
@pytest.mark.parametrize(
    "name", ["mathdial/test.jsonl", "bridge/train.json", "mrbench/MRBench_V2.json", "oasst/realistic_seed_data.json"]
)
def test_no_problem_or_context_of_real_dialogues_stands_on_both_sides(name):
    train, held = split_by_problem(data_formats.read(SHARED / name), 0.2)
    assert train and held
    assert not {e.question for e in train} & {e.question for e in held}
