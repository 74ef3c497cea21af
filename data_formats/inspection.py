"""Inspection: what was read, kept, changed and set aside, with reasons and row numbers."""

from __future__ import annotations

import hashlib
from collections import Counter
from dataclasses import dataclass, field

from .example import Example, normalise

SHOWN = 100  # row numbers kept for each kind; the count goes on


@dataclass
class Tally:
    """How many rows something happened to, and the numbers of the first hundred ("name:7" when there are several files)."""

    count: int = 0
    rows: list[int | str] = field(default_factory=list)

    def add(self, row: int | str) -> None:
        """Count one row."""
        self.count += 1
        if len(self.rows) < SHOWN:
            self.rows.append(row)


@dataclass
class Inspection:
    """Counts of one reading. read = kept + skipped; a row is what becomes one example (a dialogue, a path of a message
    tree).

    changes: kind of change -> rows. skips: reason -> rows. `changed` is the number of rows with at least one change.
    answers: answer type -> examples ("none" for those without). roles: role -> turns. trained_turns: assistant turns
        with loss.
    prompt_only: examples without an assistant turn at the end. duplicates: examples whose question was seen before;
    conflicts: those of them with another answer. The last two, like all that counts examples, are filled by `inspect`,
    which remembers a hash of each question (about 150 bytes an example); nothing else grows with the file.
    """

    path: str
    format: str = ""
    why: str = ""
    container: str = ""
    notes: list[str] = field(default_factory=list)
    read: int = 0
    kept: int = 0
    changed: int = 0
    changes: dict[str, Tally] = field(default_factory=dict)
    skips: dict[str, Tally] = field(default_factory=dict)
    answers: Counter[str] = field(default_factory=Counter)
    roles: Counter[str] = field(default_factory=Counter)
    characters: Counter[str] = field(default_factory=Counter)
    trained_turns: int = 0
    prompt_only: int = 0
    duplicates: int = 0
    conflicts: Tally = field(default_factory=Tally)
    _seen: dict[int, int] = field(default_factory=dict, repr=False)

    @property
    def skipped(self) -> int:
        """Rows set aside, for whatever reason."""
        return sum(tally.count for tally in self.skips.values())

    def skip(self, row: int | str, reason: str) -> None:
        """Count a row that was read and set aside."""
        self.read += 1
        self.skips.setdefault(reason, Tally()).add(row)

    def keep(self, row: int | str, changes: Counter[str]) -> None:
        """Count a row that gave an example, and what was changed in it."""
        self.read += 1
        self.kept += 1
        self.changed += bool(changes)
        for kind in changes:
            self.changes.setdefault(kind, Tally()).add(row)

    def add_example(self, example: Example) -> None:
        """Count what an example holds."""
        self.answers[example.answer_type or "none"] += 1
        for message in example.messages:
            role = message["role"]
            self.roles[role] += 1
            self.characters[role] += len(message["content"])
            self.trained_turns += role == "assistant" and message["train"]
        self.prompt_only += example.messages[-1]["role"] != "assistant"
        key, answer = int(example.key, 16), _hash(example.answer)
        if key not in self._seen:
            self._seen[key] = answer
            return
        self.duplicates += 1
        if self._seen[key] != answer:
            self.conflicts.add(example.id)

    def reasons(self) -> str:
        """The reasons for setting rows aside on one line, most frequent first, each with its first rows."""
        parts = []
        for reason, tally in sorted(self.skips.items(), key=lambda item: -item[1].count)[:5]:
            shown = ", ".join(str(row) for row in tally.rows[:5]) + (", …" if tally.count > 5 else "")
            parts.append(f"{reason} ({tally.count}: {shown})")
        return "; ".join(parts) + ("; …" if len(self.skips) > 5 else "")

    def __str__(self) -> str:
        lines = [
            self.path,
            f"format     {self.format}: {self.why}",
            f"container  {self.container}",
            *(f"note       {note}" for note in self.notes),
            f"rows       read {self.read}, kept {self.kept}, changed {self.changed}, skipped {self.skipped}",
        ]
        for title, tallies in (("changed", self.changes), ("skipped", self.skips)):
            for kind, tally in sorted(tallies.items(), key=lambda item: -item[1].count):
                shown = ", ".join(str(row) for row in tally.rows[:8]) + (", …" if tally.count > 8 else "")
                lines.append(f"  {title:<8} {tally.count:>7}  {kind} (rows {shown})")
        lines.append("turns      " + ", ".join(f"{role} {count}" for role, count in self.roles.items()))
        lines.append(
            f"           {self.trained_turns} assistant turns learnt, {self.prompt_only} examples without one at the end"
        )
        lines.append("answers    " + ", ".join(f"{kind} {count}" for kind, count in self.answers.most_common()))
        lines.append(f"questions  {self.duplicates} repeated, {self.conflicts.count} of them with another answer")
        return "\n".join(lines)


def _hash(answer: str | None) -> int:
    if answer is None:
        return 0
    return int.from_bytes(
        hashlib.blake2b(normalise(answer).encode("utf-8", "surrogatepass"), digest_size=8).digest(), "big"
    )
