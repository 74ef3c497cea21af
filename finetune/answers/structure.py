"""Take a normalised answer apart: lists, tuples, sets, intervals, matrices, relations, bases, ratios, dates. Text in, text parts out."""

import re
from dataclasses import dataclass

_OPEN, _CLOSE = "([{", ")]}"
_BRACKETS = {r"\{": (r"\}",), "(": (")", "]"), "[": ("]", ")"), "{": ("}",)}
"""A plain brace only groups in LaTeX. Round and square may close one another: `[0,1)`."""
_SEPARATOR = re.compile(r"\\text\s*\{\s*,?\s*(?:and|or)\s*\}|\\(?:and|or|wedge|vee|land|lor)\b|\b(?:and|or)\b|和|或|[,;]", re.I)
_RELATION = re.compile(r"\\(?:equiv|le|ge|ne|in|approx|lt|gt)(?![a-zA-Z])|<=|>=|!=|==|[=<>]")
_NAME = re.compile(r"(?=.*[a-zA-Z\u4e00-\u9fff])[A-Za-z\\|(){}:/,'\s\u4e00-\u9fff]*")
_SUM_OF_NAMES = re.compile(r"(?=.*[a-zA-Z])[A-Za-z\\|(){}:/,'\s+-]*")
_SUBSCRIPT = re.compile(r"_\s*(?:\{[^{}]*\}|\w)|(?<=[a-zA-Z])\s*\(\s*-?[\w\s,]{1,12}\)")
_MATRIX = re.compile(
    r"[(\[]?\s*\\begin\{([pbvBV]?matrix|smallmatrix|array)\}(?:\s*\{[clr|\s]*\})?((?:(?!\\begin).)*)\\end\{\1\}\s*[)\]]?", re.S
)
_MONTHS = "january february march april may june july august september october november december".split()
_MONTH = "|".join(f"{month[:3]}(?:{month[3:]})?" if month[3:] else month for month in _MONTHS) + "|sept"
_WEEKDAY = r"(?:(?:mon|tues|wednes|thurs|fri|satur|sun)day\s*,?\s*)?"
_DATES = [
    re.compile(pattern, re.I)
    for pattern in (
        rf"{_WEEKDAY}(?P<month>{_MONTH})\.?\s+(?P<day>\d{{1,2}})(?:st|nd|rd|th)?(?:\s*,?\s*(?P<year>\d{{4}}))?",
        rf"{_WEEKDAY}(?:the\s+)?(?P<day>\d{{1,2}})(?:st|nd|rd|th)?\s+(?:of\s+)?(?P<month>{_MONTH})\.?(?:\s*,?\s*(?P<year>\d{{4}}))?",
        rf"(?P<month>{_MONTH})\.?\s*,?\s*(?P<year>\d{{4}})",
        r"(?P<year>\d{4})[-/.](?P<month>\d{1,2})[-/.](?P<day>\d{1,2})",
        r"(?P<month>\d{1,2})[/.-](?P<day>\d{1,2})[/.-](?P<year>\d{4})",
        r"(?:(?P<year>\d{4})年)?(?P<month>\d{1,2})月(?P<day>\d{1,2})[日号]",
    )
]
_TIME = re.compile(r"(\d{1,2})(?::(\d{2}))?(?::(\d{2}))?\s*(?:o'clock)?\s*([ap])?\.?\s*(m)?\.?", re.I)
_DIGITS = "0123456789abcdefghijklmnopqrstuvwxyz"
_BASES = {"two": 2, "three": 3, "four": 4, "five": 5, "six": 6, "seven": 7, "eight": 8, "nine": 9, "ten": 10, "sixteen": 16}


@dataclass(frozen=True)
class Group:
    """Parts of an answer. `left` and `right` are its brackets, both "" for parts that stand side by side without any."""

    left: str
    items: tuple[str, ...]
    right: str


def _levels(text: str) -> list[int]:
    """The bracket depth before each character. Any closing bracket closes any opening one: `[0,1)` is a group."""
    depth, levels = 0, []
    for character in text:
        if character in _CLOSE:
            depth -= 1
        levels.append(depth)
        if character in _OPEN:
            depth += 1
    return levels


def split(text: str, pattern: re.Pattern[str]) -> tuple[list[str], list[str]]:
    """`text` cut where `pattern` matches outside all brackets: the parts, and the separators between them."""
    levels, parts, separators, start = _levels(text), [], [], 0
    for match in pattern.finditer(text):
        if levels[match.start()] == 0 and match.start() >= start:
            parts.append(text[start : match.start()].strip())
            separators.append(match.group())
            start = match.end()
    return [*parts, text[start:].strip()], separators


def group(text: str) -> Group | None:
    """A bracketed list, tuple, interval or set, or parts side by side ("2, 3 and 4"). None for anything else."""
    text = text.strip()
    for left, rights in _BRACKETS.items():
        right = next((right for right in rights if text.endswith(right) and len(text) >= len(left + right)), None)
        if text.startswith(left) and right:
            inner = text[len(left) : -len(right)]
            levels = _levels(inner + ",")
            if min(levels) >= 0 and levels[-1] == 0:
                items = tuple(item for item in split(inner, _SEPARATOR)[0] if item)
                return Group("", items, "") if left == "{" else Group(left, items, right)
    side_by_side = tuple(item for item in split(text, _SEPARATOR)[0] if item)
    return Group("", side_by_side, "") if len(side_by_side) > 1 else None


def union(text: str) -> list[str]:
    r"""The parts of `A \cup B`; one part if there is no union."""
    return split(re.sub(r"(?<=[\])}])\s*(?:U|or|\\text\s*\{\s*or\s*\})\s*(?=[\[(\\])", r"\\cup ", text), re.compile(r"\\cup(?![a-zA-Z])"))[0]


