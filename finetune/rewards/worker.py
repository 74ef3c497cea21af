"""`python -m finetune.rewards.worker NAME`: runs one reward function for the process that started it (see guard.py).

JSON lines. First `{"problem": null}`, or what is wrong with NAME; then for each line of keyword arguments either
`{"rewards": [...]}` or `{"problem": "what the function did", "sample": its index or null}`.
"""

import ctypes
import json
import math
import os
import signal
import sys
import traceback
from collections.abc import Callable
from typing import Any

from finetune.errors import UserError
from finetune.rewards import find

_PR_SET_PDEATHSIG = 1


class BadReward(Exception):
    """The function returned what is not a reward."""

    def __init__(self, problem: str, sample: int | None = None) -> None:
        super().__init__(problem)
        self.sample = sample


def main() -> None:
    if sys.platform == "linux":  # a function that hangs must not outlive the training
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    replies = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what the function prints must not be taken for a reply

    def reply(**fields: Any) -> None:
        replies.write(json.dumps(fields) + "\n")
        replies.flush()

    try:
        function = find(sys.argv[1])
    except UserError as error:
        return reply(problem=str(error))
    reply(problem=None)
    for line in sys.stdin:
        columns = json.loads(line)
        try:
            reply(rewards=scores(function, columns))
        except BadReward as bad:
            reply(problem=str(bad), sample=bad.sample)


def scores(function: Callable[..., Any], columns: dict[str, list[Any]]) -> list[float]:
    """The function's rewards for a batch, each a finite number. Raises BadReward, with the sample where it is known."""
    try:
        returned = function(**columns)
    except Exception as error:  # whatever a user's function raises is passed on in words, never hidden
        last = traceback.extract_tb(error.__traceback__)[-1]
        raise BadReward(f"raised {type(error).__name__}: {error} ({last.filename}, line {last.lineno})") from error
    expected = len(columns["completions"])
    try:
        rewards = list(returned)
    except TypeError:
        raise BadReward(f"returned {type(returned).__name__}, expected a list with one number for each completion") from None
    if len(rewards) != expected:
        raise BadReward(f"returned {len(rewards)} rewards for {expected} completions, expected one for each")
    checked = []
    for index, reward in enumerate(rewards):
        try:
            number = float(reward)
        except (TypeError, ValueError):
            raise BadReward(f"returned {reward!r}, expected a number", index) from None
        if not math.isfinite(number):
            raise BadReward(f"returned {number}, expected a finite number", index)
        checked.append(number)
    return checked


if __name__ == "__main__":
    main()
