"""Raw turns -> canonical dialogue; each thing that had to be changed is counted by kind."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Mapping
from typing import Any

from .errors import SkipRow, nearest, shorten
from .example import Message

# Names of the speakers, case and blanks aside. The student is the user, the teacher the assistant.
ROLES = {
    "system": "system",
    "developer": "system",
    "user": "user",
    "human": "user",
    "prompter": "user",
    "student": "user",
    "assistant": "assistant",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "bing": "assistant",
    "bard": "assistant",
    "model": "assistant",
    "bot": "assistant",
    "teacher": "assistant",
    "tutor": "assistant",
    "function_call": "assistant",
    "tool_call": "assistant",
    "tool": "tool",
    "function": "tool",
    "observation": "tool",
    "function_response": "tool",
    "tool_response": "tool",
    "ipython": "tool",
}

_CALL_ROLES = ("function_call", "tool_call")
_TEXT_PARTS = ("text", "input_text", "output_text")
# C0 and C1 controls but tab, newline and carriage return; zero-width space; byte-order mark; lone surrogates.
_BAD_CHARACTERS = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\u200b\ufeff\ud800-\udfff]")


def clean_text(text: str, changes: Counter[str]) -> str:
    """`text` without control and zero-width characters, CRLF as LF, lone surrogates as U+FFFD; counted."""
    if "\r" in text:
        changes["CRLF line ends written as LF"] += 1
        text = text.replace("\r\n", "\n").replace("\r", "\n")
    if _BAD_CHARACTERS.search(text):
        changes["control or zero-width characters removed"] += 1
        text = _BAD_CHARACTERS.sub(lambda found: "\ufffd" if "\ud800" <= found.group() <= "\udfff" else "", text)
    return text


def canonical(
    turns: object,
    changes: Counter[str],
    *,
    opening: str,
    prompt_only: bool = False,
    roles: Mapping[str, str] | None = None,
) -> list[Message]:
    """The turns of one row as canonical messages (see Example.messages).

    `turns` is a list of {"role" or "from", "content" or "value"} or a string holding one. Adds to `changes`. `opening`
    is the user turn put before a dialogue the assistant begins. With `prompt_only`, trailing user turns stay and
    trailing assistant turns are allowed; without it the dialogue is cut after its last assistant turn. `roles` adds
    speaker names to ROLES. Raises SkipRow when no dialogue can be made of them.
    """
    known = {**ROLES, **{k.strip().casefold(): v for k, v in roles.items()}} if roles else ROLES
    messages: list[Message] = []
    systems: list[str] = []
    silent_user = False
    for turn in _as_list(turns, changes):
        message = _message(turn, known, changes)
        if not message["content"].strip():
            changes["empty turn removed"] += 1
            silent_user |= message["role"] == "user" and not messages
        elif message["role"] == "system":
            if messages:
                changes["late system turn moved to the front"] += 1
            elif systems:
                changes["system turns merged"] += 1
            systems.append(message["content"])
        elif messages and message["role"] == messages[-1]["role"] != "tool":
            _merge(messages[-1], message, changes)
        else:
            messages.append(message)
    if not messages:
        raise SkipRow("no turn with any text")
    _check_tools(messages)
    if not prompt_only:
        while messages and messages[-1]["role"] != "assistant":
            changes[f"trailing {messages.pop()['role']} turn removed"] += 1
        if not messages:
            raise SkipRow("no assistant turn to learn from")
    if messages[0]["role"] == "assistant":
        if silent_user:
            raise SkipRow("the user's first turn is empty")
        changes["opening user turn added"] += 1
        messages.insert(0, {"role": "user", "content": opening})
    if systems:
        messages.insert(0, {"role": "system", "content": "\n\n".join(systems)})
    return messages


def _as_list(turns: object, changes: Counter[str]) -> list[Any]:
    if isinstance(turns, str):
        text = turns.strip()
        if not text.startswith("["):
            raise SkipRow("messages is plain text, not a list of turns")
        turns = parse_text_list(text, changes)
    if not isinstance(turns, list):
        raise SkipRow(f"messages is {_kind(turns)}, not a list of turns")
    if not turns:
        raise SkipRow("messages is an empty list")
    return turns


def parse_text_list(text: str, changes: Counter[str]) -> Any:
    """A list written as text: JSON, else a Python literal (what pandas writes into a CSV cell). Counted."""
    try:
        value = json.loads(text)
        changes["list read from a JSON string"] += 1
        return value
    except (ValueError, RecursionError):
        pass
    import ast

    try:
        value = ast.literal_eval(text)
    except (ValueError, SyntaxError, MemoryError, RecursionError, TypeError):
        raise SkipRow("text that should hold a list is neither JSON nor a Python literal") from None
    changes["list read from a Python literal"] += 1
    return value


def _message(turn: object, known: Mapping[str, str], changes: Counter[str]) -> Message:
    if not isinstance(turn, dict):
        raise SkipRow(f"a turn is {_kind(turn)}, not a role and a content")
    written = turn.get("role", turn.get("from"))
    if not isinstance(written, str):
        raise SkipRow("a turn has no role")
    name = written.strip().casefold()
    role = known.get(name)
    if role is None:
        close = nearest(name, known)
        raise SkipRow(f"unknown role {shorten(written, 30)}" + (f", nearest is {close!r}" if close else ""))
    if written not in known:
        changes["role's case or blanks put right"] += 1
    elif written != role and "role" in turn:
        changes["role renamed"] += 1
    content = turn["content"] if "content" in turn else turn.get("value")
    message: Message = {"role": role, "content": _content(content, changes)}
    if name in _CALL_ROLES:
        message["content"] = f"<tool_call>\n{message['content'].strip()}\n</tool_call>"
    if role == "assistant":
        if turn.get("tool_calls"):
            message["content"] = "\n".join(filter(None, [message["content"], _tool_calls(turn["tool_calls"])]))
        message["train"] = _trains(turn)
    if "moves" in turn and isinstance(turn["moves"], list):
        message["moves"] = turn["moves"]
    return message


def _content(content: object, changes: Counter[str]) -> str:
    if isinstance(content, str):
        return clean_text(content, changes)
    if content is None:
        return ""
    if isinstance(content, list):
        texts = []
        for part in content:
            texts.append(_part(part, changes))
        changes["content parts joined"] += 1
        return clean_text("".join(texts), changes)
    raise SkipRow(f"a turn's content is {_kind(content)}, not text")


def _part(part: object, changes: Counter[str]) -> str:
    if isinstance(part, str):
        return part
    if not isinstance(part, dict):
        raise SkipRow(f"a content part is {_kind(part)}, not text")
    kind = part.get("type", "text")
    text = part.get("text", part.get("value"))
    if kind in _TEXT_PARTS:
        return text if isinstance(text, str) else ""
    if kind == "reasoning":
        changes["reasoning part written between <think> tags"] += 1
        return f"<think>\n{text}\n</think>\n\n" if isinstance(text, str) else ""
    if kind == "tool_call" and isinstance(text, str):
        return f"<tool_call>\n{text.strip()}\n</tool_call>"
    if kind == "tools" and isinstance(text, str):
        return text
    raise SkipRow(f"a content part of type {shorten(kind, 30)}: only text can be used")


def _tool_calls(calls: object) -> str:
    """OpenAI tool calls as text in the <tool_call> form of Hermes and Qwen, so that no chat template can lose them."""
    if isinstance(calls, str):
        calls = _as_list(calls, Counter())
    if not isinstance(calls, list) or not all(isinstance(call, dict) for call in calls):
        raise SkipRow("tool_calls is not a list of calls")
    texts = []
    for call in calls:
        function = call.get("function", call)
        if not isinstance(function, dict) or not isinstance(function.get("name"), str):
            raise SkipRow("a tool call has no function name")
        arguments = function.get("arguments", {})
        if isinstance(arguments, str):
            try:
                arguments = json.loads(arguments)
            except (ValueError, RecursionError):
                pass  # some models emit arguments that are not JSON: they are kept as the text they are
        call_text = json.dumps({"name": function["name"], "arguments": arguments}, ensure_ascii=False)
        texts.append(f"<tool_call>\n{call_text}\n</tool_call>")
    return "\n".join(texts)


def _trains(turn: dict[str, Any]) -> bool:
    """Whether a turn is learnt: `train`, `training` or `loss` (booleans), `weight` or `loss_weight` (0: not learnt)."""
    for name in ("train", "training", "loss", "weight", "loss_weight"):
        value = turn.get(name)
        if value is None:
            continue
        if isinstance(value, str):
            value = {"true": True, "false": False, "1": True, "0": False}.get(value.strip().casefold(), value)
        if not isinstance(value, (bool, int, float)) or value not in (0, 1):
            raise SkipRow(f"{name} is {shorten(value, 20)}: only 0, 1, true and false can be used")
        return bool(value)
    return True


def _merge(into: Message, message: Message, changes: Counter[str]) -> None:
    changes[f"{message['role']} turns in a row merged"] += 1
    into["content"] += "\n" + message["content"]
    if "moves" in into or "moves" in message:
        into["moves"] = into.get("moves", []) + message.get("moves", [])
    if message["role"] == "assistant" and into["train"] != message["train"]:
        changes["merged turn not learnt: one part was marked so"] += 1
        into["train"] = False


def _check_tools(messages: list[Message]) -> None:
    previous = "none"
    for message in messages:
        role = message["role"]
        if role == "tool" and previous not in ("assistant", "tool"):
            raise SkipRow("a tool turn without a call before it")
        if role == "user" and previous == "tool":
            raise SkipRow("a tool turn without an assistant turn after it")
        previous = role


def _kind(value: object) -> str:
    names = {
        "NoneType": "null",
        "dict": "an object",
        "list": "a list",
        "str": "text",
        "int": "a number",
        "float": "a number",
    }
    return names.get(type(value).__name__, type(value).__name__)
