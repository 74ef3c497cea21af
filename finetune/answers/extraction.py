"""Find the final answer in a model's output or a data set's solution. Pure text work, linear in the length of the text."""

import re

MAX_ANSWER_CHARS = 1_000
"""A final answer is short. What is longer than this (in characters) is not taken for one."""

_BOX = re.compile(r"\\f?box(?:ed)?(?![a-zA-Z])\s*")
_GLUE = re.compile(r"\\(?:quad|qquad|text|mbox|[()\[\],; ])|[{}$\s.]|[A-Za-z](?:_\{?\w+\}?)?\s*=\s*(?=\\[()]?\s*$|\$?\s*$)")
_CONJUNCTION = re.compile(r"(?:.{0,20}\W)?(?:and|or)|.{0,10}[和或]|[,;、，；]*|", re.S | re.I)
_BRACE = re.compile(r"\\.|[{}]", re.S)
_MAX_UNCLOSED = 20
_MAX_BOX_CHARS = 20_000
"""Each unclosed box costs a scan of so many characters; so many unclosed boxes are looked at, and no more."""
_THOUGHT_END = "</think>"
_CLOSING = re.compile(r"final answer is:?\s*((?:(?!final answer)[^\n]){1,300}?)\.?\s*I hope it is correct", re.I)
_HASHES = re.compile(r"####[ \t]*([^\n]*)")
_HEADING = re.compile(r"(?:step|solution|final|answer|conclusion|explanation|part|case|problem|given|note)\b", re.I)
_PHRASE = re.compile(
    r"(?:final\s+answer|\banswers?|\bsolution|\bcorrect\s+(?:option|choice))\b(?:\s+(?:to|for|of)\b[^.\n:]{0,80}?)?"
    r"(?:\*\*)?\s*(?:(?:is|are|would be|should be|will be|must be)\b(?:\s+(?:therefore|thus|then|simply|just|equal to))?\s*:?|[:=：])\s*(?:\*\*)?"
    r"|(?:正确|最终|最后)?(?:的)?(?:答案|答)(?:应该|应)?\s*(?:是|为|：|:|选)\s*[：:]?|故(?:答案)?\s*(?:应)?选(?:择)?\s*[：:]?|因此选(?:择)?\s*[：:]?|所以选(?:择)?\s*[：:]?",
    re.I,
)
_NOT_ANSWER = re.compile(r"(?:correct|right|wrong|incorrect|given|as follows|not\b|to\b|that we|below|above|要|对的|正确)", re.I)
_FENCE = re.compile(r"```output[ \t]*\n(.*?)(?:```|\Z)", re.S)
_MATH = re.compile(
    r"(?<![\\$])\$\$([^$]{1,1000})\$\$|(?<![\\$\d])\$((?:\\\$|[^$\n]){1,1000})(?<!\\)\$|\\\(([^\n]{1,1000}?)\\\)|\\\[(.{1,1000}?)\\\]", re.S
)
_DIGITS = r"\d{1,3}(?:(?:,|\{,\})\d{3})+(?:\.\d+)?(?!\d)|\d+,\d{1,2}(?![\d,])|\d+(?:\.\d+)?|\.\d+"
_NUMBER = re.compile(
    rf"(?<![\w.])[-−+]?(?:[$€£¥￥]\s?)?(?:{_DIGITS})(?:[eE][-+]?\d+\b|\s?[/⁄:]\s?\d+(?:\.\d+)?|\s\d+/\d+)?(?:\s?(?:\\?%|％|€|percent\b))?"
)
_CLAUSE_END = re.compile(
    r"\n|[。；]|，(?!\d)|(?<!\bMr)(?<!\bMrs)(?<!\bDr)[.!?](?=[\s*\"')$]|\Z)|,?\s+(?:because|since|which|as (?:we|the|it|shown)|so|I hope)\b"
)


