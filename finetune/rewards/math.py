"""Rewards for problems with a gold answer."""

from typing import Any

from finetune import answers


def correct(
    completions: list[list[dict[str, str]]], answer: list[str], answer_type: list[str] | None = None, **columns: Any
) -> list[float]:
    """1.0 where the completion's final answer equals the gold one, else 0.0 (answers.verify: bounded in time, in worker processes).

    >>> correct([[{"role": "assistant", "content": "So it is \\\\boxed{4}."}]], answer=["4"])
    [1.0]
    >>> correct([[{"role": "assistant", "content": "I do not know."}]], answer=["4"])
    [0.0]
    """
    pairs = [(gold, answers.extract(completion[-1]["content"])) for gold, completion in zip(answer, completions, strict=True)]
    kinds = [kind or None for kind in answer_type] if answer_type is not None else None
    return [float(verdict) for verdict in answers.verify(pairs, answer_types=kinds)]
