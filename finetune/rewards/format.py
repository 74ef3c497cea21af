"""Rewards for the form of a completion."""

from typing import Any


def boxed(completions: list[list[dict[str, str]]], **columns: Any) -> list[float]:
    r"""1.0 where the completion has exactly one \boxed{...}, else 0.0: the form the prompts ask for.

    >>> boxed([[{"role": "assistant", "content": "It is \\boxed{4}."}], [{"role": "assistant", "content": "It is 4."}]])
    [1.0, 0.0]
    """
    return [float(completion[-1]["content"].count("\\boxed{") == 1) for completion in completions]