def balanced(text: str, start: int) -> int:
    """Index just past the brace that closes the one at `text[start]`, or -1 if it is not closed within
    `_MAX_BOX_CHARS`. Escaped braces do not count."""
    depth = 0
    for match in _BRACE.finditer(text, start, start + _MAX_BOX_CHARS):
        depth += {"{": 1, "}": -1}.get(match.group(), 0)
        if depth == 0:
            return match.end()
    return -1


def boxes(text: str) -> tuple[list[tuple[int, int, str]], bool]:
    r"""Every `\boxed{...}` and `\fbox{...}` as (start, end, content), outermost only, and whether one of them was never closed.

    `\boxed 2`, without braces, takes what follows up to a blank or a `$`.
    """
    found: list[tuple[int, int, str]] = []
    end, unclosed = 0, 0
    for match in _BOX.finditer(text):
        if match.start() < end:
            continue  # inside the box before it
        if text[match.end() : match.end() + 1] == "{":
            if unclosed >= _MAX_UNCLOSED:
                continue
            close = balanced(text, match.end())
            if close < 0:
                unclosed += 1
                continue
            found.append((match.start(), close, text[match.end() + 1 : close - 1].strip()))
            end = close
        else:
            bare = re.match(r"[^\s$]{1,100}", text[match.end() : match.end() + 100])
            if bare:
                end = match.end() + bare.end()
                found.append((match.start(), end, bare.group().rstrip(".,")))
    return found, unclosed > 0


def extract(text: str | None) -> str | None:
    r"""The final answer stated in `text`, as written there (only delimiters are stripped), or None if it states none.

    If the text holds a `</think>`, what comes after it is searched first. The first of these that is present decides; within one
    kind the last one wins:

    0. "The final answer is ... I hope it is correct", the closing words that the usual few-shot prompts for MATH ask for.
    1. `\boxed{...}` or `\fbox{...}` with balanced braces, or `\boxed 2`. Boxes joined by nothing but "and", "or" or a comma are one
       answer with several parts. An empty or unclosed box is no answer: an earlier closed one counts, else the result is None, for
       the number left over in a truncated box would be a wrong guess.
    2. `#### 72`, as in GSM8K (a Markdown heading such as `#### Step 1` is not an answer).
    3. A phrase: "the answer is", "final answer:", "答案是", "答案：", "故选".
    4. The last non-empty line of the last ```` ```output ```` block, unless it is an error.
    5. A text that is nothing but an answer ("5 cm", "(B)", "[0,1)"), as it is.
    6. The last formula (`$...$`) or number, with its sign, currency, thousands commas, fraction or percent sign.
    """
    if text is None:
        return None
    if _THOUGHT_END in text:
        after = _extract(text[text.rindex(_THOUGHT_END) + len(_THOUGHT_END) :])
        if after is not None:
            return after
    return _extract(text)


def _extract(text: str) -> str | None:
    closing = list(_CLOSING.finditer(text))
    if closing:
        stated = _stated(closing[-1].group(1).strip() + "\n")
        if stated and not _BOX.search(stated):
            return stated
    found, unclosed = boxes(text)
    found = [box for box in found if box[2] and len(box[2]) <= MAX_ANSWER_CHARS]
    if found:
        return _joined(text, found)
    if unclosed or _BOX.search(text):
        return None
    for match in reversed(list(_HASHES.finditer(text))):
        stated = _bare(match.group(1))
        if stated and len(stated) <= MAX_ANSWER_CHARS and not _HEADING.match(stated) and not stated.endswith(":"):
            return stated
    for match in reversed(list(_PHRASE.finditer(text))):
        stated = _stated(text[match.end() : match.end() + MAX_ANSWER_CHARS])
        if stated:
            return stated
    blocks = _FENCE.findall(text)
    if blocks:
        lines = [line.strip() for line in blocks[-1].splitlines() if line.strip()]
        if lines and len(lines[-1]) <= MAX_ANSWER_CHARS and not re.search(r"Error|Traceback|Exception|timed? ?out", lines[-1], re.I):
            return lines[-1]
    if _is_answer(text):
        return _bare(text)
    return _last_formula_or_number(text[-20_000:])


