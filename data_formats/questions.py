"""Questions with a gold answer: plain, multiple choice, TheoremQA, verl, and columns the user names."""

from __future__ import annotations

import re
from typing import Any

from .adapter import Adapter, Context, Row, example, first_of, gold, has, missing_column, pick
from .chat import messages as read_messages
from .errors import SkipRow, shorten
from .example import Example
from .gold import find_answer, is_short, last_boxed, strip_calculator, to_answer

_ANSWERS = ("answer", "golden", "final_answer", "expected_answer", "Answer")
_SOLUTIONS = ("solution", "cot", "rationale", "explanation", "response")


def qa_answer(row: Row, context: Context) -> Example:
    """question with answer (or golden, final_answer, expected_answer), and maybe a worked solution (or cot, rationale).

    A long answer column is a worked solution: its gold answer is the last "####", box or "the answer is" in it, if any.
    A short answer is gold and is what the assistant says; `golden` and `expected_answer` are for checking only:
    prompt-only.
    """
    question = context.text(row, "question")
    passage = context.text(row, "passage", required=False)
    if passage:
        question = f"{passage}\n{question}"
    solution_column = first_of({name: value for name, value in row.items() if value is not None}, _SOLUTIONS)
    answer_column = first_of(row, _ANSWERS)
    if answer_column is None and solution_column is None:
        raise missing_column("answer", row, context.adapter)
    system = context.text(row, "system", required=False)
    meta = pick(row, "id", "grade", "level", "type", "subject", "topic", "difficulty", "source", "original_question")
    stated = row.get(answer_column) if answer_column else None
    if solution_column:
        solution = context.text(row, solution_column, required=False)
        answer = gold(stated) or find_answer(solution)
        target = strip_calculator(solution) if context.options.strip_calculator else solution
        if answer and context.options.boxed_answer and last_boxed(target) is None and target.strip():
            target = f"{target.rstrip()}\nThe answer is \\boxed{{{answer}}}."
        return context.problem(question, target, answer=answer, solution=solution, system=system, meta=meta)
    assert answer_column is not None
    if isinstance(stated, str) and (found := find_answer(stated)):
        return context.problem(question, stated, answer=found, solution=stated, system=system, meta=meta)
    if isinstance(stated, str) and stated.strip() and not is_short(stated):
        text = context.text(row, answer_column)
        return context.problem(question, text, solution=text, system=system, meta=meta)
    answer = gold(stated)
    if answer is None:
        raise SkipRow(f"no answer: {answer_column} is {shorten(stated, 20)}")
    says = (
        context.text({"answer": to_answer(stated)}, "answer") if answer_column in ("answer", "final_answer") else None
    )
    if says is not None and isinstance(stated, str):
        says = context.text(row, answer_column).strip()
    return context.problem(question, says, answer=answer, system=system, meta=meta)


def _fits_qa(row: Row) -> str | None:
    if not isinstance(row.get("question"), (str, int, float)) or any(row.get(name) for name in ("options", "choices")):
        return None
    if "####" in str(row.get("answer")):
        return None  # gsm8k
    column = first_of(row, _ANSWERS) or first_of(row, ("solution", "cot"))
    return f"columns question and {column}" if column else None


def custom(row: Row, context: Context) -> Example:
    """Columns the user names: messages, or question with answer or solution (response); system too."""
    return read_messages(row, context) if "messages" in row else qa_answer(row, context)


def multiple_choice(row: Row, context: Context) -> Example:
    """question, options (list, object or text), the letter (correct, answer, Answer, answerKey), maybe a rationale.

    The prompt lists the options as "A) ..."; the answer is the letter, type `choice`. An index or an option's own text
    is turned into its letter. Rows without options (TabMWP's free-text half) are plain questions.
    """
    parts = [context.text(row, name, required=False) for name in ("passage", "table")]
    parts.append(context.text(row, "question"))
    options = row.get("options", row.get("choices"))
    column = first_of(row, ("correct", "answerKey", "answer", "Answer", "label"))
    if column is None:
        raise missing_column("answer", row, context.adapter)
    solution = context.text(row, first_of(row, ("rationale", "solution", "explanation")) or "rationale", required=False)
    meta = pick(row, "id", "grade", "subject", "source")
    answer_type: str | None = "choice"
    answer: str | None
    if options:
        lines, letters = _options(options)
        answer = _letter(row[column], letters)
        parts += lines
    else:
        answer, answer_type = gold(row[column]), None
        if answer is None:
            raise SkipRow(f"no answer: {column} is {shorten(row[column], 20)}")
    target = None
    if solution.strip():
        stated = f"The answer is \\boxed{{{answer}}}." if context.options.boxed_answer else f"The answer is {answer}."
        target = f"{solution.rstrip()}\n{stated}"
    question = "\n".join(part for part in parts if part)
    return context.problem(question, target, answer=answer, answer_type=answer_type, solution=solution, meta=meta)


_LABEL = re.compile(r"\(?([A-J])\s*[).:]\s*")


