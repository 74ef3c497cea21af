"""Compare two formulas with math-verify and sympy. Slow and able to hang: only the worker process imports this."""

import logging
import re
from fractions import Fraction

import sympy
from latex2sympy2_extended import NormalizationConfig
from math_verify import LatexExtractionConfig, parse, verify
from sympy import Basic, Expr, MatrixBase

from .quantities import Number, close, parse_quantity

logging.getLogger("math_verify").setLevel(logging.ERROR)  # it warns that its own time limit is off; the pool keeps the time

_LATEX = LatexExtractionConfig(
    normalization_config=NormalizationConfig(basic_latex=True, units=False, malformed_operators=True, nits=True, boxed="none", equations=False)
)
"""Units are compared in `quantities`; math-verify would only delete them."""
_PRECISION = 50
_FUNCTIONS = "sin cos tan cot sec csc arcsin arccos arctan sinh cosh tanh log ln exp"
_ASCII: list[tuple[re.Pattern[str], str]] = [
    (re.compile(pattern), replacement)
    for pattern, replacement in [
        (r"\*\*", "^"),
        (r"(\d+(?:\.\d+)?)\s*\^\\circ", r"(\1\\cdot\\frac{\\pi}{180})"),
        (r"(?<![\\a-zA-Z])sqrt\s*\(([^()]*)\)", r"\\sqrt{\1}"),
        (r"(?<![\\a-zA-Z])sqrt\s*(\d+)", r"\\sqrt{\1}"),
        (r"(?<![\\a-zA-Z])pi(?![a-zA-Z])", r"\\pi "),
        (r"(?<![\\a-zA-Z])(?:infinity|inf|oo)(?![a-zA-Z])", r"\\infty "),
        (rf"(?<![\\a-zA-Z])({_FUNCTIONS.replace(' ', '|')})(?=\s*\(|\s+\w)", r"\\\1"),
        (r"\^\s*\(([^()]*)\)", r"^{\1}"),
        (r"\^\s*(-?\d{2,}|-\d)", r"^{\1}"),
        (r"\\text\s*\{\s*([ei])\s*\}", r"\1"),
        (r"(?<=[\w)])\*(?=[\w(\\])", r"\\cdot "),
    ]
]
_PROBES = [Fraction(13, 11), Fraction(-7, 5), Fraction(19, 7), Fraction(-3, 13), Fraction(31, 17), Fraction(5, 23), Fraction(-29, 9)]


def to_sympy(text: str) -> Basic | MatrixBase | None:
    """The formula that `text` spells, or None if math-verify cannot read it."""
    quantity = parse_quantity(text)
    if quantity:
        value = quantity[0].value
        return sympy.Rational(value.numerator, value.denominator)
    for pattern, replacement in _ASCII:
        text = pattern.sub(replacement, text)
    parsed = parse(f"${text}$", [_LATEX], fallback_mode="no_fallback", parsing_timeout=None)
    if not parsed or isinstance(parsed[0], str):
        return None
    value = parsed[0]
    if isinstance(value, Expr):
        value = value.doit() if value.is_Matrix else value.subs({s: sympy.I for s in value.free_symbols if str(s) == "i"})
    return value


def same_formula(gold: str, predicted: str) -> bool:
    """Whether two normalised formulas are equal: constants to 50 digits, others at seven rational points, the rest by math-verify."""
    a, b = to_sympy(gold), to_sympy(predicted)
    if a is None or b is None:
        return False
    if isinstance(a, Expr) and isinstance(b, Expr) and not a.is_Matrix and not b.is_Matrix:
        numeric = _same_values(a, b, gold, predicted)
        if numeric is not None:
            return numeric
    return bool(verify(a, b, timeout_seconds=None))


def _same_values(a: Expr, b: Expr, gold: str, predicted: str) -> bool | None:
    """The verdict from values alone, or None if they cannot be had (undefined functions, sums without end, ...)."""
    names = sorted({str(symbol) for symbol in a.free_symbols | b.free_symbols})
    if not names:
        if a.is_Integer and b.is_Integer:
            return a == b
        left, right = _value(a), _value(b)
        if left is None or right is None:
            return None
        if left[1] == right[1] == 0:
            return close(_as_written(left[0], gold), _as_written(right[0], predicted)) or _near(left, right, a, b)
        return _near(left, right, a, b)
    if {str(s) for s in a.free_symbols} != {str(s) for s in b.free_symbols} and not (a.free_symbols and b.free_symbols):
        a, b = sympy.simplify(a), sympy.simplify(b)
    defined = 0
    for shift in range(4):
        points = {name: _PROBES[(i + 2 * shift) % len(_PROBES)] + shift for i, name in enumerate(names)}
        values = [
            _value(e.subs({s: sympy.Rational(points[str(s)].numerator, points[str(s)].denominator) for s in e.free_symbols})) for e in (a, b)
        ]
        if values[0] is None or values[1] is None:
            continue
        if not _near(values[0], values[1], a, b):
            return False
        defined += 1
    return True if defined >= 2 else None


def _value(expression: Expr) -> tuple[Fraction, Fraction] | None:
    """Real and imaginary part of a constant, to 50 digits."""
    number = sympy.N(expression.doit(), _PRECISION)
    real, imaginary = number.as_real_imag()
    if not (real.is_Float or real.is_Rational) or not (imaginary.is_Float or imaginary.is_Rational):
        return None
    if not real.is_finite or not imaginary.is_finite:
        return None
    parts = [Fraction(int(r.p), int(r.q)) for r in (sympy.Rational(str(real)), sympy.Rational(str(imaginary)))]
    return parts[0], parts[1]


def _near(a: tuple[Fraction, Fraction], b: tuple[Fraction, Fraction], *expressions: Expr) -> bool:
    """Equal to 40 digits, or to 9 where one of the formulas has a decimal in it."""
    size = max(abs(part) for part in (*a, *b))
    digits = 9 if any(expression.has(sympy.Float) for expression in expressions) else 40
    return all(abs(x - y) * 10**digits <= size for x, y in zip(a, b, strict=True))


def _as_written(value: Fraction, text: str) -> Number:
    quantity = parse_quantity(text)
    return quantity[0] if quantity and quantity[1] is None else Number(value)
