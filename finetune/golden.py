"""The golden check before GRPO: the rewards must know a gold answer from an empty, a wrong and an evasive one."""

import logging
import re
from collections.abc import Callable
from decimal import Decimal
from typing import TYPE_CHECKING, Any

from finetune import answers
from finetune.config import GrpoConfig
from finetune.diagnosis import evenly, score
from finetune.errors import UserError
from finetune.rewards import REWARDS
from finetune.rewards.math import correct

if TYPE_CHECKING:
    from datasets import Dataset

log = logging.getLogger("finetune")

CHECKED_ROWS = 64
"""Rows on which the weighted rewards are compared; that the gold answer is right is checked on every row."""
LISTED = 10
"""Rows named in a message; the log file names all."""
EVASIVE = "I am not sure. It depends on how one looks at it, so I would rather not say."


def golden_check(dataset: "Dataset", rewards: list[Callable[..., list[float]]], settings: GrpoConfig) -> "Dataset":
    """The rows whose gold answer earns 1.0 from `correct`; grpo.bad_gold says whether others end the run or are left out.

    Then, on some rows, the weighted sum of all rewards must be higher for the gold answer than for an empty, a wrong and an
    evasive one. Raises UserError, with the rows, where it is not. Without the reward `correct` there is nothing to be right
    about: rewards of the user's own are compared all the same, and a failure is a warning.
    """
    judged = "correct" in settings.rewards
    if judged:
        dataset = with_right_golds(dataset, settings)
    elif all(name in REWARDS for name in settings.rewards):
        log.info("golden check: none of grpo.rewards judges the answer")
        return dataset
    rows = [row for row in evenly(dataset, CHECKED_ROWS) if row["answer"] is not None]
    if not rows:
        return dataset
    weights = settings.rewards.values()

    def total(texts: list[str]) -> list[float]:
        earned = score(rewards, rows, texts)
        return [sum(weight * value for weight, value in zip(weights, values, strict=True)) for values in earned]

    gold = total([boxed(row["answer"]) for row in rows])
    bad = {
        "an empty answer": total(["" for _ in rows]),
        "a wrong answer": total([boxed(wrong_answer(row["answer"], row["answer_type"])) for row in rows]),
        "an evasive answer": total([EVASIVE for _ in rows]),
    }
    faults = [
        f"{row['id']}: {what} earns {totals[index]:g}, the gold answer {row['answer']!r} {gold[index]:g}"
        for what, totals in bad.items() for index, row in enumerate(rows) if totals[index] >= gold[index]
    ]
    if faults and judged:
        raise UserError(f"grpo.rewards pay for bad answers. {listed(faults)}. Change the weights or the functions.")
    if faults:
        log.warning("golden check: grpo.rewards pay no less for bad answers than for gold ones on %d of %d tries", len(faults), 3 * len(rows))
    else:
        log.info("golden check: empty, wrong and evasive answers earn less than the gold one on each of %d rows", len(rows))
    return dataset


def with_right_golds(dataset: "Dataset", settings: GrpoConfig) -> "Dataset":
    """The rows whose gold answer can be parsed and is right when it is given as the answer."""
    golds, kinds = dataset["answer"], dataset["answer_type"]
    verdicts = correct([[{"role": "assistant", "content": boxed(gold)}] for gold in golds], answer=golds, answer_type=kinds)
    faults = [
        f"{name}: {gold!r} {'is not judged right' if answers.parseable(gold) else 'cannot be parsed'}"
        for name, gold, verdict in zip(dataset["id"], golds, verdicts, strict=True) if verdict != 1.0
    ]
    if not faults:
        log.info("golden check: each of %d gold answers earns 1.0 from correct", len(golds))
        return dataset
    if settings.bad_gold == "error" or len(faults) == len(golds):
        raise UserError(
            f"{len(faults)} of {len(golds)} gold answers do not earn 1.0 when they are given as the answer. {listed(faults)}. "
            "Mend or remove these rows, or leave them out with grpo.bad_gold=drop."
        )
    log.warning("golden check: %d of %d rows left out, their gold answers do not earn 1.0. %s", len(faults), len(golds), listed(faults))
    return dataset.select([index for index, verdict in enumerate(verdicts) if verdict == 1.0])


def boxed(answer: Any) -> str:
    """A completion that gives this answer."""
    return f"The answer is \\boxed{{{answer}}}."


def wrong_answer(gold: str, kind: str) -> str:
    """An answer of the same kind that is not the gold one.

    >>> wrong_answer("1,200", "number"), wrong_answer("B", "choice"), wrong_answer("x^2", "latex"), wrong_answer("True", "bool")
    ('1201', 'C', 'x^2+1', 'False')
    """
    if re.fullmatch(r"-?\$?\d[\d,]*(\.\d+)?", gold):
        return str(Decimal(gold.replace(",", "").replace("$", "")) + 1)
    if kind == "choice":
        return "C" if gold.strip(" ()") == "B" else "B"
    if kind == "bool":
        return "False" if gold.strip().casefold() in ("true", "yes", "1") else "True"
    return f"{gold}+1" if kind != "text" else f"not {gold}"


def listed(faults: list[str]) -> str:
    """The first of the faults and how many more; all of them go to the log file."""
    log.debug("golden check:\n%s", "\n".join(faults))
    more = f"; and {len(faults) - LISTED} more in finetune.log" if len(faults) > LISTED else ""
    return "; ".join(faults[:LISTED]) + more
