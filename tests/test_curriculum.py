"""Which prompts GRPO sees and when."""

import doctest
from collections import Counter
from pathlib import Path

import pytest
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer

from finetune import curriculum
from finetune.config import GrpoConfig
from finetune.errors import UserError
from finetune.run import Run


def test_doctests() -> None:
    assert doctest.testmod(curriculum) == (0, doctest.testmod(curriculum).attempted)


def test_every_prompt_comes_once_a_pass() -> None:
    order = curriculum.prompt_order(10, 4, 5, seed=1)
    assert Counter(order) == {index: 2 for index in range(10)} and order[:10] != order[10:]
    assert order == curriculum.prompt_order(10, 4, 5, seed=1) != curriculum.prompt_order(10, 4, 5, seed=2)


def test_later_iterations_replay_a_share_of_the_earlier_prompts() -> None:
    order = curriculum.prompt_order(1000, 10, 20, seed=1, iterations=2, replay=0.1)
    assert len(order) == 200 and len(set(order[:100])) == 100
    replayed = [index for index in order[100:] if index in set(order[:100])]
    assert len(replayed) == 10
    assert curriculum.prompt_order(1000, 10, 20, seed=1, iterations=2)[100:] != order[100:]


def test_easy_prompts_first() -> None:
    rates = [0.1, 0.9, 0.5, 0.9]
    order = curriculum.prompt_order(4, 2, 4, seed=1, rates=rates)
    for start in (0, 4):
        assert [rates[index] for index in order[start : start + 4]] == [0.9, 0.9, 0.5, 0.1]


def test_prompts_outside_the_pass_rates_are_left_out_or_the_run_ends() -> None:
    settings = GrpoConfig(pass_samples=4, min_pass_rate=0.2, max_pass_rate=0.8, group_size=4, batch_size=8, micro_batch_size=8)
    assert curriculum.fitting([0.0, 0.2, 0.5, 1.0, 0.8], settings) == [1, 2, 4]
    with pytest.raises(UserError, match="keep 1 of 3"):
        curriculum.fitting([0.0, 0.5, 1.0], settings)


@pytest.mark.parametrize("wrong", [{"pass_samples": 4}, {"easy_first": True}, {"replay": 0.1}, {"min_pass_rate": 2.0},
                                   {"overlong_buffer": 512}, {"dynamic_sampling": -1}])
def test_settings_that_contradict_each_other_are_refused(wrong: dict) -> None:
    with pytest.raises(UserError, match=f"grpo.{next(iter(wrong))}"):
        GrpoConfig(**wrong)


def test_pass_rates_are_measured_once_and_kept(tiny_model: Path, tmp_path: Path) -> None:
    run = Run.create(tmp_path / "run", "")
    model, tokenizer = AutoModelForCausalLM.from_pretrained(tiny_model), AutoTokenizer.from_pretrained(tiny_model)
    rows = [{"prompt": [{"role": "user", "content": f"{n} + 1 ="}], "answer": str(n + 1), "answer_type": "", "id": f"row-{n}"} for n in range(3)]
    settings = GrpoConfig(pass_samples=2, easy_first=True, max_completion_length=4)
    rates = curriculum.pass_rates(model, tokenizer, Dataset.from_list(rows), settings, 0, run)
    assert len(rates) == 3 and all(rate in (0.0, 0.5, 1.0) for rate in rates)
    kept = run.dir / "grpo/pass_rates.json"
    kept.write_text(kept.read_text().replace('"pass_rate": 0.0', '"pass_rate": 0.25'))
    assert curriculum.pass_rates(model, tokenizer, Dataset.from_list(rows), settings, 0, run) == [rate or 0.25 for rate in rates]
