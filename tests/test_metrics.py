"""The figures against values worked out by hand or by enumeration."""

import doctest
import itertools
import math

import pytest

from finetune import metrics


def test_examples_in_the_docstrings_hold():
    assert doctest.testmod(metrics).failed == 0


@pytest.mark.parametrize(("samples", "correct", "k"), [(5, 2, 1), (5, 2, 3), (6, 1, 4), (6, 0, 6), (4, 4, 2), (7, 3, 5)])
def test_pass_at_k_is_the_share_of_subsets_with_a_right_one(samples, correct, k):
    subsets = list(itertools.combinations([True] * correct + [False] * (samples - correct), k))
    assert metrics.pass_at_k(samples, correct, k) == pytest.approx(sum(map(any, subsets)) / len(subsets))


def test_pass_at_k_by_hand():
    # 10 samples, 3 right, k = 2: 1 - C(7,2)/C(10,2) = 1 - 21/45
    assert metrics.pass_at_k(10, 3, 2) == pytest.approx(24 / 45)
    with pytest.raises(ValueError, match="pass@5 of 4"):
        metrics.pass_at_k(4, 1, 5)


@pytest.mark.parametrize(
    ("found", "winner"),
    [
        (["12", "13", "13.0", "12"], 0),  # 2 to 2: the first that came
        (["12", "13", "13.0", "\\frac{26}{2}", "12"], 1),  # 13 in three spellings
        ([None, None, "5"], 2),  # no answer is no vote
        (["x+1", "1+x", "2"], 0),
        ([None, None], None),
        ([], None),
    ],
)
def test_majority_counts_equal_answers_together(found, winner):
    assert metrics.majority(found) == winner


def test_majority_of_choices_is_by_letter():
    assert metrics.majority(["A", "(B)", "B", "B)"], "choice") == 1


def test_wilson_against_published_values():
    # Newcombe 1998, table I: 81 of 263 -> 0.2553 to 0.3662; 0 of 20 -> 0 to 0.1611
    assert metrics.wilson(81, 263) == (pytest.approx(0.2553, abs=5e-5), pytest.approx(0.3662, abs=5e-5))
    assert metrics.wilson(0, 20) == (pytest.approx(0.0), pytest.approx(0.1611, abs=5e-5))


def test_mcnemar_is_the_binomial_test():
    # 3 against 9 of 12: 2 * (1 + 12 + 66 + 220) / 4096
    assert metrics.mcnemar(3, 9) == metrics.mcnemar(9, 3) == pytest.approx(2 * 299 / 4096)


def test_bootstrap_agrees_with_the_normal_interval_of_a_large_sample():
    values = [1.0] * 300 + [0.0] * 700
    low, high = metrics.bootstrap(values)
    half = 1.96 * math.sqrt(0.3 * 0.7 / 1000)
    assert low == pytest.approx(0.3 - half, abs=0.005) and high == pytest.approx(0.3 + half, abs=0.005)
    assert metrics.bootstrap(values) == (low, high)
