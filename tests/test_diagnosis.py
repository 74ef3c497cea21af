"""GRPO says why it does not learn: checks before training, faults named during it, and what is kept when it stops."""

import doctest
import json
import math
import threading
from pathlib import Path
from typing import Any

import pytest
from datasets import Dataset

from finetune import diagnosis, golden, grpo, training
from finetune.config import Config, DataConfig, GrpoConfig, HardwareConfig, LoraConfig, ModelConfig
from finetune.diagnosis import CHECKS, Probe
from finetune.errors import UserError
from finetune.rewards.guard import RewardError, guarded
from finetune.rewards.math import correct
from finetune.run import Run, sha256
from finetune.samples import read


def test_examples_in_the_docstrings_hold():
    assert doctest.testmod(diagnosis) == (0, 1)
    assert doctest.testmod(golden) == (0, 1)


# -- the golden check -----------------------------------------------------------------------------------------------------


def problems(*golds: str) -> Dataset:
    """Rows as data.grpo_dataset makes them."""
    return Dataset.from_list(
        [
            {"prompt": [{"role": "user", "content": f"problem {index}"}], "answer": gold, "answer_type": "", "solution": "", "id": f"row-{index}",
             "meta": "{}"}
            for index, gold in enumerate(golds)
        ]
    )


def check(dataset: Dataset, **settings: Any) -> Dataset:
    config = GrpoConfig(**settings)
    return golden.golden_check(dataset, guarded(config.rewards, 10.0), config)


def test_good_golds_pass():
    dataset = problems("12", "1,200", "-3.5", "\\frac{1}{2}", "x^2+1", "[0,1)", "B", "True", "28%", "Monday")
    assert check(dataset, rewards={"correct": 1.0, "boxed": 0.2}).num_rows == 10


def test_golds_that_cannot_be_right_end_the_run_and_are_listed():
    with pytest.raises(UserError, match="3 of 4 gold answers.*row-1: 'proof' cannot be parsed; row-2.*row-3.*bad_gold=drop"):
        check(problems("12", "proof", "\\frac{1}{", " "))


def test_golds_that_cannot_be_right_are_dropped_on_demand_and_counted(caplog, monkeypatch):
    monkeypatch.setattr(golden.log, "propagate", True)
    assert check(problems("12", "proof", "7"), bad_gold="drop")["id"] == ["row-0", "row-2"]
    assert "1 of 3 rows left out" in caplog.text
    with pytest.raises(UserError, match="1 of 1 gold answers"):
        check(problems("proof"), bad_gold="drop")


OWN = """
def longer_is_worse(completions, **columns): return [-float(len(c[-1]["content"])) for c in completions]
def exact(completions, answer, **columns): return [float(f"{{{a}}}" in c[-1]["content"]) for c, a in zip(completions, answer)]
def flat(completions, **columns): return [1.0 for c in completions]
"""


@pytest.fixture
def own(tmp_path, monkeypatch):
    (tmp_path / "golden_rewards.py").write_text(OWN)
    monkeypatch.syspath_prepend(tmp_path)
    return "golden_rewards."


def test_rewards_that_pay_for_bad_answers_end_the_run(own):
    with pytest.raises(UserError, match="pay for bad answers. row-0: an empty answer earns 0, the gold answer '12'"):
        check(problems("12", "7"), rewards={"correct": 1.0, own + "longer_is_worse": 1.0})


@pytest.mark.parametrize(("name", "text"), [("exact", "earn less than the gold one on each of 2 rows"), ("flat", "on 6 of 6 tries")])
def test_own_rewards_are_compared_without_the_answer_check(own, name, text, caplog, monkeypatch):
    monkeypatch.setattr(golden.log, "propagate", True)
    caplog.set_level("INFO")
    assert check(problems("12", "proof"), rewards={own + name: 1.0}).num_rows == 2
    assert text in caplog.text


def test_pain_point_25_symbolic_answers_earn_their_reward_in_any_thread():
    earned: list[float] = []
    texts = ["\\boxed{\\frac{2}{4}}", "\\boxed{x(x+2)+1}", "\\boxed{x+1}"]
    thread = threading.Thread(target=lambda: earned.extend(
        correct([[{"role": "assistant", "content": text}] for text in texts], answer=["\\frac12", "(x+1)^2", "(x+1)^2"])
    ))
    thread.start()
    thread.join(120)
    assert earned == [1.0, 1.0, 0.0]


# -- before training ------------------------------------------------------------------------------------------------------


