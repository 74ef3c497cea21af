"""Rewards for problems with a gold answer."""

from typing import Any

from finetune import answers


def correct(completions: list[list[dict[str, str]]], answer: list[str], **columns: Any) -> list[float]:
    """1.0 where the completion's final answer equals the gold one, else 0.0.

    >>> correct([[{"role": "assistant", "content": "So it is \\\\boxed{4}."}]], answer=["4"])
    [1.0]
    >>> correct([[{"role": "assistant", "content": "I do not know."}]], answer=["4"])
    [0.0]
    """
    predicted = [answers.extract(completion[-1]["content"]) for completion in completions]
    return [float(text is not None and answers.equal(gold, text)) for gold, text in zip(answer, predicted, strict=True)]
