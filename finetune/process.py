r"""Process supervision (DeepSeekMath, section 4.1.3): a reward for each step of a completion, advantages for each token.

A step is a line. Its reward comes from `arithmetic` below or from a function of yours, named in the configuration by its dotted
path (`grpo.process=my_package.my_module.my_verifier`) and called as

    my_verifier(prompts=..., completions=..., steps=..., **columns) -> list[list[float | None]]

with one entry a completion in each list; `steps[i]` are the texts of completion i's steps, and the columns are the data's (answer,
solution, meta, ...). It returns a number for each step, or None where it has no verdict; a reward model is called in there. The
last step also earns the completion's outcome reward (grpo.rewards), as it states the answer.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from finetune import rewards
from finetune.errors import UserError
from finetune.rewards.arithmetic import equations

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Verifier = Callable[..., Any]


@dataclass
class Step:
    """A line of a completion."""

    text: str
    end: int
    """Index of its last token in the completion."""


def arithmetic(steps: list[list[str]], **columns: Any) -> list[list[float | None]]:
    """1.0 for a step whose equations all hold, 0.0 where one does not, None for a step without an equation.

    >>> arithmetic([["12 + 3 = 15", "15 - 4 = 12", "The answer is 12."]])
    [[1.0, 0.0, None]]
    """
    return [[_verdict(text) for text in texts] for texts in steps]


def _verdict(text: str) -> float | None:
    found = equations(text)
    return float(all(equation.holds for equation in found)) if found else None


def find(name: str) -> Verifier:
    """The verifier that `grpo.process` names. Raises UserError when there is none."""
    return arithmetic if name == "arithmetic" else rewards.find(name, key="grpo.process")


def split(tokenizer: "PreTrainedTokenizerBase", ids: list[int]) -> list[Step]:
    """The steps of a completion: its lines that are not blank, each with its last token. Trailing blank lines and EOS belong to
    the last step. A token that ends one line and begins the next belongs to the line that it ends."""
    steps: list[Step] = []
    text_so_far = 0
    for index, token in enumerate(ids):
        last = index == len(ids) - 1
        if not last and "\n" not in tokenizer.decode([token]):
            continue
        text = tokenizer.decode(ids[: index + 1], skip_special_tokens=True)
        upto = len(text) if last else text.rfind("\n") + 1
        line = text[text_so_far:upto].strip()
        text_so_far = max(text_so_far, upto)
        if line or not steps:
            steps.append(Step(line, index))
        else:
            steps[-1].end = index
    return steps


def verify(
    verifier: Verifier, steps: list[list[Step]], outcomes: list[float], columns: dict[str, list[Any]]
) -> tuple[list[list[float]], list[list[int]]]:
    """(rewards, last tokens) of each completion's judged steps, the outcome last. Raises UserError on a wrong count or value."""
    texts = [[step.text for step in own] for own in steps]
    judged = verifier(steps=texts, **columns)
    if len(judged) != len(steps):
        raise UserError(f"grpo.process: returned {len(judged)} lists for {len(steps)} completions. Return a list for each.")
    values, ends = [], []
    for index, (own, given, outcome) in enumerate(zip(steps, judged, outcomes, strict=True)):
        if len(given) != len(own):
            raise UserError(
                f"grpo.process: returned {len(given)} rewards for the {len(own)} steps of completion {index}: {texts[index]!r}. "
                "Return a number or None for each step."
            )
        kept = [(float(reward), step.end) for reward, step in zip(given, own, strict=True) if reward is not None]
        kept.append((outcome, own[-1].end))
        if not all(reward == reward and abs(reward) != float("inf") for reward, _ in kept):
            raise UserError(f"grpo.process: returned {given} for the steps {texts[index]!r}. Return finite numbers, or None.")
        values.append([reward for reward, _ in kept])
        ends.append([end for _, end in kept])
    return values, ends


def advantages(rewards: list[list[float]], ends: list[list[int]], group_size: int, length: int, scale: bool = True) -> torch.Tensor:
    """Advantages of each token, (completions, length): A_it = sum of the normalised rewards of the steps that end at or after t.

    The rewards R of all steps of a group's completions become (r - mean R) / std R (without the division where `scale` is
    False), with TRL's convention for the standard deviation: unbiased, plus 1e-4.

    >>> advantages([[1.0, 1.0], [0.0, 0.0]], [[1, 2], [0, 2]], group_size=2, length=4, scale=False)
    tensor([[ 1.0000,  1.0000,  0.5000,  0.0000],
            [-1.0000, -0.5000, -0.5000,  0.0000]])
    """
    result = torch.zeros(len(rewards), length)
    for start in range(0, len(rewards), group_size):
        rows = range(start, start + group_size)
        pool = torch.tensor([reward for row in rows for reward in rewards[row]])
        divisor = float(pool.std()) + 1e-4 if scale else 1.0
        for row in rows:
            for reward, end in zip(rewards[row], ends[row], strict=True):
                result[row, : end + 1] += (reward - float(pool.mean())) / divisor
    return result
