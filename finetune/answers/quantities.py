r"""Numbers as people write them, with the units after them: "1,200", "3\frac{1}{2}", "28%", "$18.00", "1.2\times 10^{3}", "5 km/h".

Every function takes text that `normalise` has been over.
"""

import re
from dataclasses import dataclass
from fractions import Fraction

from .normalise import unwrap_text

MAX_EXPONENT = 400
"""Powers of ten beyond this, either way, are not expanded: 1e999999999 would fill the memory."""
MAX_DIGITS = 1_000

_DIGITS = r"(?:[1-9]\d{0,2}(?:,\d{3})+(?![\d,])|[1-9]\d{0,2}(?:[ ]\d{3})+(?![\d/])|\d+)"
_DECIMAL = rf"(?:{_DIGITS}(?:\.\d*)?|\.\d+)"
_CURRENCY = r"(?:US|HK)?[$€£¥₹]|USD|RMB|EUR"
_NUMBER = re.compile(
    rf"""(?P<sign>[-+]?)\s*(?P<currency>{_CURRENCY})?\s*(?P<sign2>-?)(?:
      (?P<whole>{_DIGITS})\s*\+?\s*\\frac\{{\s*(?P<mn>\d+)\s*\}}\{{\s*(?P<md>\d+)\s*\}}
    | (?P<whole2>{_DIGITS})(?:[ ]|[ ]?又|[ ]and[ ]|-(?=\d+/))(?P<mn2>\d+)\s*/\s*(?P<md2>\d+)(?![\d.])
    | \\frac\{{\s*(?P<fsign>-?)\s*(?P<fn>{_DECIMAL})\s*\}}\{{\s*(?P<fsign2>-?)\s*(?P<fd>{_DECIMAL})\s*\}}
    | (?P<sn>{_DECIMAL})\s*/\s*(?P<sd>{_DECIMAL})(?![\d.])
    | (?P<cd>\d+)分之(?P<cn>\d+)
    | (?P<plain>{_DECIMAL})
      (?:[eE](?P<e1>[-+]?\d+)(?![\d.])|\s*(?:\\times|\\cdot|\*|[xX])\s*10\s*(?:\^|\*\*)\s*(?:\{{\s*(?P<e2>[-+]?\d+)\s*\}}|(?P<e3>[-+]?\d+)))?
    )""",
    re.X,
)
_SCALES = {
    "dozen": 12, "hundred": 10**2, "thousand": 10**3, "million": 10**6, "billion": 10**9, "trillion": 10**12,
    "百": 10**2, "千": 10**3, "万": 10**4, "百万": 10**6, "千万": 10**7, "亿": 10**8,
}  # fmt: skip
_SCALE = re.compile(r"(dozen|hundred|thousand|million|billion|trillion)s?\b|(百万|千万|[百千万亿])(?![米克瓦升])")

_ONES = "zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen seventeen eighteen nineteen"
_TENS = "twenty thirty forty fifty sixty seventy eighty ninety"
_WORDS = {w: n for n, w in enumerate(_ONES.split())} | {w: 10 * n for n, w in enumerate(_TENS.split(), 2)}
_ORDINALS = {w: n for n, w in enumerate("first second third fourth fifth sixth seventh eighth ninth tenth".split(), 1)}
_CHINESE = {c: n for n, c in enumerate("零一二三四五六七八九")} | {"〇": 0, "两": 2}
_CHINESE_STEPS = {"十": 10, "百": 100, "千": 1000}
_CHINESE_NUMBER = re.compile(r"(负?)(?:([零〇一二两三四五六七八九十百千万亿]+)分之)?([零〇一二两三四五六七八九十百千万亿]+)")
_PARTS = {"half": 2, "halve": 2, "third": 3, "quarter": 4, "fourth": 4, "fifth": 5, "sixth": 6, "eighth": 8, "tenth": 10}

