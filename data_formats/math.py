"""Problems with worked solutions: GSM8K, MATH, MetaMathQA, MathInstruct, OpenMathInstruct, NuminaMath."""

from __future__ import annotations

import re

from .adapter import Adapter, Context, Row, example, first_of, gold, is_text, pick
from .errors import SkipRow
from .example import Example, Message
from .gold import clean_number, find_answer, is_sentinel, last_boxed, last_hash, strip_calculator, to_answer

_HASH_LINE = re.compile(r"####[^\n]*")
_ANSWER_LINE = re.compile(r"\n*[ \t]*The answer is:[^\n]*\s*\Z")


def _worked(text: str, answer: str | None, context: Context) -> tuple[str, str]:
    """(solution, target): the steps without marks and `####`, and what the assistant is taught to say."""
    if context.options.strip_calculator:
        text = strip_calculator(text)
    solution = _HASH_LINE.sub("", text).strip()
    if not context.options.boxed_answer or answer is None or "####" not in text:
        return solution, text.strip()
    if last_boxed(solution) is None:
        solution_only = _ANSWER_LINE.sub("", solution)
        return solution_only, f"{solution_only}\nThe answer is \\boxed{{{answer}}}.".strip()
    return solution, solution


def gsm8k(row: Row, context: Context) -> Example:
    """question, answer = steps with <<48/2=24>> marks and "#### 72" (openai/grade-school-math)."""
    question = context.text(row, "question")
    answer_text = context.text(row, "answer")
    answer = last_hash(answer_text)
    solution, target = _worked(answer_text, answer, context)
    return context.problem(question, target, answer=answer, solution=solution, meta=pick(row, "id"))


def _fits_gsm8k(row: Row) -> str | None:
    if is_text(row, "question", "answer") and "####" in row["answer"] and not _is_socratic(row["answer"]):
        return "columns question and answer, '####' in answer"
    return None


def _is_socratic(text: str) -> bool:
    lines = [line for line in text.split("\n") if line.strip() and not line.lstrip().startswith("####")]
    return bool(lines) and all(" ** " in line for line in lines)


def gsm8k_socratic(row: Row, context: Context) -> Example:
    """Each line is "sub-question ** step": the tutor asks the sub-question, the student answers with the step.

    The last turn is the tutor's: it states the answer.
    """
    question = context.text(row, "question")
    text = context.text(row, "answer")
    if context.options.strip_calculator:
        text = strip_calculator(text)
    answer = last_hash(text)
    turns: list[Message] = [{"role": "user", "content": question}]
    steps = []
    for line in text.split("\n"):
        ask, mark, step = line.partition(" ** ")
        if mark:
            turns += [{"role": "assistant", "content": ask.strip()}, {"role": "user", "content": step.strip()}]
            steps.append(step.strip())
    if not steps:
        raise SkipRow("no line of the form 'sub-question ** step'")
    if answer is not None:
        stated = f"\\boxed{{{answer}}}" if context.options.boxed_answer else answer
        turns.append({"role": "assistant", "content": f"That is right. The answer is {stated}."})
    messages = context.dialogue(turns)
    return example(messages, answer=answer, solution="\n".join(steps), meta={"question": question, **pick(row, "id")})


def _fits_socratic(row: Row) -> str | None:
    if is_text(row, "question", "answer") and _is_socratic(row["answer"]):
        return "columns question and answer, 'sub-question ** step' lines in answer"
    return None


def math_boxed(row: Row, context: Context) -> Example:
    """MATH and its mirrors, NuminaMath, DeepMath: problem, solution with a last box; an `answer` column wins.

    A column that says there is no answer to check (proof, notfound), or that the problem or solution is not valid
    (NuminaMath-1.5), sets the row aside.
    """
    problem = context.text(row, "problem")
    solution = context.text(row, "solution", required=False)
    for flag in ("problem_is_valid", "solution_is_valid"):
        if str(row.get(flag) or "Yes").strip().casefold() not in ("yes", "true"):
            raise SkipRow(f"{flag} is {str(row[flag])[:20]!r}")
    stated = to_answer(row.get("answer"))
    if stated is not None and is_sentinel(stated):
        raise SkipRow(f"answer is {stated.casefold()!r}: nothing to check")
    if isinstance(row.get("answer"), str):
        stated = row["answer"].strip()  # as the file writes it: 10,080 and \\$18.90 are compared, not rewritten
    answer = stated or last_boxed(solution) or last_hash(solution)
    meta = pick(row, "level", "type", "subject", "unique_id", "difficulty", "source", "problem_type", "question_type")
    target = _worked(solution, answer, context)[1] if solution else None
    return context.problem(problem, target, answer=answer, solution=solution, meta=meta)


