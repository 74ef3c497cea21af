"""Whether two answers are the same, kind by kind. Runs in the worker process (`worker.py`), for some of it can be slow."""

import re
from collections.abc import Callable

from . import structure
from .extraction import boxes, extract
from .normalise import normalise, unwrap_text, words
from .quantities import Number, Unit, close, parse_quantity, split_unit, units_agree

_TRUE = {"true", "yes", "correct", "right", "对", "是", "正确", "√"}
_FALSE = {"false", "no", "incorrect", "wrong", "错", "否", "不是", "错误", "×"}
_NOTHING = {"no solution", "no solutions", "no real solution", "no real solutions", "none", "empty set", "empty", r"\emptyset", "无解", "{}", r"\{\}"}
_REALS = r"(-\infty, \infty)"
_ALIASES = {
    "all real numbers": _REALS, "all reals": _REALS, "all real number": _REALS, "dne": "does not exist", "全体实数": _REALS,
}  # fmt: skip
_OPTION = re.compile(r"(?:(?:[Oo]ption|[Cc]hoice|选项)\s*)?\(?([A-Ja-j])(?:[).:]|\s*\)|$|(?=\s+(?:because|since)\b))\s*(.*)", re.S)
_STATEMENT = re.compile(r"####|\banswer\b|\bcorrect (?:option|choice)\b|答案|故选|</think>", re.I)
_MAX_DEPTH = 6


def same(gold: str, predicted: str, kind: str | None = None) -> bool:
    """Whether `predicted` states the answer `gold`. `kind` is the hint described in `finetune.answers.equal`."""
    if boxes(gold)[0] or _STATEMENT.search(gold):
        gold = extract(gold) or gold
    g, p = _canonical(gold), _canonical(predicted)
    if not g or not p:
        return False
    stated = extract(predicted) if _is_prose(predicted) else None
    if boxes(predicted)[0] or _STATEMENT.search(predicted):
        return bool(stated) and _same(g, normalise(stated or ""), kind, 0)
    return _same(g, p, kind, 0) or (stated is not None and normalise(stated) != p and _same(g, normalise(stated), kind, 0))


def _canonical(text: str) -> str:
    text = normalise(text)
    return _REALS if re.fullmatch(r"(?:x\s*\\in\s*)?\\mathbb\s*\{?\s*R\s*\}?", text) else _ALIASES.get(words(text), text)


def _is_prose(text: str) -> bool:
    """Whether `text` is more than an answer: a sentence, lines, or words around a formula."""
    if boxes(text)[0] or _STATEMENT.search(text) or ("\n" in text and r"\begin" not in text) or re.match(r"[a-zA-Z]{2,}\s*:", text):
        return True
    plain = re.sub(r"\\(?:text|mbox|begin|end)\w*\s*\{[^{}]*\}|\\[a-zA-Z]+", "", text)
    delimited = re.sub(r"\$[^$]*\$|\\\(.*?\\\)|\\\[.*?\\\]", "", plain)
    count = len(re.findall(r"[a-zA-Z]{2,}", delimited))
    return count >= 4 or (count >= 1 and delimited != plain)


def _same(gold: str, predicted: str, kind: str | None, depth: int) -> bool:
    if depth > _MAX_DEPTH:
        return False
    for rule in RULES:
        verdict = rule(gold, predicted, kind, depth)
        if verdict is not None:
            return verdict
    return False


def _identical(gold: str, predicted: str, kind: str | None, depth: int) -> bool | None:
    return True if gold.replace(" ", "") == predicted.replace(" ", "") else None


def _booleans(gold: str, predicted: str, kind: str | None, depth: int) -> bool | None:
    def truth(text: str) -> bool | None:
        word = words(text)
        if kind == "bool" and word in ("1", "t", "y", "0", "f", "n"):
            return word in "1ty"
        return True if word in _TRUE else False if word in _FALSE else None

    verdicts = truth(gold), truth(predicted)
    return verdicts[0] == verdicts[1] if None not in verdicts else None


def _option(text: str) -> tuple[str | None, str]:
    """("B", "15") of `(B) 15`; (None, text) if there is no letter."""
    match = _OPTION.fullmatch(unwrap_text(text).strip())
    return (match.group(1), match.group(2).strip()) if match else (None, text)


