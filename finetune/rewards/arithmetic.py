"""The numbers and equations in a text: what a student computed, and whether it is right."""

import ast
import functools
import operator
import re
from collections.abc import Callable
from dataclasses import dataclass
from fractions import Fraction

_ONES = "zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen seventeen eighteen nineteen"
_TENS = "twenty thirty forty fifty sixty seventy eighty ninety"
WORDS = {word: value for value, word in enumerate(_ONES.split())} | {word: 10 * value for value, word in enumerate(_TENS.split(), 2)}
"""Numbers as words; "one" counts nothing ("this one") and is left out of what a text states."""

_FIGURE = r"\d{1,3}(?:,\d{3}){1,5}(?:\.\d{1,15})?|\d{1,15}(?:\.\d{1,15})?|\.\d{1,15}"
_WORD = rf"\b(?:(?:{'|'.join(_TENS.split())})(?:[ -](?:{'|'.join(_ONES.split()[1:10])}))?|{'|'.join(_ONES.split())})\b"
_STATED = re.compile(rf"\\d?frac\{{(\d{{1,15}})\}}\{{(\d{{1,15}})\}}|(?<![\d./])(\d{{1,15}})/(\d{{1,15}})(?![\d/])|({_FIGURE})|({_WORD})", re.I)

_TERM = rf"\({{0,3}}[ ]?-?[$€£]?(?:{_FIGURE})%?(?:[ ]+[A-Za-z]{{2,20}}\b){{0,3}}[ ]?\){{0,3}}"
_SIDE = rf"{_TERM}(?:[ ]{{0,2}}(?:[-+*/×÷−–]|\bx\b|x(?=[ ]?[\d$(]))[ ]{{0,2}}{_TERM}){{0,20}}"
_EQUATION = re.compile(rf"(?<![\w.,)+*/×÷^%=$-])(?<![\d)+*/×÷^%=x-][ ]){_SIDE}(?:[ ]{{0,2}}=[ ]{{0,2}}{_SIDE})+")
_UNIT = re.compile(r"\b[A-Za-z]{2,}|[$€£]")
_SIGNS = str.maketrans({"×": "*", "x": "*", "÷": "/", "−": "-", "–": "-"})
_OPERATORS: dict[type, Callable[[Fraction, Fraction], Fraction]] = {
    ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul, ast.Div: operator.truediv,
}


@functools.lru_cache(maxsize=10_000)  # a group's completions answer one dialogue
def numbers(text: str) -> frozenset[Fraction]:
    """The values that a text names, in figures, fractions or words.

    >>> sorted(numbers("1,200 apples, 3/4 of $2.50 and twenty-five more"))
    [Fraction(3, 4), Fraction(5, 2), Fraction(25, 1), Fraction(1200, 1)]
    """
    values: set[Fraction] = set()
    for match in _STATED.finditer(text):
        top, bottom, over, under, figure, word = match.groups()
        if figure:
            values.add(Fraction(figure.replace(",", "")))
        elif word:
            if word.casefold() != "one":
                values.add(Fraction(sum(WORDS[part] for part in re.split("[ -]", word.casefold()))))
        elif int(bottom or under):
            values.add(Fraction(int(top or over), int(bottom or under)))
    return frozenset(values)


@dataclass(frozen=True)
class Equation:
    """An equality between numbers, as written."""

    text: str
    left: Fraction
    right: Fraction
    decimals: int
    """Decimals of the right side where it is a bare number: 10/3 = 3.33 holds to two."""

    @property
    def holds(self) -> bool:
        """Whether the sides agree to the decimals written; where a percent sign stands, 0.04, 4 and 4% are the same."""
        scales = (1, 100, Fraction(1, 100)) if "%" in self.text else (1,)
        tolerance = Fraction(1, 2 * 10**self.decimals) if self.decimals else Fraction(0)
        return any(abs(self.left * scale - self.right) <= tolerance * min(1, scale) for scale in scales)


def equations(text: str) -> list[Equation]:
    """The equalities between numbers in a text, units allowed; each `=` of a chain is one.

    >>> [(equation.text, equation.holds) for equation in equations("First 12 + 3 = 15 spoons, then 3 bids * $50 = $140.")]
    [('12 + 3 = 15', True), ('3 bids * $50 = $140', False)]
    """
    found = []
    for match in _EQUATION.finditer(text):
        sides = match.group().split("=")
        for left, right in zip(sides, sides[1:], strict=False):
            values = value(left), value(right)
            # A bare number on the left computes nothing: "6 nephews = 96 / 6" names a thing.
            if values[0] is None or values[1] is None or not re.search(r"\d\D*?[-+*/×÷−–x]\D*?\d", left):
                continue
            bare = re.fullmatch(rf"\s*[$€£]?(?:{_FIGURE})%?[\sA-Za-z]*", right)
            decimals = len(re.sub(r"[^\d.]", "", right).partition(".")[2]) if bare else 0
            shown = re.sub(r"(?:\s+[A-Za-z]+)+\s*$", "", f"{left.strip()} = {right.strip()}")
            found.append(Equation(shown, values[0], values[1], decimals))
    return found


def value(expression: str) -> Fraction | None:
    """What an expression of + - * / and brackets comes to; None where it is none, or divides by zero."""
    plain = _UNIT.sub(" ", re.sub(r"(?<=\d),(?=\d{3})", "", expression)).translate(_SIGNS)
    plain = re.sub(r"(\d+(?:\.\d+)?|\.\d+)\s*%", r"(\1/100)", plain)
    plain = re.sub(r"(?<![\d.])0+(?=\d)", "", plain).strip()
    try:
        return _evaluate(ast.parse(plain, mode="eval").body)
    except (SyntaxError, ValueError, ZeroDivisionError, RecursionError):
        return None


def _evaluate(node: ast.expr) -> Fraction:
    if isinstance(node, ast.Constant) and isinstance(node.value, int | float):
        return Fraction(str(node.value))
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub):
        return -_evaluate(node.operand)
    if isinstance(node, ast.BinOp) and type(node.op) in _OPERATORS:
        return _OPERATORS[type(node.op)](_evaluate(node.left), _evaluate(node.right))
    raise ValueError("not arithmetic")
