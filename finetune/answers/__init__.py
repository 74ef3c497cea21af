r"""Extract an answer from a text and compare it with the gold one. Rewards and evaluation both use this, and nothing else.

    >>> extract(r"so $x = \boxed{\frac{1}{2}}$.")
    '\\frac{1}{2}'
    >>> equal("0.5", "50%"), equal("[0,1)", "(0,1]")
    (True, False)

What needs sympy runs in worker processes with a time limit (`pool.py`); plain numbers and equal texts never leave this one.
"""

import re
from collections.abc import Sequence
from decimal import Decimal

from .extraction import balanced, boxes, extract
from .normalise import normalise
from .pool import SECONDS, pool

__all__ = ["KINDS", "equal", "extract", "parseable", "verify"]

KINDS = ("number", "latex", "choice", "text", "bool", "list")
MAX_CHARS = 10_000
"""Longer texts are compared only as text: no answer is so long, and parsing one could be an attack."""
_SENTINELS = frozenset(("proof", "notfound", "not found", "nan", "null", "n/a", "error", "?"))
_PLAIN = re.compile(r"[-+]?\$?(?:[1-9]\d{0,2}(?:,\d{3})+|\d{1,300})(\.\d{0,300})?")
_CACHE_SIZE = 50_000
_CACHE_CHARS = 500
_cache: dict[tuple[str, str, str | None], bool] = {}


def parseable(gold: str | None) -> bool:
    """Whether `gold` can be an answer at all: not empty, a sentinel such as "proof" or "notfound", or cut in the middle of a formula.

    One that is not never earns a reward, whatever the prediction; report such rows before training.
    """
    if gold is None or not gold.strip() or gold.strip().casefold() in _SENTINELS or len(gold) > MAX_CHARS:
        return False
    found, unclosed = boxes(gold)
    if unclosed or any(not content for *_, content in found):
        return False
    return balanced("{" + gold + "}", 0) == len(gold) + 2 and normalise(gold) != ""


def equal(gold: str | None, predicted: str | None, answer_type: str | None = None) -> bool:
    r"""Whether `predicted` states the answer `gold`. Takes bare answers, and texts that hold one (see `extract`).

    `answer_type` is one of `KINDS`, or None to judge by the answers themselves. "choice" also takes several letters, "bool" also 1 and 0,
    "text" compares nothing but words, "list" asks for the same items in the same order whatever the brackets.

    - Numbers: exact values; fractions, mixed numbers, powers of ten, number words and Chinese 万 and 亿 are read. Roundings: `quantities.close`.
    - Percent: 28% is 0.28; it is 28 too if only one side has the sign, but 0.28 is not 28 and not 0.28%.
    - Units and currencies: one that is left out is no fault; 5 cm is not 5 m, 500 cm is 5 m (`quantities.units_agree`).
    - Bases: `10101_2` is 21, not 10101.
    - `[0,1)`, `(0,1]` and `(0,1)` differ; an interval is its inequality. Tuples are in order, `\{...\}` and bare lists are not.
    - `x = 5` is 5, `y = 2x + 1` is `2x + 1`; other equations are equal if one is a multiple of the other.
    - Choices by letter, or by text where the gold has it. Words: without case, articles and punctuation. Dates and times: any spelling.
    - Formulas: equal in value for every value of their variables (sympy, by way of math-verify where values do not settle it).

    A gold that is not `parseable` equals nothing. A comparison that takes more than `SECONDS` is False, with a warning in the log.
    Raises ValueError for an unknown `answer_type`.
    """
    return verify([(gold, predicted)], answer_types=[answer_type])[0]


def verify(
    pairs: Sequence[tuple[str | None, str | None]], timeout: float = SECONDS, answer_types: Sequence[str | None] | None = None
) -> list[bool]:
    """`equal` for many (gold, predicted) pairs, side by side on the worker processes. `timeout` is in seconds for each pair."""
    kinds = list(answer_types) if answer_types is not None else [None] * len(pairs)
    if len(kinds) != len(pairs):
        raise ValueError(f"answer_types has {len(kinds)} entries for {len(pairs)} pairs; give one for each pair")
    for kind in kinds:
        if kind is not None and kind not in KINDS:
            raise ValueError(f"answer_type is {kind!r}; expected one of {', '.join(KINDS)}, or None")
    verdicts: list[bool | None] = []
    slow: dict[tuple[str, str, str | None], list[int]] = {}
    for i, ((gold, predicted), kind) in enumerate(zip(pairs, kinds, strict=True)):
        gold, predicted = (None if text is None else str(text) for text in (gold, predicted))
        verdict = _at_once(gold, predicted, kind)
        verdicts.append(verdict)
        if verdict is None and gold is not None and predicted is not None:
            key = (gold, predicted, kind)
            if key in _cache:
                verdicts[i] = _cache[key]
            else:
                slow.setdefault(key, []).append(i)
    for key, verdict in zip(slow, pool().compare_all(list(slow), timeout) if slow else (), strict=True):
        if len(key[0]) + len(key[1]) <= _CACHE_CHARS:
            if len(_cache) >= _CACHE_SIZE:
                _cache.clear()
            _cache[key] = verdict
        for i in slow[key]:
            verdicts[i] = verdict
    return [bool(verdict) for verdict in verdicts]


def _at_once(gold: str | None, predicted: str | None, kind: str | None) -> bool | None:
    """The verdict where it needs no parsing, else None."""
    if gold is None or predicted is None:
        return False
    left, right = _plain(gold), _plain(predicted)
    if left is not None and right is not None and (left == right or "." not in gold + predicted):
        return left == right
    if not parseable(gold) or not predicted.strip():
        return False
    if gold.strip() == predicted.strip():
        return True
    if len(predicted) > MAX_CHARS:
        stated = extract(predicted)
        return equal(gold, stated, kind) if stated and len(stated) <= MAX_CHARS else False
    return None


def _plain(text: str) -> Decimal | None:
    """The value of a plain number: digits, commas between thousands, decimals, a dollar sign. None for anything else."""
    text = text.strip()
    if not _PLAIN.fullmatch(text):
        return None
    return Decimal(text.replace(",", "").replace("$", ""))