def test_probe_in_words_names_cause_and_remedy():
    settings = GrpoConfig(max_completion_length=64)
    hard, easy, cut = Probe([0.0] * 8, 8, 1.0, 0.0), Probe([1.0] * 7 + [0.5], 8, 0.9, 0.0), Probe([0.0] * 8, 8, 1.0, 0.9)
    assert diagnosis.HARD in diagnosis.in_words(hard, settings)
    assert diagnosis.EASY in diagnosis.in_words(easy, settings)
    assert "raise it" in diagnosis.in_words(cut, settings)
    assert "grpo.max_completion_length=64" in diagnosis.in_words(cut, settings)
    assert diagnosis.in_words(Probe([0.5] * 8, 8, 0.1, 0.0), settings).endswith("max_completion_length=64")


def test_every_prompt_has_its_place_in_the_histogram():
    table = diagnosis.histogram(Probe([0.0, 0.1, 0.25, 0.5, 0.99, 1.0, 1.0], 8, 0.4, 0.0))
    assert [int(cell) for cell in table.columns[1]._cells] == [1, 1, 1, 1, 1, 2]


def test_chance_of_no_variance_counts_equal_rewards():
    assert math.isclose(diagnosis.chance_of_no_variance([0.1, 0.1, 0.1, 0.9], 8), 0.75**8 + 0.25**8)


# -- during training ------------------------------------------------------------------------------------------------------

HEALTHY = {
    "reward": 0.5, "reward_std": 0.4, "frac_reward_zero_std": 0.3, "completions/clipped_ratio": 0.05, "completions/max_length": 64.0,
    "completions/mean_length": 30.0, "entropy": 1.0, "kl": 0.01,
}
SETTINGS = GrpoConfig(patience=3, max_completion_length=64)


def series(steps: int, **changed: float) -> list[dict[str, float]]:
    return [HEALTHY | {key.replace("__", "/"): value for key, value in changed.items()} for _ in range(steps)]


FAULTS = {
    "never_rewarded": (series(3, reward=0.0, reward_std=0.0, frac_reward_zero_std=1.0), "too hard", True),
    "all_alike": (series(3, reward=1.0, reward_std=0.0, frac_reward_zero_std=1.0), "too easy", True),
    "few_groups_teach": (series(3, frac_reward_zero_std=0.8, reward=0.1), "80% of the groups", False),
    "cut_off": (series(3, completions__clipped_ratio=0.6), "at grpo.max_completion_length=64", False),
    "entropy_collapse": (series(3) + series(3, entropy=0.05), "from 1.000 to 0.050", False),
    "length_blow_up": (series(3) + series(3, completions__mean_length=61.0), "from 30 to 61 tokens", False),
    "kl_spike": (series(3) + series(1, kl=2.0), "jumped to 2.00 from 0.010", False),
}


def test_every_check_has_its_case():
    assert list(FAULTS) == [check.__name__ for check in CHECKS]


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
def test_a_fault_is_named_and_only_that_one(check):
    rows, words, hopeless = FAULTS[check.__name__]
    text, ends = check(rows, SETTINGS)
    assert words in text
    assert ends == hopeless
    assert check(series(30), SETTINGS) is None
    assert check(rows[:-1] if len(rows) != 3 else rows[:2], SETTINGS) is None, "before it has lasted"
    for other in CHECKS:
        assert other is check or other(rows, SETTINGS) is None, other.__name__


def test_pain_point_17_the_cap_that_cuts_answers_off_is_named():
    rows = series(3, reward=0.0, reward_std=0.0, frac_reward_zero_std=1.0, completions__clipped_ratio=0.9)
    assert "grpo.max_completion_length=64 before they state an answer: raise it" in diagnosis.never_rewarded(rows, SETTINGS)[0]
    elsewhere = series(3, completions__clipped_ratio=0.9, completions__max_length=40.0)
    assert "the sampling engine's own limit" in diagnosis.cut_off(elsewhere, SETTINGS)[0]


# -- whole runs on the tiny model -------------------------------------------------------------------------------------------

REWARDS = """
import time
calls = 0

def digits(completions, **columns):
    return [sum(map(str.isdigit, c[-1]["content"])) / 10 for c in completions]

def zero(completions, **columns): return [0.0] * len(completions)
def constant(completions, **columns): return [0.7] * len(completions)

def fails_later(completions, **columns):
    global calls
    calls += 1
    if calls > 7: FAIL
    return digits(completions)
"""


@pytest.fixture
def run(tmp_path):
    return Run.create(tmp_path / "run", "")


@pytest.fixture
def module(tmp_path, monkeypatch):
    """Writes run_rewards.py, in which fails_later does FAIL after the golden check, the probe and two steps."""

    def write(failure: str = "pass") -> None:
        (tmp_path / "run_rewards.py").write_text(REWARDS.replace("FAIL", failure))

    monkeypatch.syspath_prepend(tmp_path)
    write()
    return write


