"""Tool-integrated reasoning: prose, Python blocks and the interpreter's output (ToRA)."""

from __future__ import annotations

import re
from collections.abc import Iterator

from .adapter import Adapter, Context, Record, Row, example, gold, pick
from .errors import SkipRow
from .example import Example, Message

_OUTPUT = re.compile(r"```output[ \t]*\n(.*?)(?:\n?```|\Z)", re.DOTALL)


def tool_integrated(row: Row, context: Context) -> Example:
    """ToRA: messages, gt, gt_cot; and its model outputs: question, code, gt.

    Each ```output block becomes a tool turn, which is never learnt; what stands before and after it are assistant
    turns.
    """
    turns: list[Message] = []
    if "messages" in row:
        for message in context.dialogue(row["messages"]):
            turns += _split(message["content"]) if message["role"] == "assistant" else [message]
    else:
        turns.append({"role": "user", "content": context.text(row, "question")})
        turns += _split(context.text(row, "code"))
    answer = gold(row.get("gt"))
    if answer is None:
        raise SkipRow("gt holds no answer")
    solution = context.text(row, "gt_cot", required=False)
    meta = pick(row, "id", "idx", "dataset", "level", "type", "pred")
    return example(context.dialogue(turns), answer=answer, solution=solution, meta=meta)


def _split(text: str) -> Iterator[Message]:
    at = 0
    for block in _OUTPUT.finditer(text):
        if before := text[at : block.start()].strip():
            yield {"role": "assistant", "content": before}
        yield {"role": "tool", "content": block[1].strip() or "(no output)"}
        at = block.end()
    if after := text[at:].strip():
        yield {"role": "assistant", "content": after}


def one_output_each(records: Iterator[Record]) -> Iterator[Record]:
    """A ToRA output row holds lists of samples (code, pred, report): one record for each sample."""
    for record in records:
        code = record.row.get("code")
        if not isinstance(code, list):
            yield record
            continue
        predictions = record.row.get("pred")
        for place, sample in enumerate(code):
            row = {**record.row, "code": sample, "pred": None}
            if isinstance(predictions, list) and place < len(predictions):
                row["pred"] = predictions[place]
            yield record._replace(row=row)


def _fits(row: Row) -> str | None:
    if "gt" in row and ("messages" in row or ("code" in row and "question" in row)):
        return "columns gt and " + ("messages" if "messages" in row else "code")
    return None


TOOL_INTEGRATED = Adapter(
    tool_integrated,
    _fits,
    ("messages", "question", "code", "gt", "gt_cot"),
    ("messages", "gt"),
    rank=3,
    expand=one_output_each,
)