def _fits_math(row: Row) -> str | None:
    if is_text(row, "problem") and "generated_solution" not in row and "dialog_history" not in row:
        if is_text(row, "solution"):
            return "columns problem and solution"
        if "answer" in row:
            return "columns problem and answer"
    return None


def metamath(row: Row, context: Context) -> Example:
    """MetaMathQA: query, response, type, original_question.

    GSM8K_Backward: question, output and answer, or question and answer alone (prompt-only).
    """
    query = "query" if "query" in row else "question"
    question = context.text(row, query)
    response = first_of(row, ("response", "output"))
    meta = pick(row, "type", "original_question", "original_answer")
    if response is None:
        return context.problem(question, None, answer=gold(row.get("answer")), meta=meta)
    text = context.text(row, response)
    answer = gold(row.get("answer")) or find_answer(text)
    solution, target = _worked(text, answer, context)
    return context.problem(question, target, answer=answer, solution=solution, meta=meta)


def _fits_metamath(row: Row) -> str | None:
    if is_text(row, "original_question") and (is_text(row, "query") or is_text(row, "question")):
        if first_of(row, ("response", "output", "answer")):
            return "column original_question beside a question"
    return None


def mathinstruct(row: Row, context: Context) -> Example:
    """MathInstruct: source, instruction, output: worked text that ends in "The answer is A.", or a bare Python program.

    A program states no answer, so its examples have none.
    """
    instruction = context.text(row, "instruction")
    output = context.text(row, "output")
    program = "/PoT/" in str(row.get("source"))
    answer = None if program else find_answer(output)
    return context.problem(
        instruction, output, answer=answer and clean_number(answer), solution=output, meta=pick(row, "source")
    )


def _fits_mathinstruct(row: Row) -> str | None:
    if is_text(row, "source", "instruction", "output") and re.match(r"data/(CoT|PoT)/", row["source"]):
        return "columns source (data/CoT or data/PoT), instruction and output"
    return None


def openmathinstruct(row: Row, context: Context) -> Example:
    """OpenMathInstruct-1 and -2: problem or question, generated_solution, expected_answer, problem_source."""
    problem = context.text(row, "problem" if "problem" in row else "question")
    solution = context.text(row, "generated_solution")
    answer = gold(row.get("expected_answer"))
    meta = pick(row, "problem_source", "dataset", "generation_type", "is_correct", "error_message")
    return context.problem(problem, solution, answer=answer, solution=solution, meta=meta)


def _fits_openmathinstruct(row: Row) -> str | None:
    if is_text(row, "generated_solution") and "expected_answer" in row:
        return "columns generated_solution and expected_answer"
    return None


GSM8K = Adapter(gsm8k, _fits_gsm8k, ("question", "answer"), ("question", "answer"), rank=2)
GSM8K_SOCRATIC = Adapter(gsm8k_socratic, _fits_socratic, ("question", "answer"), ("question", "answer"), rank=2)
MATH_BOXED = Adapter(math_boxed, _fits_math, ("problem", "solution", "answer"), ("problem", "solution"), rank=2)
METAMATH = Adapter(
    metamath,
    _fits_metamath,
    ("query", "question", "response", "output", "answer", "original_question"),
    ("query", "response", "original_question"),
    rank=3,
)
MATHINSTRUCT = Adapter(
    mathinstruct, _fits_mathinstruct, ("instruction", "output", "source"), ("source", "instruction", "output"), rank=3
)
OPENMATHINSTRUCT = Adapter(
    openmathinstruct,
    _fits_openmathinstruct,
    ("problem", "question", "generated_solution", "expected_answer"),
    ("problem", "generated_solution", "expected_answer"),
    rank=3,
)