def matrix(text: str) -> list[list[str]] | None:
    """The rows of a LaTeX matrix, or of a list of lists such as `[[1, 0], [0, 1]]`."""
    match = _MATRIX.fullmatch(text.strip())
    if not match:
        outer = group(text)
        rows = [group(item) for item in outer.items] if outer and outer.left == "[" else []
        if len(rows) < 2 or not all(row and row.left == "[" and row.right == "]" for row in rows):
            return None
        return [list(row.items) for row in rows if row]
    lines = [row.strip() for row in re.split(r"\\\\|\\cr", match.group(2).replace(r"\hline", "")) if row.strip() not in ("", "\\")]
    return [[cell.strip() for cell in row.rstrip("\\").split("&")] for row in lines]


def relation(text: str) -> tuple[list[str], list[str]] | None:
    """The sides of `a < x <= b` and its signs, in one spelling each (`=`, `<`, `<=`, `>`, `>=`, `!=`, `in`, `~`)."""
    sides, signs = split(text, _RELATION)
    if not signs:
        return None
    spelling = {r"\le": "<=", r"\ge": ">=", r"\ne": "!=", r"\in": "in", r"\approx": "~", r"\lt": "<", r"\gt": ">", "==": "=", r"\equiv": "="}
    return sides, [spelling.get(sign, sign) for sign in signs]


def is_name(text: str, sums: bool = False) -> bool:
    r"""Whether `text` only names what is asked for: `x`, `f(2)`, `S_{ABC}`, `|AB|`, `(p, q)`; with `sums`, `m + n` too."""
    text = _SUBSCRIPT.sub("", text.strip())
    return not text or bool((_SUM_OF_NAMES if sums else _NAME).fullmatch(text)) and r"\infty" not in text and r"\pi" not in text


def interval(sides: list[str], signs: list[str]) -> tuple[str, str] | None:
    """An inequality in one named variable as (variable, interval): `a < x <= b` gives `(a, b]`."""
    if len(sides) == 3 and is_name(sides[1]) and all(sign in ("<", "<=") for sign in signs):
        return sides[1], f"{'[' if signs[0] == '<=' else '('}{sides[0]}, {sides[2]}{']' if signs[1] == '<=' else ')'}"
    if len(sides) == 3 and is_name(sides[1]) and all(sign in (">", ">=") for sign in signs):
        return interval(sides[::-1], [sign.replace(">", "<") for sign in signs[::-1]])
    if len(sides) == 2 and signs[0] in ("<", "<=", ">", ">="):
        (left, right), sign = sides, signs[0]
        if is_name(right) and not is_name(left):
            left, right, sign = right, left, sign.translate(str.maketrans("<>", "><"))
        if not is_name(left):
            return None
        closed = "=" in sign
        if sign[0] == "<":
            return left, rf"(-\infty, {right}{']' if closed else ')'}"
        return left, rf"{'[' if closed else '('}{right}, \infty)"
    return None


def based(text: str) -> tuple[int, int] | None:
    """(value, base) of `10101_2`, `1AB_{16}` or `101 (base 2)`."""
    text = re.sub(r"\\text\s*\{([^{}]*)\}", r"\1", text)
    match = re.fullmatch(r"(-?)([0-9A-Za-z]{1,200})(?:_\s*\{?\s*([a-z0-9]+)\s*\}?|\s*\(?\s*(?:in\s+)?base[\s-]+([a-z0-9]+)\s*\)?)", text.strip())
    if not match:
        return None
    name = match.group(3) or match.group(4)
    base = _BASES.get(name) or (int(name) if name.isdigit() and len(name) <= 2 else 0)
    digits = match.group(2).lower()
    if not 2 <= base <= 36 or any(_DIGITS.index(digit) >= base for digit in digits) or not (match.group(2).isupper() or any(d.isdigit() for d in digits)):
        return None
    value = int(digits, base)
    return (-value if match.group(1) else value), base


def date(text: str) -> list[tuple[int | None, int, int | None]]:
    """The readings of a date as (year, month, day); `4/7/2020` has two. Empty if `text` is no date."""
    for pattern in _DATES:
        match = pattern.fullmatch(text.strip().rstrip("."))
        if not match:
            continue
        parts = match.groupdict()
        month = next((i for i, name in enumerate(_MONTHS, 1) if name.startswith(match["month"].lower()[:3])), None)
        year, day = (int(parts[key]) if parts.get(key) else None for key in ("year", "day"))
        if month is not None:
            return [(year, month, day)]
        readings = [(year, int(match["month"]), day)]
        if pattern is _DATES[4] and day is not None:
            readings.append((year, day, int(match["month"])))
        return [r for r in readings if 1 <= r[1] <= 12 and (r[2] is None or 1 <= r[2] <= 31)]
    return []


def clock(text: str) -> tuple[int, bool] | None:
    """(seconds since midnight, whether the half of the day is known) of `3:30 p.m.`, `15:30`, `7 am`."""
    match = _TIME.fullmatch(text.strip())
    if not match or not (match.group(2) or match.group(4)):
        return None
    hour, minute, second = int(match.group(1)), int(match.group(2) or 0), int(match.group(3) or 0)
    if hour > 24 or minute > 59 or second > 59 or (match.group(4) and not match.group(5)):
        return None
    if match.group(4):
        hour = hour % 12 + (12 if match.group(4).lower() == "p" else 0)
    return hour * 3600 + minute * 60 + second, bool(match.group(4)) or hour > 12


def ratio(text: str) -> list[str] | None:
    """The terms of `2:3:4`."""
    parts = split(re.sub(r"(?<=\d)\s+to\s+(?=\d)", ":", text), re.compile(":"))[0]
    return parts if len(parts) > 1 and all(parts) else None