_ANGLE = Fraction(314159265358979323846, 180 * 10**20)
_UNIT_TABLE: dict[str, dict[str, Fraction | int]] = {
    "length": {
        "m meter metre 米": 1, "cm centimeter centimetre 厘米": Fraction(1, 100), "mm millimeter millimetre 毫米": Fraction(1, 1000),
        "dm decimeter 分米": Fraction(1, 10), "km kilometer kilometre 千米 公里": 1000, "inch": Fraction("0.0254"),
        "ft foot feet": Fraction("0.3048"), "yd yard": Fraction("0.9144"), "mi mile": Fraction("1609.344"),
    },
    "mass": {
        "g gram 克": 1, "kg kilogram kilo 千克 公斤": 1000, "mg milligram 毫克": Fraction(1, 1000), "ton tonne 吨": 10**6, "斤": 500,
        "lb pound": Fraction("453.59237"), "oz ounce": Fraction("28.349523125"),
    },
    "time": {
        "s sec second 秒 秒钟": 1, "min minute 分钟": 60, "h hr hour 小时 时": 3600, "d day 天 日": 86400, "wk week 周 星期": 604800,
        "ms millisecond 毫秒": Fraction(1, 1000),
    },
    "calendar": {"month 个月 月": 1, "yr year 年": 12, "decade": 120, "century centurie": 1200},
    "volume": {"l liter litre 升": 1, "ml milliliter millilitre 毫升": Fraction(1, 1000), "gal gallon": Fraction("3.785411784")},
    "dollar": {"$ us$ usd dollar buck 美元 美金": 1, "cent ¢ penny pennie 美分": Fraction(1, 100)},
    "euro": {"€ eur euro 欧元": 1},
    "sterling": {"£ gbp": 1},
    "yuan": {"¥ rmb cny yuan 元 块 块钱 人民币": 1, "角": Fraction(1, 10)},
    "rupee": {"₹ inr rupee": 1},
    "person": {"people person": 1},
    "angle": {r"deg degree \circ 度": _ANGLE, "rad radian 弧度": 1},
    "celsius": {"°c ℃ celsius 摄氏度": 1},
    "fahrenheit": {"°f fahrenheit": 1},
    "percent": {"% percent pct percentage": 1},
    "information": {"bit": 1, "byte": 8},
}  # fmt: skip
_UNITS = {name: (dimension, Fraction(size)) for dimension, row in _UNIT_TABLE.items() for names, size in row.items() for name in names.split()}
_NOT_UNITS = frozenset(
    "pi sin cos tan cot sec csc log ln exp sqrt frac and or not mod lim max min int sum infty to if is are was then but no x y z".split()
)
_FILLERS = frozenset("of the a an in total per each more less fewer approximately about old long tall 钱 only away left".split())
_UNIT_TOKEN = re.compile(
    r"\\circ|\s+|(?:us)?[$€£¥₹%¢]|[a-zA-Z][a-zA-Z'-]*[.]?|[\u4e00-\u9fff]+|/|\*|\\cdot|\\times|\^\s*\{?\s*(-?\d)\s*\}?|(?<=[a-z])([23])(?!\d)"
)


@dataclass(frozen=True)
class Unit:
    """A product of powers of known units, and of words taken as units of their own ("apples")."""

    powers: tuple[tuple[str, int], ...]
    scale: Fraction
    words: frozenset[str] = frozenset()

    @property
    def percent(self) -> bool:
        return self.powers == (("percent", 1),)


@dataclass(frozen=True)
class Number:
    """A number as written: its value, and how many decimals and significant digits were written (None: written exactly)."""

    value: Fraction
    decimals: int | None = None
    digits: int = 0