def train(tiny_model: Path, run: Run, reward: str, **settings: Any) -> None:
    """The grpo stage, four steps of two groups, with a checkpoint after the second."""
    config = Config(
        model=ModelConfig(path=str(tiny_model), quantization="none", dtype="float32"),
        data=DataConfig(path="reasoning_gym:chain_sum", format="reasoning_gym", options={"size": 60, "seed": 0}, held_out=8),
        lora=LoraConfig(r=4),
        grpo=GrpoConfig(**{
            "max_steps": 4, "group_size": 4, "batch_size": 8, "micro_batch_size": 8, "max_completion_length": 6, "save_steps": 2,
            "learning_rate": 1e-3, "rewards": {f"run_rewards.{reward}": 1.0}, "probe_prompts": 2, "reward_seconds": 20.0, **settings,
        }),
        hardware=HardwareConfig(device="cpu", threads=1),
    )
    grpo.train(config, run)


def findings(run_dir: Path) -> dict[str, dict[str, Any]]:
    record = json.loads((run_dir / "grpo" / "diagnosis.json").read_text())
    return {finding["name"]: finding for finding in record["findings"]}


@pytest.mark.parametrize(("reward", "name", "words"), [("zero", "never_rewarded", "all rewards are zero"), ("constant", "all_alike", "no variance")])
def test_pain_point_16_a_run_without_signal_is_stopped_with_the_reason_and_its_checkpoint(tiny_model, run, module, reward, name, words):
    with pytest.raises(UserError, match=f"stopped after step 3, .*{words}"):
        train(tiny_model, run, reward, patience=3)
    assert findings(run.dir)[name]["step"] == 3
    assert training.last_checkpoint(run.dir / "grpo/checkpoints").name == "checkpoint-3"
    assert not (run.dir / "grpo/adapter").exists()


def test_a_run_shorter_than_the_patience_is_judged_by_its_length(tiny_model, run, module):
    with pytest.raises(UserError, match="stopped after step 4"):
        train(tiny_model, run, "zero", patience=10)


def test_on_demand_a_run_without_signal_is_only_warned_of(tiny_model, run, module):
    train(tiny_model, run, "zero", patience=3, diagnosis="warn")
    assert findings(run.dir)["never_rewarded"]["hopeless"]
    assert (run.dir / "grpo/adapter").is_dir()


def test_samples_pass_rates_and_each_reward_are_kept_and_the_probe_changes_nothing(tiny_model, run, module):
    settings = {"rewards": {"run_rewards.digits": 1.0, "boxed": 0.5}}
    train(tiny_model, run, "digits", **settings)
    rows = read(run.dir / "grpo/samples.jsonl")
    assert {row["step"] for row in rows} == {0, 1, 2, 3}
    for row in rows:
        assert list(row["rewards"]) == ["run_rewards.digits", "boxed"]
        assert row["total"] == pytest.approx(row["rewards"]["run_rewards.digits"] + 0.5 * row["rewards"]["boxed"])
        assert row["rewards"]["run_rewards.digits"] == pytest.approx(sum(map(str.isdigit, row["completion"])) / 10)
    probe = json.loads((run.dir / "grpo/diagnosis.json").read_text())["probe"]
    assert len(probe["pass_rates"]) == 2
    assert probe["samples"] == 4
    logged = run.metrics("grpo")
    assert {"rewards/run_rewards.digits/mean", "rewards/boxed/mean", "rewards/boxed/std"} <= set(logged[0])
    assert "grpo.max_completion_length=6" in findings(run.dir)["cut_off"]["text"]

    without = Run.create(run.dir / "without", "")
    train(tiny_model, without, "digits", probe_prompts=0, **settings)
    assert sha256(without.dir / "grpo/adapter") == sha256(run.dir / "grpo/adapter")


@pytest.mark.parametrize(("failure", "words"), [("raise OSError('gone')", "raised OSError: gone"), ("time.sleep(1e6)", "did not return within 3 s")])
def test_a_reward_that_fails_ends_the_run_with_its_checkpoint_which_goes_on_once_it_is_mended(tiny_model, run, module, failure, words):
    module(failure)
    with pytest.raises(RewardError) as error:
        train(tiny_model, run, "fails_later", reward_seconds=3.0)
    message = str(error.value)
    assert "run_rewards.fails_later" in message
    assert words in message
    assert "chain_sum-0-" in message, "the sample is named"
    last = training.last_checkpoint(run.dir / "grpo/checkpoints")
    assert last is not None
    assert f"saved in {last}" in message
    step = int(last.name.partition("-")[2])
    assert 1 <= step <= 3

    module()
    train(tiny_model, run, "fails_later", reward_seconds=20.0)
    assert [row["step"] for row in run.metrics("grpo")] == [1, 2, 3, 4]
    assert (run.dir / "grpo/adapter").is_dir()