def _options(options: Any) -> tuple[list[str], dict[str, str]]:
    """(lines for the prompt, letter -> the option's text)."""
    if isinstance(options, dict):
        labels, texts = options.get("label"), options.get("text")
        if isinstance(labels, list) and isinstance(texts, list):  # ARC
            options = dict(zip(labels, texts, strict=False))
        letters = {str(label): str(text).strip() for label, text in options.items()}
        return [f"{label}) {text}" for label, text in letters.items()], letters
    if isinstance(options, str):
        found = list(_LABEL.finditer(options))
        if not found:
            raise SkipRow("options is text without A) B) C)")
        ends = [match.start() for match in found[1:]] + [len(options)]
        letters = {match[1]: options[match.end() : end].strip() for match, end in zip(found, ends, strict=True)}
        return [options.strip()], letters
    if not isinstance(options, list) or not all(isinstance(option, (str, int, float)) for option in options):
        raise SkipRow("options is no list of texts")
    letters = {}
    for place, option in enumerate(map(str, options)):
        label = _LABEL.match(option)
        letters[label[1] if label else "ABCDEFGHIJKLMNOPQRSTUVWXYZ"[place % 26]] = option[
            label.end() if label else 0 :
        ].strip()
    return [f"{letter}) {text}" for letter, text in letters.items()], letters


def _letter(stated: Any, letters: dict[str, str]) -> str:
    text = str(stated).strip()
    if isinstance(stated, int) and not isinstance(stated, bool) and text not in letters:
        if 0 <= stated < len(letters):
            return list(letters)[stated]
    bare = text.strip("(). ")
    for candidate in (text, bare, bare.upper()):
        if candidate in letters:
            return candidate
    same = [letter for letter, option in letters.items() if option == text]
    if len(same) != 1:
        raise SkipRow("the answer is none of the options")
    return same[0]


def _fits_choice(row: Row) -> str | None:
    column = first_of(row, ("options", "choices"))
    if (
        "question" in row
        and column
        and row[column]
        and first_of(row, ("correct", "answerKey", "answer", "Answer", "label"))
    ):
        return f"columns question and {column}"
    return None


_THEOREM_TYPES = {
    "integer": "number",
    "float": "number",
    "bool": "bool",
    "option": "choice",
    "list of integer": "list",
    "list of float": "list",
}


def theoremqa(row: Row, context: Context) -> Example:
    """Question, Answer (number, bool, list or text), Answer_type, Picture. Rows that need it are set aside."""
    if row.get("Picture"):
        raise SkipRow("needs its picture")
    question = context.text(row, "Question")
    answer = gold(row.get("Answer"))
    if answer is None:
        raise SkipRow("no answer")
    kind = _THEOREM_TYPES.get(str(row.get("Answer_type")))
    answer = answer.strip("()") if kind == "choice" else answer
    meta = pick(row, "theorem", "subfield", "field", "source")
    return context.problem(question, None, answer=answer, answer_type=kind, meta=meta)


def _fits_theoremqa(row: Row) -> str | None:
    return "columns Question, Answer and Answer_type" if has(row, "Question", "Answer", "Answer_type") else None


def verl(row: Row, context: Context) -> Example:
    """data_source, prompt (turns), ability, reward_model {style, ground_truth}, extra_info: prompt-only."""
    reward = row.get("reward_model")
    if not isinstance(reward, dict) or "ground_truth" not in reward:
        raise missing_column("reward_model", row, context.adapter)
    answer = gold(reward["ground_truth"])
    if answer is None:
        raise SkipRow("reward_model.ground_truth holds no answer")
    messages = context.dialogue(row.get("prompt"), prompt_only=True)
    extra = row.get("extra_info")
    meta = {**pick(row, "data_source", "ability"), **({"extra_info": extra} if isinstance(extra, dict) else {})}
    return example(messages, answer=answer, meta=meta)


def _fits_verl(row: Row) -> str | None:
    reward = row.get("reward_model")
    if "prompt" in row and isinstance(reward, dict) and "ground_truth" in reward:
        return "columns prompt and reward_model.ground_truth"
    return None


_QA_COLUMNS = ("question", "passage", "system", *_ANSWERS, *_SOLUTIONS)
QA_ANSWER = Adapter(qa_answer, _fits_qa, _QA_COLUMNS, ("question", "answer"), rank=1)
CUSTOM = Adapter(custom, lambda row: None, ("messages", *_QA_COLUMNS), ("question", "answer"), rank=1)
MULTIPLE_CHOICE = Adapter(
    multiple_choice,
    _fits_choice,
    ("question", "options", "choices", "correct", "answer", "answerKey", "rationale", "solution", "passage", "table"),
    ("question", "options", "answer"),
    rank=2,
)
THEOREMQA = Adapter(
    theoremqa, _fits_theoremqa, ("Question", "Answer", "Answer_type", "Picture"), ("Question", "Answer"), rank=3
)
VERL = Adapter(verl, _fits_verl, ("prompt", "reward_model"), ("prompt", "reward_model"), rank=3)