def parse_quantity(text: str) -> tuple[Number, Unit | None] | None:
    """The number and the unit that make up the whole of `text`, or None if it is anything else."""
    if len(text) > MAX_DIGITS:
        return None
    text = unwrap_text(text).strip()
    percent_of = re.match(r"(-?)百分之\s*", text)
    if percent_of:
        text = percent_of.group(1) + text[percent_of.end() :] + "%"
    if text.startswith("(") and text.endswith(")") and text.count("(") == 1:
        text = text[1:-1].strip()
    match = _NUMBER.match(text)
    if not match:
        return _in_words(text)
    number = _number(match)
    if number is None:
        return None
    rest = text[match.end() :]
    scale = _SCALE.match(rest.lstrip())
    if scale and match.group("plain"):
        number = Number(number.value * _SCALES[scale.group(1) or scale.group(2)])
        rest = rest.lstrip()[scale.end() :]
    unit = parse_unit(rest) if rest.strip() else None
    if rest.strip() and unit is None:
        return _compound(text)
    if match.group("currency"):
        currency = parse_unit(match.group("currency").lower())
        unit = currency if unit is None or not unit.powers else unit
    return number, unit


def _number(match: re.Match[str]) -> Number | None:
    g = match.groupdict()
    negative = sum(g[key] == "-" for key in ("sign", "sign2", "fsign", "fsign2")) % 2 == 1
    decimals, digits = None, 0
    if g["plain"]:
        exponent = int((g["e1"] or g["e2"] or g["e3"] or "0")[:12])
        if abs(exponent) > MAX_EXPONENT:
            return None
        value = _decimal(g["plain"]) * Fraction(10) ** exponent
        if "." in g["plain"]:
            decimals = max(0, len(g["plain"].partition(".")[2]) - exponent)
            digits = len(re.sub(r"\D", "", g["plain"]).lstrip("0"))
    else:
        numerator = _decimal(g["mn"] or g["mn2"] or g["fn"] or g["sn"] or g["cn"])
        denominator = _decimal(g["md"] or g["md2"] or g["fd"] or g["sd"] or g["cd"])
        if denominator == 0:
            return None
        value = numerator / denominator
        whole = g["whole"] or g["whole2"]
        if whole:
            if value >= 1:
                return None  # "11 7/6" is no mixed number
            value += _decimal(whole)
    return Number(-value if negative else value, decimals, digits)


def _decimal(text: str) -> Fraction:
    return Fraction("0" + text.replace(",", "").replace(" ", "").rstrip("."))


def _compound(text: str) -> tuple[Number, Unit | None] | None:
    """ "1 hour 30 minutes": two or three quantities of one kind, the largest unit first."""
    parts = re.findall(r"\d+(?:\.\d+)?\s*[^\d,;=<>+*/^()-]+", text)
    if not 2 <= len(parts) <= 3 or "".join(parts) != text:
        return None
    read = [parse_quantity(re.sub(r"\band\s*$", "", part).strip()) for part in parts]
    units = [quantity[1] for quantity in read if quantity and quantity[1]]
    if len(units) != len(parts) or len({unit.powers for unit in units}) != 1 or not units[0].powers:
        return None
    if any(small.scale >= large.scale for large, small in zip(units, units[1:], strict=False)):
        return None
    total = sum((q[0].value * q[1].scale for q in read if q and q[1]), Fraction(0))
    return Number(total / units[-1].scale), units[-1]


def _in_chinese(text: str) -> tuple[Number, Unit | None] | None:
    """ "十二", "三分之一", "三千零五十元"."""
    match = _CHINESE_NUMBER.match(text)
    if not match:
        return None
    rest = text[match.end() :]
    unit = parse_unit(rest) if rest else None
    value = Fraction(_chinese_integer(match.group(3)))
    below = _chinese_integer(match.group(2)) if match.group(2) else 1
    if below == 0 or (rest and (unit is None or not unit.powers)):
        return None
    return Number((-value if match.group(1) else value) / below), unit


def _chinese_integer(text: str) -> int:
    total, section, digit = 0, 0, 0
    for character in text:
        if character in _CHINESE:
            digit = _CHINESE[character]
        elif character in _CHINESE_STEPS:
            section, digit = section + (digit or 1) * _CHINESE_STEPS[character], 0
        else:
            total, section, digit = (total + section + digit) * _SCALES[character], 0, 0
    return total + section + digit


