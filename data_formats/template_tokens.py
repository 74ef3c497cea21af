"""Chat-template tokens inside content: found, and escaped or refused, so that text is never trained on as structure.

The tokens are the tokenizer's own special-token strings ("<|im_end|>", "<s>") and, for templates that write speakers as
plain text (DeepSeek's "User: ", "Assistant: "), its role markers, which only mean something at the start of a line.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable

from .errors import DataFormatError, shorten
from .example import Message

ACTIONS = ("escape", "refuse")


class TemplateTokens:
    """The tokens and role markers of one chat template.

    special_tokens: strings the tokenizer turns into single control tokens, matched anywhere, letter by letter.
    role_markers: words such as "User:" matched at the start of a line, after blanks.
    """

    def __init__(self, special_tokens: Iterable[str], role_markers: Iterable[str] = ()) -> None:
        tokens = sorted({token for token in special_tokens if token.strip()}, key=lambda token: (-len(token), token))
        markers = sorted(
            {marker.strip() for marker in role_markers if marker.strip()}, key=lambda word: (-len(word), word)
        )
        parts = [re.escape(token) for token in tokens]
        if markers:
            parts.append(rf"(?:(?<=\n)|(?<=\r)|\A)[ \t]*(?:{'|'.join(map(re.escape, markers))})")
        self._pattern = re.compile("|".join(parts)) if parts else None

    def find(self, text: str) -> Counter[str]:
        """Each token or marker that stands in `text`, with how often."""
        return Counter(found.strip() for found in self._pattern.findall(text)) if self._pattern else Counter()

    def escape(self, text: str) -> tuple[str, Counter[str]]:
        """(text, what was found): a blank is put after a token's first character, and before a marker's colon.

        `<|im_end|>` becomes `< |im_end|>` and `User:` becomes `User :`, which read the same and are no structure.
        """
        found = self.find(text)
        while self._pattern is not None and self._pattern.search(text):
            text = self._pattern.sub(_broken, text)
        return text, found

    def guard(self, messages: list[Message], action: str = "escape") -> tuple[list[Message], Counter[str]]:
        """(messages, what was found), escaped; `refuse` raises DataFormatError when anything is found."""
        if action not in ACTIONS:
            raise ValueError(f"action is {action!r}: it must be one of {', '.join(ACTIONS)}")
        total: Counter[str] = Counter()
        guarded = []
        for message in messages:
            content, found = self.escape(message["content"])
            if found and action == "refuse":
                names = ", ".join(shorten(name, 40) for name in found)
                raise DataFormatError(
                    f"a {message['role']} turn holds {names}, which the chat template uses",
                    "Remove it, or let it be escaped",
                )
            total += found
            guarded.append({**message, "content": content} if found else message)
        return guarded, total


def _broken(match: re.Match[str]) -> str:
    text = match.group()
    stripped = text.rstrip()
    if stripped.endswith(":") and stripped != ":":
        return f"{stripped[:-1]} :{text[len(stripped) :]}"
    return f"{text[:1]} {text[1:]}"