def _joined(text: str, found: list[tuple[int, int, str]]) -> str:
    """The last box, with those before it that only a conjunction or a comma separates from it."""
    parts = [found[-1]]
    for box in reversed(found[:-1]):
        between = text[box[1] : parts[0][0]]
        joined = len(between) <= 60 and _CONJUNCTION.fullmatch(_GLUE.sub(" ", between).strip())
        if not joined or (between and not between.strip(" $")) or box[2] == parts[0][2]:
            break
        parts.insert(0, box)
    return ", ".join(box[2] for box in parts)


def _bare(text: str) -> str:
    """`text` without Markdown emphasis, quotes and the final full stop."""
    text = text.strip().strip("*`\"").strip()
    return text.rstrip("。").rstrip() if not text.endswith(".") else text[:-1].rstrip()


def _stated(rest: str) -> str | None:
    """The answer at the start of `rest`, what follows "the answer is"."""
    rest = rest.lstrip(" \t:：*\n") if len(rest) - len(rest.lstrip()) < 5 else rest.lstrip(" \t")
    formula = _MATH.match(rest)
    if formula:
        tail = re.match(r"\s*(?:\\?%|percent\b|(?:,|and|or|,? and)\s*\$[^$\n]+\$)+", rest[formula.end() :])
        return _bare(rest[: formula.end() + (tail.end() if tail else 0)])
    choice = re.match(r"\(?([A-J])\)?(?=[\s.,:;)、。]|\Z)", rest)
    end = _CLAUSE_END.search(rest)
    clause = _bare(rest[: end.start()] if end else rest)
    if not clause or _NOT_ANSWER.match(clause):
        return None
    if choice and not re.match(r"[A-J]\s*[-+=*/^,]", rest):
        return choice.group(1)
    words = re.findall(r"(?<!\\)\b[^\W\d_]{2,}", re.sub(r"\\text\{[^}]*\}", "", clause))
    if len(words) > 4 or re.search(r"\b(?:is|are|equals?|was|were)\b", clause):
        return _last_formula_or_number(clause) or (clause if len(words) <= 12 else None)
    return clause


def _is_answer(text: str) -> bool:
    """Whether the whole of `text` is an answer rather than prose with an answer in it."""
    text = text.strip()
    if not text or len(text) > 200 or "\n" in text:
        return False
    if re.match(r"[a-zA-Z]{2,}\s*:\s*\S", text):
        return False
    formula = _MATH.search(text)
    if formula and re.search(r"[a-zA-Z]{2,}", _MATH.sub("", text)):
        return False
    words = re.findall(r"(?<![\\a-zA-Z])[a-zA-Z]{2,}|[\u4e00-\u9fff]{3,}", re.sub(r"\\text\s*\{[^}]*\}", "", text))
    return len(words) <= 1 and bool(re.search(r"[\d\\=]", text) or re.fullmatch(r"\(?[A-Ja-j]\)?\.?|true|false|yes|no|\w+", text, re.I))


def _last_formula_or_number(text: str) -> str | None:
    formulas = list(_MATH.finditer(text))
    numbers = [match for match in _NUMBER.finditer(text) if not any(f.start() <= match.start() < f.end() for f in formulas[-50:])]
    if formulas and (not numbers or formulas[-1].end() > numbers[-1].end()):
        percent = re.match(r"\s*(?:\\?%|percent\b)", text[formulas[-1].end() :])
        last = len(formulas) - 1
        while last > 0 and _CONJUNCTION.fullmatch(between := text[formulas[last - 1].end() : formulas[last].start()].strip()) and between:
            last -= 1
        return ", ".join(formula.group() for formula in formulas[last:]) + (percent.group() if percent else "")
    return numbers[-1].group().strip() if numbers and len(numbers[-1].group()) <= MAX_ANSWER_CHARS else None