def _in_words(text: str) -> tuple[Number, Unit | None] | None:
    """ "twenty-five", "two thirds", "one hundred and five apples", "fourth"."""
    if text.lower() in _ORDINALS:
        return Number(Fraction(_ORDINALS[text.lower()])), None
    if text[:1] and text[0] in "负零〇一二两三四五六七八九十百千":
        return _in_chinese(text)
    tokens = [t for t in re.split(r"[\s-]+", text.lower()) if t]
    if not tokens or (tokens[0] not in _WORDS and tokens[0] not in _PARTS and tokens[0] not in ("negative", "minus")):
        return None
    negative = tokens[0] in ("negative", "minus")
    total, group, i = 0, 0, int(negative)
    start = i
    while i < len(tokens):
        token = tokens[i]
        if token in _WORDS:
            group += _WORDS[token]
        elif token == "hundred" and i > start:
            group *= 100
        elif token in _SCALES and i > start:
            total, group = total + group * _SCALES[token], 0
        elif not (token == "and" and i > start and i + 1 < len(tokens) and tokens[i + 1] in _WORDS):
            break
        i += 1
    value = Fraction(total + group)
    part = tokens[i].removesuffix("s") if i < len(tokens) else ""
    if part in _PARTS:
        value, i = (value if i > start else 1) * Fraction(1, _PARTS[part]), i + 1
    elif i == start:
        return None
    rest = " ".join(tokens[i:])
    unit = parse_unit(" " + rest) if rest else None
    if rest and unit is None:
        return None
    return Number(-value if negative else value), unit


def parse_unit(text: str) -> Unit | None:
    """The unit that `text` spells, or None if it does not look like one. Filler words and unknown Chinese counters are skipped."""
    text = text.replace(r"^\circ C", " °c").replace(r"^\circ F", " °f").replace(r"^\circ", r" \circ").replace("°", " °")
    text = text.replace(r"\circ C", "°c").replace(r"\circ F", "°f")
    spaced = text.startswith(" ")
    text = re.sub(r"^[-\s]+", "", text)
    text = re.sub(r"\bmph\b", "mile / hour", text)
    text = re.sub(r"\bsq\.?(?=\s)", "square", re.sub(r"\(s\)", "s", text))
    if not text or len(text) > 80 or len(text.split()) > 8:
        return None
    powers: dict[str, int] = {}
    scale, unknown, side, prefix, previous = Fraction(1), set(), 1, 1, ""
    position = 0
    while position < len(text):
        match = re.compile(r"°[cf]\b").match(text, position) or _UNIT_TOKEN.match(text, position)
        if not match:
            return None
        token, position = match.group(), match.end()
        exponent = match.group(1) or match.group(2) if match.re is _UNIT_TOKEN else None
        if exponent or token in ("squared", "cubed"):
            extra = int(exponent) - 1 if exponent else {"squared": 1, "cubed": 2}[token]
            if previous not in _UNITS or extra < 0:
                return None
            dimension, size = _UNITS[previous]
            powers[dimension] = powers.get(dimension, 0) + side * extra
            scale *= size ** (side * extra)
            continue
        if token.isspace() or token in ("*", r"\cdot", r"\times"):
            continue
        if token in ("/", "per", "every", "每"):
            side = -1
            continue
        name = token.rstrip(".").removesuffix("'s")
        if name.lower() in ("square", "cubic"):
            prefix = 2 if name.lower() == "square" else 3
            continue
        if name[:2] in ("平方", "立方") and name[2:] in _UNITS:
            prefix, name = (2 if name[:2] == "平方" else 3), name[2:]
        known = _known(name)
        if known is None:
            if name.lower() in _FILLERS or "\u4e00" <= name[0] <= "\u9fff":
                continue
            if len(name) < 2 or name.lower() in _NOT_UNITS or name[0] == "\\":
                return None
            unknown.add(singular(name.lower()))
            continue
        if len(known) == 1 and known.isalpha() and known.isascii() and not spaced and not powers and position == len(text):
            return None  # "5m" may be five times m
        dimension, size = _UNITS[known]
        powers[dimension] = powers.get(dimension, 0) + side * prefix
        scale *= size ** (side * prefix)
        previous, prefix = known, 1
    return Unit(tuple(sorted((d, p) for d, p in powers.items() if p)), scale, frozenset(unknown))


