r"""Gold answers: find them in a solution, write them as strings, name their type.

Comparing answers is not done here; this module only says what a file states the answer to be.
"""

from __future__ import annotations

import math
import re
import unicodedata
from typing import Any

_HASH = re.compile(r"####[ \t]*([^\n]*)")
_BOX = re.compile(r"\\(?:boxed|fbox)\s*(?=[{\s\w\\$-])")
_PROSE = re.compile(r"(?:final |correct )?answer\s*(?:is|:)\s*:?\s*([^\n]+)", re.IGNORECASE)
_NUMBER = re.compile(r"[-+]?(?:\d[\d_]*(?:\.\d*)?|\.\d+)(?:[eE][-+]?\d{1,3})?")
_THOUSANDS = re.compile(r"(?<=\d),(?=\d{3}(?!\d))")
_CALCULATOR = re.compile(r"<<[^<>\n]*>>")
_SHORT = 100  # characters: a longer text is prose, not an answer
_SENTINELS = {"proof", "notfound", "not found", "not available", "n/a", "null", "nan"}
_SAME_CHARACTER = {0x2212: "-", 0xFE63: "-", 0x00A0: " ", 0x202F: " ", 0x200B: None, 0xFEFF: None}


def strip_calculator(text: str) -> str:
    """Without GSM8K's `<<48/2=24>>` calculator marks."""
    return _CALCULATOR.sub("", text) if "<<" in text else text


def last_hash(text: str) -> str | None:
    """The text after the last `####` on its line, commas and currency removed; None when absent or empty."""
    found = _HASH.findall(text)
    return clean_number(found[-1]) if found else None


def last_boxed(text: str) -> str | None:
    r"""The content of the last balanced \boxed{...} or \fbox{...}; also `\boxed 2`. None when absent or empty."""
    for match in reversed(list(_BOX.finditer(text))):
        start = match.end()
        if text.startswith("{", start):
            end = _closing_brace(text, start)
            if end is None:
                continue
            content = text[start + 1 : end]
        else:
            bare = re.match(r"-?\w+(?:\.\d+)?", text[start:])
            content = bare.group() if bare else ""
        return content.strip() or None
    return None


def _closing_brace(text: str, start: int) -> int | None:
    depth, position = 0, start
    while position < len(text):
        character = text[position]
        if character == "\\":
            position += 1  # \{ and \} are printed braces, not groups
        elif character == "{":
            depth += 1
        elif character == "}":
            depth -= 1
            if depth == 0:
                return position
        position += 1
    return None


def last_prose(text: str) -> str | None:
    """What follows the last "the answer is" or "answer:", without the closing full stop."""
    found = _PROSE.findall(text)
    if not found:
        return None
    sentence = re.split(r"\.\s", found[-1].strip())[0]
    answer = sentence.strip().strip("*").removesuffix(".").strip("*").strip("$ ")
    return answer if 0 < len(answer) <= _SHORT else None


def is_short(text: str) -> bool:
    """Whether a text can be an answer by itself: one line of at most 100 characters, not blank."""
    return 0 < len(text.strip()) <= _SHORT and "\n" not in text.strip()


def find_answer(text: str) -> str | None:
    """The final answer a solution states: its last `####`, else its last box, else its last "the answer is"."""
    return last_hash(text) or last_boxed(text) or last_prose(text)


def clean_number(text: str) -> str | None:
    """`text` trimmed; a number loses thousands commas, a currency sign and Unicode forms (`$1,000` -> `1000`, `−5` ->
    `-5`).

    What is not a number is returned as it stands; an empty text gives None.
    """
    text = text.strip()
    if text.isascii() and text.isdigit():
        return text
    text = text.translate(_SAME_CHARACTER).strip()
    plain = text if text.isascii() else unicodedata.normalize("NFKC", text)
    plain = _THOUSANDS.sub("", plain.replace("{,}", ",")).replace("\\$", "$")
    plain = re.sub(r"^([-+]?)\s*[$€£¥]\s*", r"\1", plain)
    return plain if _NUMBER.fullmatch(plain) else text or None


def to_answer(value: Any) -> str | None:
    """A gold answer from any JSON value: 51.0 -> "51", True -> "True", [1, 2] -> "[1, 2]", null, NaN and "" -> None."""
    if value is None or isinstance(value, dict):
        return None
    if isinstance(value, bool):
        return str(value)
    if isinstance(value, float):
        if not math.isfinite(value):
            return None
        return str(int(value)) if value.is_integer() and abs(value) < 1e16 else repr(value)
    if isinstance(value, (list, tuple)):
        parts = [to_answer(item) for item in value]
        return f"[{', '.join(part or '' for part in parts)}]" if parts else None
    if isinstance(value, str):
        return clean_number(value)
    return str(value)


def is_sentinel(answer: str) -> bool:
    """True for words some sets write where there is no answer to check: proof, notfound, ..."""
    return answer.strip() == "None" or answer.strip().casefold() in _SENTINELS


def type_of(answer: str) -> str:
    """number | latex | choice | text | bool | list, judged from the answer alone."""
    if _NUMBER.fullmatch(clean_number(answer) or ""):
        return "number"
    if answer.casefold() in ("true", "false", "yes", "no"):
        return "bool"
    if re.fullmatch(r"\(?[A-J]\)?", answer):
        return "choice"
    if answer.startswith("[") and answer.endswith("]") and "\\" not in answer:
        return "list"
    if re.search(r"[\\^_$={}]|\d", answer):
        return "latex"
    return "text"
