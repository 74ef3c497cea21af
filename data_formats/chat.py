"""Chat formats: OpenAI-style messages, ShareGPT conversations, Open Assistant message trees."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

from .adapter import Adapter, Context, Record, Row, example, gold, is_text, missing_column, pick
from .errors import SkipRow
from .example import Example

_MEDIA = ("images", "image", "videos", "video", "audios", "audio")


def _refuse_media(row: Row) -> None:
    for column in _MEDIA:
        if row.get(column):
            raise SkipRow(f"the row has {column}: only text can be used")


def _tools(row: Row) -> dict[str, str]:
    """The tool descriptions as one JSON string (Arrow cannot type them)."""
    tools = row.get("tools", row.get("functions"))
    if not tools:
        return {}
    return {"tools": tools if isinstance(tools, str) else json.dumps(tools, ensure_ascii=False)}


def _conversation(row: Row, context: Context, column: str) -> Example:
    if column not in row:
        raise missing_column(column, row, context.adapter)
    _refuse_media(row)
    turns = row[column]
    preferred, rejected = row.get("chosen"), row.get("rejected")
    if isinstance(turns, list) and isinstance(preferred, dict):
        turns = [*turns, preferred]
    system = row.get("system")
    if isinstance(turns, list) and isinstance(system, str) and system.strip():
        turns = [{"role": "system", "content": system}, *turns]
    if column == "messages" and isinstance(turns, list) and any(isinstance(t, dict) and "from" in t for t in turns):
        context.changes["from and value read as role and content"] += 1
    answer = gold(row.get("answer"))
    messages = context.dialogue(turns, prompt_only=answer is not None)
    meta: dict[str, Any] = {**_tools(row), **pick(row, "id", "label", "source", "category", "dataset")}
    if isinstance(rejected, dict):
        meta["rejected"] = context.text({"rejected": rejected.get("value", rejected.get("content"))}, "rejected")
    return example(messages, answer=answer, solution=context.text(row, "solution", required=False), meta=meta)


def messages(row: Row, context: Context) -> Example:
    """messages: [{role, content}]; content a text or a list of text parts; `train`, `weight`, `loss`, `loss_weight`
    honoured.

    An `answer` column makes the row a problem: its dialogue may then end with the user.
    """
    return _conversation(row, context, "messages")


def sharegpt(row: Row, context: Context) -> Example:
    """conversations: [{from, value}], human | gpt | system | function_call | observation; system and tools columns.

    ms-swift's conversation: [{human, assistant}] pairs are read too. With `chosen` and `rejected`, chosen is the last
    turn and rejected stands in meta.
    """
    column = "conversation" if "conversation" in row and "conversations" not in row else "conversations"
    turns = row.get(column)
    if (
        isinstance(turns, list)
        and turns
        and all(isinstance(t, dict) and "human" in t and "assistant" in t for t in turns)
    ):
        row = {**row, column: [{"role": role, "content": t[role]} for t in turns for role in ("human", "assistant")]}
    return _conversation(row, context, column)


def _fits_messages(row: Row) -> str | None:
    if is_text(row, "problem", "solution"):
        return None  # NuminaMath repeats its problems as messages
    turns = row.get("messages")
    if isinstance(turns, str) and turns.lstrip().startswith("["):
        return "column messages, a list of turns written as text"
    if isinstance(turns, list) and (not turns or isinstance(turns[0], dict)):
        return "column messages, a list of turns"
    return None


def _fits_sharegpt(row: Row) -> str | None:
    for column in ("conversations", "conversation"):
        turns = row.get(column)
        if isinstance(turns, list) and (not turns or isinstance(turns[0], dict)):
            return f"column {column}, a list of turns"
        if isinstance(turns, str) and turns.lstrip().startswith("["):
            return f"column {column}, a list of turns written as text"
    return None


def oasst_paths(records: Iterator[Record]) -> Iterator[Record]:
    """Flat messages with parent ids -> one record for each path from a root to a leaf, under the leaf's number.

    Holds the whole file: a tree's messages may stand anywhere in it. Messages whose parent is not in the file, or that
    stand in a ring of parents, come out as a record marked `orphan`.
    """
    nodes: dict[str, Record] = {}
    children: dict[str | None, list[str]] = {}
    for record in records:
        row = record.row
        name = row.get("message_id") or row.get("user_message_id")  # parent ids name these
        if not isinstance(name, str) or name in nodes:
            yield record._replace(row={"orphan": "message without an id of its own"})
            continue
        parent = row.get("parent_message_id", row.get("parent_id"))
        nodes[name] = record
        children.setdefault(parent if isinstance(parent, str) and parent else None, []).append(name)
    reached: set[str] = set()
    ends: set[str] = set()
    stack: list[list[str]] = [[root] for root in reversed(children.get(None, []))]
    while stack:
        path = stack.pop()
        leaf = path[-1]
        reached.add(leaf)
        below = children.get(leaf, [])
        if below:
            stack += [[*path, child] for child in reversed(below)]
            continue
        while len(path) > 1 and nodes[path[-1]].row.get("role") == "prompter":
            path.pop()  # an unanswered question
        if path[-1] in ends:
            yield nodes[leaf]._replace(row={"orphan": "unanswered question: the path before it is another's"})
        else:
            ends.add(path[-1])
            yield nodes[leaf]._replace(row={"path": [nodes[name].row for name in path], "id": path[-1]})
    for name, record in nodes.items():
        if name not in reached:
            yield record._replace(row={"orphan": "message whose parent is not in the file"})


def oasst_tree(row: Row, context: Context) -> Example:
    """Open Assistant: flat messages with parent ids; one conversation for each path to a leaf."""
    if "orphan" in row:
        raise SkipRow(row["orphan"])
    turns = [{"from": node.get("role"), "value": node.get("text")} for node in row["path"]]
    return example(context.dialogue(turns), meta={"id": row["id"]})


def _fits_oasst(row: Row) -> str | None:
    if is_text(row, "text", "role") and ("parent_message_id" in row or "parent_id" in row):
        return "columns text, role and a parent message id"
    return None


MESSAGES = Adapter(
    messages, _fits_messages, ("messages", "answer", "solution", "system", "tools"), ("messages",), rank=2
)
SHAREGPT = Adapter(
    sharegpt,
    _fits_sharegpt,
    ("conversations", "conversation", "answer", "solution", "system", "tools"),
    ("conversations",),
    rank=2,
)
OASST_TREE = Adapter(
    oasst_tree, _fits_oasst, ("text", "role"), ("text", "role", "parent_message_id"), rank=3, expand=oasst_paths
)