def _choices(gold: str, predicted: str, kind: str | None, depth: int) -> bool | None:
    (letter, text), (other, other_text) = _option(gold), _option(predicted)
    if kind not in (None, "choice", "text"):
        return None
    several = [unwrap_text(side) for side in (gold, predicted)]
    if all(re.fullmatch(r"[A-J](?:\s*,?\s*[A-J])+", side) for side in several) and (kind == "choice" or "," in "".join(several)):
        return set(re.findall("[A-J]", several[0])) == set(re.findall("[A-J]", several[1]))
    if letter and other:
        bare = gold == letter and predicted == other
        if bare and letter.islower() and kind is None:
            return None  # two variables
        if letter.casefold() != other.casefold():
            return False
        return True
    if letter and text and not other:
        return _same(text, predicted, None, depth + 1)
    if other and other_text and not letter:
        return _same(gold, other_text, None, depth + 1)
    return None


def _dates(gold: str, predicted: str, kind: str | None, depth: int) -> bool | None:
    golds, others = structure.date(gold), structure.date(predicted)
    if golds and others:
        return any(all(x is None or y is None or x == y for x, y in zip(a, b, strict=True)) for a in golds for b in others)
    if (golds or others) and (parse_quantity(gold) or parse_quantity(predicted)):
        return False
    a, b = structure.clock(gold), structure.clock(predicted)
    if a and b:
        return a[0] == b[0] if a[1] == b[1] else (a[0] - b[0]) % 43200 == 0
    return None


def _ratios(gold: str, predicted: str, kind: str | None, depth: int) -> bool | None:
    a, b = structure.ratio(gold), structure.ratio(predicted)
    if a is None and b is None:
        return None
    if a and b:
        if len(a) != len(b):
            return False
        if all(_same(x, y, None, depth + 1) for x, y in zip(a, b, strict=True)):
            return True
        values = [[parse_quantity(x) for x in side] for side in (a, b)]
        numbers = [[q[0].value for q in side if q] for side in values]
        if any(len(side) != len(a) or 0 in side for side in numbers):
            return None
        return all(x * numbers[1][0] == y * numbers[0][0] for x, y in zip(*numbers, strict=True))
    terms, other = (a, predicted) if a else (b, gold)
    if terms and len(terms) == 2 and parse_quantity(other):
        return _same(rf"\frac{{{terms[0]}}}{{{terms[1]}}}", other, None, depth + 1)
    return None


def _bases(gold: str, predicted: str, kind: str | None, depth: int) -> bool | None:
    a, b = structure.based(gold), structure.based(predicted)
    if a and b:
        return a[0] == b[0]
    if a or b:
        number = parse_quantity(predicted if a else gold)
        value = (a or b or (0, 0))[0]
        return number[0].value == value if number else None
    return None


def _quantities(gold: str, predicted: str, kind: str | None, depth: int) -> bool | None:
    a, b = parse_quantity(gold), parse_quantity(predicted)
    if a and b:
        return _same_quantity(a, b)
    if a or b:
        number, text = (a, predicted) if a else (b, gold)
        comma = re.fullmatch(r"(-?[$€£]?\d+),(\d+)(\s*[$€£%]?)", text)
        if comma and number and number[0].decimals:  # a decimal comma, opposite a decimal point
            swapped = parse_quantity(f"{comma.group(1)}.{comma.group(2)}{comma.group(3)}")
            return bool(swapped) and (_same_quantity(a, swapped) if a and swapped else _same_quantity(swapped, b) if b and swapped else False)
    return None


def _same_quantity(a: tuple[Number, Unit | None], b: tuple[Number, Unit | None]) -> bool:
    (x, unit), (y, other) = a, b
    percent, other_percent = bool(unit and unit.percent), bool(other and other.percent)
    if percent != other_percent:
        if (unit and not percent) or (other and not other_percent):
            return False
        # 28% accepts 28 and 0.28; 28 accepts 28%, 0.28 accepts 28% but not 0.28%
        return close(_scaled(x, percent), _scaled(y, other_percent)) or (close(x, y) and (percent or abs(x.value) > 1))
    factor = units_agree(unit, other)
    if factor is None:
        return False
    return close(x, y if factor == 1 else Number(y.value * factor)) or (factor != 1 and abs(x.value - y.value * factor) <= abs(x.value) / 10**9)


def _scaled(number: Number, percent: bool) -> Number:
    if not percent:
        return number
    return Number(number.value / 100, None if number.decimals is None else number.decimals + 2, number.digits)


