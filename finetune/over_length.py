"""What to do with a chat that is longer than `sft.max_length` tokens, so that no answer ever loses its end."""

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Messages = list[dict[str, Any]]
Encode = Callable[[Messages, list[bool]], dict[str, list[int]]]
"""input_ids and labels of messages; the flags say which assistant turns are trained."""


def truncate_prompt(
    messages: Messages, train: list[bool], max_length: int, encode: Encode, tokenizer: "PreTrainedTokenizerBase"
) -> list[dict[str, list[int]]]:
    """The chat with the start of its first user turn cut off, as one row of at most max_length tokens; none if that is not enough."""
    first = next((index for index, message in enumerate(messages) if message["role"] == "user"), None)
    if first is None:
        return []
    ids = tokenizer(messages[first]["content"], add_special_tokens=False)["input_ids"]
    row = encode(messages, train)
    while (excess := len(row["input_ids"]) - max_length) > 0:
        ids = ids[excess:]
        if not ids:
            return []
        shorter = messages[first] | {"content": tokenizer.decode(ids, clean_up_tokenization_spaces=False)}
        row = encode([*messages[:first], shorter, *messages[first + 1 :]], train)
    return [row]


def split_turns(messages: Messages, train: list[bool], max_length: int, encode: Encode) -> tuple[list[dict[str, list[int]]], int]:
    """The dialogue as several rows of at most max_length tokens, and the number of trained turns that do not fit even alone.

    Every trained assistant turn is trained in exactly one row. A row begins with the system message and a user turn, and repeats
    as many of the turns before its first trained one as half of max_length holds, as context without loss.
    """
    system = 1 if messages[0]["role"] == "system" else 0
    starts = [index for index, message in enumerate(messages) if index >= system and message["role"] == "user"] or [system]
    turns = [index for index, message in enumerate(messages) if message["role"] == "assistant"]

    def row(start: int, trained: list[int]) -> dict[str, list[int]]:
        """Messages start .. last trained turn, with loss on the trained ones."""
        kept = [*range(system), *range(start, trained[-1] + 1)]
        return encode([messages[index] for index in kept], [index in trained for index in kept if messages[index]["role"] == "assistant"])

    def length(start: int, trained: list[int]) -> int:
        return len(row(start, trained)["input_ids"])

    rows: list[dict[str, list[int]]] = []
    too_long = 0
    start, waiting = starts[0], list[int]()
    for turn in (index for index, trained in zip(turns, train, strict=True) if trained):
        if length(start, [*waiting, turn]) <= max_length:
            waiting.append(turn)
            continue
        if waiting:
            rows.append(row(start, waiting))
        before = [index for index in starts if index < turn] or [system]
        fitting = [index for index in before if length(index, [turn]) <= max_length]
        with_context = [index for index in fitting if length(index, [turn]) <= max_length // 2]
        if not fitting:
            too_long += 1
            start, waiting = next((index for index in starts if index > turn), starts[-1]), []
        else:
            start, waiting = (with_context or fitting[-1:])[0], [turn]
    if waiting:
        rows.append(row(start, waiting))
    return rows, too_long
