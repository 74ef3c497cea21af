"""Arithmetic word problems with a number for an answer: SVAMP, ASDiv, MAWPS, GSM-Hard. All are prompt-only."""

from __future__ import annotations

import re

from .adapter import Adapter, Context, Row, gold, has, pick
from .errors import SkipRow
from .example import Example
from .gold import clean_number

_UNIT = re.compile(r"\(([^()]*)\)\s*$")


def word_problem(row: Row, context: Context) -> Example:
    """SVAMP and ASDiv: Body, Question, Answer, Equation or Formula. MAWPS and GSM-Hard: input, target, maybe code.

    A body without final punctuation gets a full stop before its question. ASDiv's "9 (apples)" becomes 9 with
    meta["unit"]; several answers ("12 (red); 5 (blue)") become a list.
    """
    answer_type = None
    if "Body" in row or "Question" in row:
        body, asked = context.text(row, "Body").strip(), context.text(row, "Question").strip()
        question = f"{body} {asked}" if body[-1] in ".?!:,;\"')" else f"{body}. {asked}"
        answer = gold(row.get("Answer"))
        meta = pick(row, "Type", "Equation", "Formula", "Grade", "Solution-Type", "Source")
    else:
        question = context.text(row, "input")
        answer = gold(row.get("target"))
        meta = pick(row, "type", "code")
    if answer is None:
        raise SkipRow("no answer")
    parts = [part for part in answer.split(";") if part.strip()]
    if len(parts) > 1:
        meta["unit"] = "; ".join(_split_unit(part)[1] for part in parts)
        answer, answer_type = f"[{', '.join(_split_unit(part)[0] for part in parts)}]", "list"
    elif _UNIT.search(answer):
        answer, meta["unit"] = _split_unit(answer)
    return context.problem(question, None, answer=answer, answer_type=answer_type, meta=meta)


def _split_unit(answer: str) -> tuple[str, str]:
    unit = _UNIT.search(answer)
    if unit is None or not answer[: unit.start()].strip():
        return clean_number(answer) or "", ""
    return clean_number(answer[: unit.start()]) or "", unit[1].strip()


def _fits(row: Row) -> str | None:
    if has(row, "Body", "Question", "Answer"):
        return "columns Body, Question and Answer"
    if isinstance(row.get("input"), str) and isinstance(row.get("target"), (int, float)):
        return "columns input and target, a number"
    return None


WORD_PROBLEM = Adapter(
    word_problem, _fits, ("Body", "Question", "Answer", "input", "target"), ("Body", "Question", "Answer"), rank=2
)
