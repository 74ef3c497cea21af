"""Single-turn instruction formats: Alpaca, prompt and completion, query and response, plain text."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

from .adapter import Adapter, Context, Record, Row, example, first_of, gold, has, is_text, missing_column, pick
from .errors import SkipRow
from .example import Example
from .gold import find_answer, is_short

_NO_INPUT = re.compile(r"\W*no[ _]?input\W*", re.IGNORECASE)


def _turns_of_history(row: Row) -> list[Row]:
    history = row.get("history") or []
    if not isinstance(history, list) or not all(isinstance(pair, (list, tuple)) and len(pair) == 2 for pair in history):
        raise SkipRow("history is no list of [user, assistant] pairs")
    return [
        {"role": role, "content": text}
        for pair in history
        for role, text in zip(("user", "assistant"), pair, strict=True)
    ]


def _single(row: Row, context: Context, user: str, assistant: str, **known: Any) -> Example:
    turns = _turns_of_history(row)
    turns += [{"role": "user", "content": user}, {"role": "assistant", "content": assistant}]
    system = context.text(row, "system", required=False) or context.text(row, "system_prompt", required=False)
    if system:
        turns.insert(0, {"role": "system", "content": system})
    return example(context.dialogue(turns), **known)


def alpaca(row: Row, context: Context) -> Example:
    """instruction, input, output; system and history optional. Dolly's context and response are input and output.

    User = instruction, a newline and the input; an input of "", noinput or <noinput> means none.
    """
    instruction = context.text(row, "instruction")
    given = context.text(row, first_of(row, ("input", "context")) or "input", required=False)
    if given.strip() and not _NO_INPUT.fullmatch(given):
        instruction = f"{instruction}\n{given}"
    output = context.text(row, first_of(row, ("output", "response")) or "output")
    answer = gold(row.get("answer"))
    return _single(row, context, instruction, output, answer=answer, meta=pick(row, "id", "name", "category"))


def alpaca_instances(records: Iterator[Record]) -> Iterator[Record]:
    """Self-instruct seed tasks keep their inputs and outputs in a list `instances`: one record for each."""
    for record in records:
        instances = record.row.get("instances")
        if isinstance(instances, list) and instances and all(isinstance(item, dict) for item in instances):
            rest = {name: value for name, value in record.row.items() if name != "instances"}
            for place, item in enumerate(instances):
                own = {"id": f"{rest['id']}:{place}"} if "id" in rest and len(instances) > 1 else {}
                yield record._replace(row={**rest, **item, **own})
        else:
            yield record


def _fits_alpaca(row: Row) -> str | None:
    if not is_text(row, "instruction"):
        return None
    if "output" in row:
        return "columns instruction and output"
    if has(row, "context", "response"):
        return "columns instruction, context and response"
    return "columns instruction and instances" if isinstance(row.get("instances"), list) else None


def prompt_completion(row: Row, context: Context) -> Example:
    """TRL's types: prompt with completion, prompt alone, or chosen and rejected; each a text or a list of turns.

    A prompt alone is a prompt-only example; its gold answer comes from `answer` or `ground_truth`, else from
    `solution`.
    """
    column = first_of(row, ("completion", "chosen"))
    prompt = row.get("prompt")
    if prompt is None and not isinstance(row.get("chosen"), list):
        raise missing_column("prompt", row, context.adapter)
    turns = _as_turns(prompt, "user") + (_as_turns(row[column], "assistant") if column else [])
    solution = context.text(row, "solution", required=False)
    answer = gold(row.get("answer", row.get("ground_truth"))) or (
        find_answer(solution) or (solution.strip() if is_short(solution) else None)
    )
    meta = pick(row, "id", "source", "data_source")
    if row.get("rejected"):
        rejected = _as_turns(row["rejected"], "assistant")[-1]
        if not isinstance(rejected, dict) or not isinstance(rejected.get("content"), str):
            raise SkipRow("rejected is no text and no list of turns")
        meta["rejected"] = context.text(rejected, "content")
    messages = context.dialogue(turns, prompt_only=column is None)
    return example(messages, answer=answer, solution=solution, meta=meta)


def _as_turns(value: Any, role: str) -> list[Any]:
    if value is None:
        return []
    if isinstance(value, list):
        return value
    return [value] if isinstance(value, dict) else [{"role": role, "content": value}]


def _fits_completion(row: Row) -> str | None:
    if has(row, "prompt", "completion"):
        return "columns prompt and completion"
    if has(row, "prompt", "chosen", "rejected"):
        return "columns prompt, chosen and rejected"
    if isinstance(row.get("chosen"), list) and isinstance(row.get("rejected"), list):
        return "columns chosen and rejected, lists of turns"
    return None


def _fits_prompt(row: Row) -> str | None:
    if isinstance(row.get("prompt"), (str, list)) and not (row.keys() & {"response", "completions"}) and _fits_completion(row) is None:
        return "column prompt alone"
    return None


_QUERIES = ("query", "prompt", "instruction", "question", "input")
_RESPONSES = ("response", "output", "target")


def query_response(row: Row, context: Context) -> Example:
    """A question and a response under one of many names (query, prompt, question, input; response, output, target)."""
    query = first_of(row, _QUERIES) or "query"
    response = first_of(row, _RESPONSES) or "response"
    user, assistant = context.text(row, query), context.text(row, response)
    answer = gold(row.get("answer")) or find_answer(assistant)
    return _single(
        row, context, user, assistant, answer=answer, solution=assistant, meta=pick(row, "id", "type", "source")
    )


def _fits_query(row: Row) -> str | None:
    query, response = first_of(row, _QUERIES), first_of(row, _RESPONSES)
    if query and response and is_text(row, query, response):
        return f"columns {query} and {response}"
    return None


def text(row: Row, context: Context) -> Example:
    """One column of text, for language modelling: the whole of it is learnt, and there is no prompt.

    The text is the only assistant turn, with no user turn before it, and meta["language_modelling"] is True: train on
    it as it stands, without a chat template. It has no answer and cannot serve GRPO.
    """
    content = context.text(row, "text")
    meta = {"language_modelling": True, **pick(row, "id")}
    return example([{"role": "assistant", "content": content, "train": True}], meta=meta)


def _fits_text(row: Row) -> str | None:
    return "column text" if is_text(row, "text") else None


ALPACA = Adapter(
    alpaca,
    _fits_alpaca,
    ("instruction", "input", "output", "context", "response", "system", "history", "answer"),
    ("instruction", "output"),
    rank=2,
    expand=alpaca_instances,
)
PROMPT_COMPLETION = Adapter(
    prompt_completion,
    _fits_completion,
    ("prompt", "completion", "chosen", "rejected", "answer", "ground_truth", "solution"),
    ("prompt", "completion"),
    rank=2,
)
PROMPT_ONLY = Adapter(
    prompt_completion, _fits_prompt, ("prompt", "answer", "ground_truth", "solution"), ("prompt",), rank=1
)
QUERY_RESPONSE = Adapter(
    query_response,
    _fits_query,
    (*_QUERIES, *_RESPONSES, "answer", "system", "system_prompt", "history"),
    ("query", "response"),
    rank=1,
)
TEXT = Adapter(text, _fits_text, ("text",), ("text",), rank=1)