def _matrices(gold: str, predicted: str, kind: str | None, depth: int) -> bool | None:
    a, b = structure.matrix(gold), structure.matrix(predicted)
    if a and b:
        return [len(row) for row in a] == [len(row) for row in b] and all(
            _same(x, y, None, depth + 1) for row, other in zip(a, b, strict=True) for x, y in zip(row, other, strict=True)
        )
    if a or b:
        rows, other = (a or b or []), structure.group(predicted if a else gold)
        if other and (len(rows) == 1 or all(len(row) == 1 for row in rows)) and other.left in ("(", "["):
            flat = [cell for row in rows for cell in row]
            pairs = zip(flat, other.items, strict=False)
            return len(flat) == len(other.items) and all(_same(*(x, y) if a else (y, x), None, depth + 1) for x, y in pairs)
    return None


def _relations(gold: str, predicted: str, kind: str | None, depth: int) -> bool | None:
    if _pieces(gold)[1:] or _pieces(predicted)[1:]:
        return None
    if r"\begin" in gold or r"\begin" in predicted:
        pass
    elif (g := structure.group(gold)) and not g.left or (p := structure.group(predicted)) and not p.left:
        return None  # x = 1, y = 2: one equation at a time
    a, b = structure.relation(gold), structure.relation(predicted)
    if a is None and b is None:
        return None
    bare, other_bare = _answer_side(a, gold), _answer_side(b, predicted, sums=a is None)
    if (a is None or b is None) and bare and other_bare:
        return _same(bare, other_bare, kind, depth + 1)
    if (a is None and b and set(b[1]) == {"="}) or (b is None and a and set(a[1]) == {"="}):
        return False  # an equation that gives no value is not a value
    left, right = a and structure.interval(*a), b and structure.interval(*b)
    if left and right:
        return left[0] == right[0] and _same(left[1], right[1], None, depth + 1) or None
    if left and b is None:
        return _same(left[1], predicted, None, depth + 1)
    if right and a is None:
        return _same(gold, right[1], None, depth + 1)
    if a and b and bare and other_bare and bare != gold and other_bare != predicted:
        same_name = a[0][0].replace(" ", "") == b[0][0].replace(" ", "")
        if same_name or re.search(r"(?<![\\a-zA-Z])[a-zA-Z](?![a-zA-Z])", bare) or "(" in a[0][0] + b[0][0]:
            return _same(bare, other_bare, None, depth + 1) or None
        return False if a[0][0].isalpha() and b[0][0].isalpha() else _same(bare, other_bare, None, depth + 1)
    return None


def _answer_side(parts: tuple[list[str], list[str]] | None, text: str, sums: bool = False) -> str | None:
    r"""What `text` gives as the answer: the last side of `x = 5 + 6 = 11`, the side before `\approx`, the set of `x \in A`."""
    if parts is None:
        return text
    sides, signs = parts
    while signs and signs[-1] == "~" and not (len(sides) == 2 and structure.is_name(sides[0])):
        sides, signs = sides[:-1], signs[:-1]
    if all(sign in ("=", "in", "~") for sign in signs) and (structure.is_name(sides[0], sums) or len(sides) > 2) or not signs:
        return sides[-1]
    if all(sign == "=" for sign in signs) and not re.search("[a-zA-Z]", re.sub(r"\\[a-zA-Z]+", "", "".join(sides))):
        return sides[-1]  # 2 + 3 = 5
    return None


def _groups(gold: str, predicted: str, kind: str | None, depth: int) -> bool | None:
    a_parts, b_parts = _pieces(gold), _pieces(predicted)
    if len(a_parts) > 1 or len(b_parts) > 1:
        return True if _same_set(a_parts, b_parts, depth) else None
    a, b = (None if parse_quantity(side) else structure.group(_expanded(side)) for side in (gold, predicted))
    if a is None and b is None:
        return None
    if a is None or b is None:
        single = a or b
        if single and len(single.items) == 1:
            inner = single.items[0]
            return _same(inner, predicted, kind, depth + 1) if a else _same(gold, inner, kind, depth + 1)
        return False if single and (parse_quantity(gold) or parse_quantity(predicted)) else None
    if len(a.items) == 1 == len(b.items) and a.left in "([" and b.left in "([":
        return None
    if not a.items or not b.items:
        return a.items == b.items
    if kind == "list":
        return _in_order(a.items, b.items, depth)
    if a.left in ("(", "[") and b.left in ("(", "["):
        brackets = len(a.items) != 2 or (a.left, a.right) == (b.left, b.right)
        return brackets and _in_order(a.items, b.items, depth)
    if (a.left == r"\{" and b.left in ("(", "[")) or (b.left == r"\{" and a.left in ("(", "[")):
        return False
    if a.left in ("(", "[") or b.left in ("(", "["):
        return _in_order(a.items, b.items, depth) or None if "=" in gold + predicted else _in_order(a.items, b.items, depth)
    return _same_set([_expanded(x) for x in a.items], [_expanded(x) for x in b.items], depth) or (
        None if re.search("[=<>]", gold + predicted) or _wordy(gold) else False
    )


