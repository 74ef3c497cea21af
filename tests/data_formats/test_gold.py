"""Gold answers as files state them."""

import pytest

from data_formats import gold


@pytest.mark.parametrize(
    "text, answer",
    [
        ("so $\\boxed{3}$", "3"),
        ("$\\boxed 2$", "2"),
        ("$\\boxed2$", "2"),
        ("$\\boxed{\\frac{1}{\\sqrt{2}}}$", "\\frac{1}{\\sqrt{2}}"),
        ("$\\boxed{1}$ then $\\boxed{2}$", "2"),
        ("$\\fbox{7}$", "7"),
        ("$\\boxed{\\{1,2\\}}$", "\\{1,2\\}"),
        ("$\\boxed{\\frac{1}{2}$", None),
        ("$\\boxed{5}$ and $\\boxed{\\frac{1}{2}$", "5"),
        ("$\\boxed{}$", None),
        ("no box", None),
    ],
)
def test_last_boxed(text, answer):
    assert gold.last_boxed(text) == answer


@pytest.mark.parametrize(
    "text, answer",
    [
        ("a\n#### 72", "72"),
        ("#### 1,000", "1000"),
        ("####-5", "-5"),
        ("#### −5", "-5"),
        ("#### 3\n#### 4", "4"),
        ("#### $18.00", "18.00"),
        ("#### 50%", "50%"),
        ("#### １２", "12"),
        ("#### 1,2", "1,2"),
        ("####", None),
        ("#### 18\nThe answer is: 18", "18"),
        ("none", None),
    ],
)
def test_last_hash(text, answer):
    assert gold.last_hash(text) == answer


@pytest.mark.parametrize(
    "text, answer",
    [
        ("The answer is 5.", "5"),
        ("the answer is: $x+1$", "x+1"),
        ("Final answer: **7**", "7"),
        ("The answer is A.", "A"),
        ("The answer is 5.5. It is not 6.", "5.5"),
        ("The answer is " + "long " * 40, None),
        ("x", None),
    ],
)
def test_last_prose(text, answer):
    assert gold.last_prose(text) == answer


@pytest.mark.parametrize(
    "value, answer",
    [
        (51.0, "51"),
        (0.5, "0.5"),
        (-9867630.0, "-9867630"),
        (1e300, "1e+300"),
        (float("nan"), None),
        (float("inf"), None),
        (True, "True"),
        ([0, 5], "[0, 5]"),
        ([0.333, 2.0], "[0.333, 2]"),
        (None, None),
        ("", None),
        ("  ", None),
        ({}, None),
        ([], None),
        (" 1,234 ", "1234"),
        ("12{,}500", "12500"),
        ("x^2", "x^2"),
    ],
)
def test_to_answer(value, answer):
    assert gold.to_answer(value) == answer


@pytest.mark.parametrize(
    "answer, kind",
    [
        ("72", "number"),
        ("-0.5", "number"),
        ("10,080", "number"),
        ("1e300", "number"),
        ("\\frac12", "latex"),
        ("50%", "latex"),
        ("x^2+1", "latex"),
        ("A", "choice"),
        ("(C)", "choice"),
        ("True", "bool"),
        ("no", "bool"),
        ("[0, 5]", "list"),
        ("Mrs. Hilt", "text"),
        ("\\text{Monday}", "latex"),
        ("3/4", "latex"),
    ],
)
def test_type_of(answer, kind):
    assert gold.type_of(answer) == kind
