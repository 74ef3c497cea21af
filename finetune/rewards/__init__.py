"""Reward functions for GRPO: plain functions, one number a completion.

A reward is called as TRL calls it, `reward(prompts=..., completions=..., completion_ids=..., answer=..., **columns)`: each
argument is a list with one entry a completion; `completions[i]` is a list of messages, and every column of the data is there
(answer, answer_type, solution, id, meta as JSON). It returns a list of finite numbers of the same length.

Your own is named in the configuration by its dotted path, `grpo.rewards={correct: 1.0, my_package.my_module.my_reward: 0.5}`, and
runs in a process of its own under a time limit (`guard.py`):

    def my_reward(completions, answer, **columns):
        return [float(gold in completion[-1]["content"]) for completion, gold in zip(completions, answer)]

The numbers are multiplied by the weights and summed; each reward is logged on its own as rewards/NAME/mean and /std.
"""

import importlib
from collections.abc import Callable

from finetune.errors import UserError
from finetune.rewards.format import boxed
from finetune.rewards.math import correct
from finetune.rewards.tutoring import (
    addresses_error,
    asks,
    fits_student,
    one_question,
    tells_correctly,
    withholds_answer,
)

TUTORING: dict[str, Callable[..., list[float]]] = {
    "withholds_answer": withholds_answer,
    "asks": asks,
    "addresses_error": addresses_error,
    "one_question": one_question,
    "fits_student": fits_student,
    "tells_correctly": tells_correctly,
}
"""Rewards for a tutor's turn; they need no gold answer."""

REWARDS: dict[str, Callable[..., list[float]]] = {"correct": correct, "boxed": boxed, **TUTORING}
"""Every reward of the package by its name in the configuration."""


def find(name: str, key: str = "grpo.rewards") -> Callable[..., list[float]]:
    """A reward by its name in REWARDS or its dotted path `package.module.function`. Raises UserError, which names
    the configuration's `key`, when there is none."""
    if name in REWARDS:
        return REWARDS[name]
    module, _, function = name.rpartition(".")
    if not module:
        raise UserError(f"{key}: '{name}' is unknown. Expected one of {', '.join(REWARDS)}, or package.module.function.")
    try:
        found = vars(importlib.import_module(module))[function]
    except ModuleNotFoundError as error:
        raise UserError(f"{key}: '{name}': {error}. Put the module on PYTHONPATH.") from error
    except KeyError:
        raise UserError(f"{key}: '{name}': module {module} has no function '{function}'.") from None
    return found
