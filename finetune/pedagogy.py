"""How a model tutors: rule-based scores of its next turn in a real dialogue, beside those of the data's own tutors.

The scores are the rewards of finetune.rewards.tutoring: does the turn withhold the answer, ask rather than tell, take up the student's
error, ask one question, fit a student, tell nothing wrong.
"""

import json
from collections.abc import Sequence
from typing import Any

from data_formats import Example
from finetune.metrics import bootstrap
from finetune.rewards import TUTORING

FORMATS = ("mathdial", "bridge", "mrbench", "comta", "dialog_history")
"""Formats of data_formats that hold a tutor's dialogues about one problem each."""


def is_tutoring(examples: Sequence[Example]) -> bool:
    """Whether all examples are tutoring dialogues, to be scored as such rather than by an answer."""
    return all(example.meta.get("format") in FORMATS for example in examples)


def score(turns: Sequence[Example], texts: Sequence[str]) -> dict[str, list[float]]:
    """Each score, 0 to 1, of each text as the tutor's turn after the prompt of its example."""
    columns: dict[str, Any] = {
        "prompts": [turn.prompt for turn in turns], "completions": [[{"role": "assistant", "content": text}] for text in texts],
        "answer": [turn.answer for turn in turns], "solution": [turn.solution or "" for turn in turns],
        "meta": [json.dumps(turn.meta) for turn in turns],
    }
    return {name: reward(**columns) for name, reward in TUTORING.items()}


def summary(scores: dict[str, list[float]]) -> dict[str, dict[str, Any]]:
    """Mean and 95% bootstrap interval of each score."""
    return {name: {"mean": sum(values) / len(values), "interval": list(bootstrap(values))} for name, values in scores.items()}


def references(turn: Example) -> dict[str, str]:
    """What tutors of the data said at this place: the dialogue's own, or MRBench's several (people and models) by their names."""
    own = {"reference": turn.completion} if turn.completion is not None else {}
    return own | {entry["tutor"]: entry["response"] for entry in turn.meta.get("responses", [])}


def reference_summaries(turns: Sequence[Example]) -> dict[str, dict[str, Any]]:
    """The scores of each of the data's own tutors, over the turns that it took."""
    said = [references(turn) for turn in turns]
    found = {}
    for tutor in dict.fromkeys(name for at_place in said for name in at_place):
        taken = [(turn, at_place[tutor]) for turn, at_place in zip(turns, said, strict=True) if tutor in at_place]
        scores = score([turn for turn, _ in taken], [text for _, text in taken])
        found[tutor] = {"turns": len(taken), "scores": summary(scores)}
    return found
