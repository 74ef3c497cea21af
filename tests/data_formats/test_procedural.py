"""Problems made by reasoning-gym."""

import pytest

import data_formats
from data_formats import DataFormatError

pytest.importorskip("reasoning_gym")


def read(path, **options):
    return list(data_formats.read(path, format="reasoning_gym", **options))


def test_worked_solutions_and_exact_answers():
    examples = read("reasoning_gym:gsm_symbolic", seed=7, size=20)
    assert len(examples) == 20
    for example in examples:
        assert example.messages[0]["content"] == example.question
        assert "####" not in example.completion and example.completion.endswith(
            f"The answer is \\boxed{{{example.answer}}}."
        )


def test_several_generators_in_turn_and_parameters():
    examples = read("reasoning_gym:count_bits, gsm_symbolic", seed=1, size=5)
    assert [e.meta["dataset"] for e in examples] == ["count_bits", "gsm_symbolic"] * 2 + ["count_bits"]
    assert examples[0].completion is None and examples[0].answer_type == "number"
    (example,) = read("reasoning_gym:chain_sum", size=1, params={"min_terms": 2, "max_terms": 2})
    assert example.question.count("+") + example.question.count(" - ") >= 1


def test_seeds_nearer_than_the_size_share_problems():
    first, near, far = ({e.key for e in read("reasoning_gym:chain_sum", seed=seed, size=50)} for seed in (0, 1, 1000))
    assert len(first & near) >= 45 and len(first & far) <= 2


def test_the_seed_decides():
    assert [e.messages for e in read("reasoning_gym:chain_sum", seed=3, size=9)] == [
        e.messages for e in read("reasoning_gym:chain_sum", seed=3, size=9)
    ]


@pytest.mark.parametrize(
    "path, options, message",
    [
        ("reasoning_gym:gsm_symbolc", {}, "did you mean 'gsm_symbolic'"),
        ("reasoning_gym:chain_sum", {"params": {"no_such": 1}}, "refuses params"),
        ("reasoning_gym:chain_sum", {"size": 0}, "option size is 0"),
    ],
)
def test_mistakes(path, options, message):
    with pytest.raises(DataFormatError, match=message):
        read(path, **options)
