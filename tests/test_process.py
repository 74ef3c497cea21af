"""Steps of a completion, their verdicts and their advantages."""

import doctest
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from finetune import process
from finetune.errors import UserError


@pytest.fixture(scope="module")
def tokenizer(tiny_model: Path) -> PreTrainedTokenizerBase:
    return AutoTokenizer.from_pretrained(tiny_model)


def test_doctests() -> None:
    assert doctest.testmod(process) == (0, doctest.testmod(process).attempted)


def test_steps_are_lines_and_cover_every_token(tokenizer: PreTrainedTokenizerBase) -> None:
    text = "15 - 43 = -28\n\n-28 - 75 = -103\nThe answer is \\boxed{-103}."
    ids = tokenizer(text, add_special_tokens=False)["input_ids"] + [tokenizer.eos_token_id]
    steps = process.split(tokenizer, ids)
    assert [step.text for step in steps] == ["15 - 43 = -28", "-28 - 75 = -103", "The answer is \\boxed{-103}."]
    assert steps[-1].end == len(ids) - 1
    start = 0
    for step in steps:
        assert tokenizer.decode(ids[start : step.end + 1], skip_special_tokens=True).strip() == step.text
        start = step.end + 1


def test_a_completion_without_a_line_break_or_without_text_is_one_step(tokenizer: PreTrainedTokenizerBase) -> None:
    ids = tokenizer("4 + 4 = 8", add_special_tokens=False)["input_ids"]
    assert process.split(tokenizer, ids) == [process.Step("4 + 4 = 8", len(ids) - 1)]
    assert process.split(tokenizer, [tokenizer.eos_token_id]) == [process.Step("", 0)]
    assert process.split(tokenizer, tokenizer("\n\n", add_special_tokens=False)["input_ids"])[0].text == ""


def test_outcome_is_earned_by_the_last_step_and_steps_without_a_verdict_by_nothing() -> None:
    steps = [[process.Step("1 + 1 = 2", 4), process.Step("so", 6), process.Step("2 + 2 = 5", 12)]]
    values, ends = process.verify(process.arithmetic, steps, [0.25], {})
    assert values == [[1.0, 0.0, 0.25]] and ends == [[4, 12, 12]]


def too_few(steps: list[list[str]], **columns: Any) -> list[list[float]]:
    return [[1.0] for _ in steps]


def not_a_number(steps: list[list[str]], **columns: Any) -> list[list[float]]:
    return [[float("nan")] * len(texts) for texts in steps]


def no_lists(steps: list[list[str]], **columns: Any) -> list[list[float]]:
    return []


@pytest.mark.parametrize("verifier, said", [(too_few, "1 rewards for the 2 steps"), (not_a_number, "finite"), (no_lists, "0 lists for 1")])
def test_a_verifier_that_fails_is_named_with_the_steps(verifier: process.Verifier, said: str) -> None:
    steps = [[process.Step("a", 1), process.Step("b", 2)]]
    with pytest.raises(UserError, match="grpo.process") as caught:
        process.verify(verifier, steps, [1.0], {})
    assert said in str(caught.value)


def test_unknown_verifier_names_the_key() -> None:
    with pytest.raises(UserError, match="grpo.process: 'nothing'"):
        process.find("nothing")


def test_groups_are_normalised_apart() -> None:
    found = process.advantages([[1.0], [0.0], [5.0], [3.0]], [[1], [1], [0], [1]], group_size=2, length=2)
    one = 0.5 / (torch.tensor([1.0, 0.0]).std() + 1e-4)
    two = 1.0 / (torch.tensor([5.0, 3.0]).std() + 1e-4)
    torch.testing.assert_close(found, torch.stack([one.repeat(2), -one.repeat(2), torch.stack([two, two * 0]), -two.repeat(2)]))