def _known(name: str) -> str | None:
    if name in _UNITS:
        return name
    if len(name) == 1:
        return "l" if name == "L" else None
    low = name.lower()
    for candidate in (low, singular(low), low.removesuffix("es")):
        if candidate in _UNITS:
            return candidate
    return "inch" if low in ("in", "ins", "inches") else None


def singular(word: str) -> str:
    return word[:-1] if word.endswith("s") and not word.endswith("ss") and len(word) > 3 else word


def split_unit(text: str) -> tuple[str, Unit | None]:
    r"""A trailing unit split off an expression: `12\pi\text{ cm}^2` -> (`12\pi`, cm^2)."""
    match = re.search(r"(?:\\text\s*\{([^{}]*)\}\s*(\^\s*\{?\s*\d\s*\}?)?|(\s[a-zA-Z]{2,}(?:\s*\^\s*\{?\s*\d\s*\}?)?)|(\^\\circ|%))\s*$", text)
    if match and text[: match.start()].strip() and not re.search(r"[=<>,]|\\text|\b(?:and|or)\b", text[: match.start()]):
        if match.group(4) == r"^\circ" and re.search(r"\\(?:sin|cos|tan|cot|sec|csc)", text):
            return text, None  # the angle is the function's argument
        unit = parse_unit(" " + (match.group(1) or match.group(3) or match.group(4) or "").strip() + (match.group(2) or ""))
        if unit is not None and (unit.powers or match.group(1)):
            return text[: match.start()].strip(), unit
    return text, None


def units_agree(gold: Unit | None, predicted: Unit | None) -> Fraction | None:
    """What to multiply the predicted number by before it is compared with the gold, or None if the units differ.

    A missing unit agrees with any. Known units of one dimension are converted (500 cm is 5 m). A unit "per something" agrees with
    the same unit where the other leaves that out. Unknown words agree if one side's are among the other's.
    """
    if gold is None or predicted is None or gold == predicted:
        return Fraction(1)
    if gold.powers == predicted.powers:
        if gold.words <= predicted.words or predicted.words <= gold.words or gold.powers:
            return predicted.scale / gold.scale
        return None
    if not gold.powers or not predicted.powers:
        known, other = (gold, predicted) if gold.powers else (predicted, gold)
        return Fraction(1) if not other.words or other.words <= known.words else None
    numerators = [tuple(x for x in unit.powers if x[1] > 0) for unit in (gold, predicted)]
    if numerators[0] == numerators[1] and any(len(unit.powers) == len(numerators[0]) for unit in (gold, predicted)):
        return Fraction(1)
    return None


def close(gold: Number, predicted: Number) -> bool:
    """Whether two numbers are the same, as exactly as they were written.

    Equal values are. Otherwise one of them must be a decimal, and:

    - a gold with at least 3 significant digits and 2 decimals accepts what rounds to it (3.14 accepts pi, 0.5 does not accept 0.54);
    - an exact gold accepts its own correctly rounded decimal of at least 4 significant digits (1/3 accepts 0.3333, not 0.33), a gold
      that is itself a decimal one of at least 6;
    - two decimals of at least 10 significant digits may differ by 1e-9 of their size, which is what floating point leaves.
    """
    difference = abs(gold.value - predicted.value)
    if difference == 0:
        return True
    if gold.decimals is not None and gold.decimals >= 2 and gold.digits >= 3 and _rounds(difference, gold.decimals):
        return True
    if predicted.decimals and predicted.digits >= (4 if gold.decimals is None else 6) and gold.value.denominator != 1:
        if _rounds(difference, predicted.decimals):
            return True
    longest = max(gold.digits if gold.decimals else 0, predicted.digits if predicted.decimals else 0)
    return longest >= 10 and difference <= abs(gold.value) / 10**9


def _rounds(difference: Fraction, decimals: int) -> bool:
    return difference * 2 * 10**decimals <= 1