def _pieces(text: str) -> list[str]:
    r"""The parts of a union, also of one written `x < -1 or x > 1`."""
    sides = structure.split(text, re.compile(r"\\text\s*\{\s*or\s*\}|\bor\b"))[0]
    relations = [structure.relation(side) for side in sides]
    intervals = [structure.interval(*parts) for parts in relations if parts]
    if len(sides) > 1 and len(intervals) == len(sides) and all(intervals):
        return [piece[1] for piece in intervals if piece]
    return structure.union(text)


def _expanded(text: str) -> str:
    r"""`1 \pm x` as the two values it stands for."""
    group = structure.group(text)
    if group is None:
        return f"{text.replace(_PM, '+')}, {text.replace(_PM, '-')}".replace(", +", ", ") if _PM in text else text
    items = [signed for item in group.items for signed in ([item.replace(_PM, "+"), item.replace(_PM, "-")] if _PM in item else [item])]
    return group.left + ", ".join(items) + group.right if _PM in text else text


_PM = r"\pm"


def _in_order(gold: tuple[str, ...], predicted: tuple[str, ...], depth: int) -> bool:
    return len(gold) == len(predicted) and all(_same(x, y, None, depth + 1) for x, y in zip(gold, predicted, strict=True))


def _same_set(gold: list[str], predicted: list[str], depth: int) -> bool:
    """Equal as sets, whatever their order and repetitions. Above 60 items a side they are compared as texts only."""
    gold, predicted = list(dict.fromkeys(gold)), list(dict.fromkeys(predicted))
    if max(len(gold), len(predicted)) > 60:
        return sorted(gold) == sorted(predicted)

    def covered(items: list[str], others: list[str], swap: bool) -> bool:
        return all(any(x == y or (_same(y, x, None, depth + 1) if swap else _same(x, y, None, depth + 1)) for y in others) for x in items)

    return covered(gold, predicted, False) and (len(gold) == len(predicted) and len(gold) < 2 or covered(predicted, gold, True))


def _wordy(text: str) -> bool:
    r"""Whether `text` is words rather than a formula."""
    if re.search(r"\\(?!text|emptyset)[a-zA-Z]+|[=+^_<>]", text):
        return False
    return bool(re.search(r"[a-zA-Z]{3,}|[\u4e00-\u9fff]|\\text", text)) and not re.search(r"\b(?:sin|cos|tan|log|sqrt|exp)\b", text)


def _texts(gold: str, predicted: str, kind: str | None, depth: int) -> bool | None:
    a, b = words(gold), words(predicted)
    if gold.lower() in _NOTHING or a in _NOTHING:
        return predicted.lower() in _NOTHING or b in _NOTHING
    if kind == "text" or _wordy(gold) or _wordy(predicted):
        if a and a.replace(" ", "") == b.replace(" ", ""):
            return True
        if _wordy(gold) and _wordy(predicted) or kind == "text":
            return False
        if parse_quantity(gold) or parse_quantity(predicted):
            return None if split_unit(gold)[1] or split_unit(predicted)[1] else False
    return None


def _formulas(gold: str, predicted: str, kind: str | None, depth: int) -> bool | None:
    from .symbolic import same_formula

    (g, unit), (p, other) = split_unit(gold), split_unit(predicted)
    if unit or other:
        radians = r"\pi" in (p if unit and not other else g)
        if unit and other is None and unit.powers == (("angle", 1),) and radians:
            unit, g = None, rf"({g})\cdot \frac{{\pi}}{{180}}"
        if other and unit is None and other.powers == (("angle", 1),) and radians:
            other, p = None, rf"({p})\cdot \frac{{\pi}}{{180}}"
        factor = units_agree(unit, other)
        if factor is None:
            return False
        if factor != 1:
            p = rf"({p})\cdot \frac{{{factor.numerator}}}{{{factor.denominator}}}"
        if (g, p) != (gold, predicted):
            return _same(g, p, None, depth + 1)
    return same_formula(gold, predicted)


RULES: tuple[Callable[[str, str, str | None, int], bool | None], ...] = (
    _identical, _booleans, _choices, _dates, _bases, _quantities, _matrices, _relations, _groups, _ratios, _texts, _formulas,
)  # fmt: skip
"""Asked in turn. Each says True or False where the answers are of its kind, and None where they are not."""
