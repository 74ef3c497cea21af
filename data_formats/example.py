"""Example: the one shape every format is read into."""

from __future__ import annotations

import hashlib
import re
import unicodedata
from dataclasses import dataclass, field
from typing import Any

Message = dict[str, Any]

ANSWER_TYPES = ("number", "latex", "choice", "text", "bool", "list")


@dataclass(slots=True)
class Example:
    """One conversation or problem.

    messages: {"role", "content"} with roles system | user | assistant | tool. At most one system turn, first; then user
        first and strict alternation (an assistant turn that calls a tool is followed by its tool turns and another
        assistant turn); nothing empty. Assistant turns carry "train": bool (False: no loss on it). A prompt-only
        example (evaluation sets, verl, CoMTA) ends with the user's turn; every other one ends with the assistant's.
        The format `text` alone gives one assistant turn and no prompt: meta["language_modelling"] is True there.
    answer: the gold answer, always a string, or None.
    answer_type: number | latex | choice | text | bool | list, or None when there is no answer.
    solution: the worked solution as text, without calculator marks, or None.
    id: the row's own id where it has one, else "<file stem>:<row>".
    meta: what else is known, JSON-friendly: source, format, row, and by format question, original_question, moves (one
        list of teacher moves for each assistant turn), error, strategy, intention, rejected, tools (a JSON string), ...
    """

    messages: list[Message]
    answer: str | None = None
    answer_type: str | None = None
    solution: str | None = None
    id: str = ""
    meta: dict[str, Any] = field(default_factory=dict)

    @property
    def prompt(self) -> list[Message]:
        """The messages before the last assistant turn (all of them when the example is prompt-only)."""
        end = len(self.messages)
        if self.messages and self.messages[-1]["role"] == "assistant":
            end -= 1
        return self.messages[:end]

    @property
    def completion(self) -> str | None:
        """The last assistant turn's text, or None for a prompt-only example."""
        if self.messages and self.messages[-1]["role"] == "assistant":
            return self.messages[-1]["content"]
        return None

    @property
    def question(self) -> str:
        """What the example is about: meta["question"] where the format names it, else the user's first words.

        A greeting alone ("Hi!") says nothing about the problem, so user turns are added until there are more than three
        words.
        """
        named = self.meta.get("question")
        if named:
            return named
        words = ""
        for message in self.messages:
            if message["role"] == "user":
                words = f"{words}\n{message['content']}" if words else message["content"]
                if len(words.split(None, 3)) > 3:
                    break
        return words or self.completion or ""

    @property
    def questions(self) -> list[str]:
        """Every text to check against evaluation sets: the question and the one it was rewritten from."""
        original = self.meta.get("original_question")
        return [self.question, original] if original and original != self.question else [self.question]

    @property
    def key(self) -> str:
        """16 hex digits of the normalised question, equal whatever its case, spacing or punctuation."""
        return question_key(self.question)


def normalise(text: str) -> str:
    """`text` with case, spacing and Unicode form folded and idle punctuation dropped, single-spaced.

    Operators, signs and decimal points stay: 3+4 and 3-4, or 3.5 and 35, are different problems.
    """
    folded = text.casefold() if text.isascii() else unicodedata.normalize("NFKC", text).casefold().translate(_SAME_SIGN)
    return " ".join(_IDLE.sub(" ", folded).split())


def question_key(text: str) -> str:
    """blake2b-64 of the normalised text, as 16 hex digits."""
    return hashlib.blake2b(normalise(text).encode("utf-8", "surrogatepass"), digest_size=8).hexdigest()


# Punctuation that never changes what a problem asks; a dot or comma between digits (3.5) is kept.
_IDLE = re.compile(r"[\u200b\ufeff?!;:\"'“”‘’`_]+|\.(?!\d)|,(?:(?!\d)|(?<!\d,))")
_SAME_SIGN = {0x2212: "-", 0x2013: "-", 0x2014: "-"}
