"""The suites: files, prompts and few-shot examples."""

import re

import pytest

import data_formats
from finetune import answers, few_shot, suites
from finetune.config import Config, DataConfig, EvaluateConfig
from finetune.errors import UserError

FILES = {
    "gsm8k": ("gsm8k/test.jsonl", 1319), "math500": ("math/math500_test.jsonl", 500), "svamp": ("svamp/SVAMP.json", 20),
    "mawps": ("mawps/test.jsonl", 2065), "gsm_hard": ("gsm_hard/test_150.jsonl", 150), "mgsm_zh": ("deepseek_math_eval/mgsm_zh.jsonl", 250),
    "cmath": ("deepseek_math_eval/cmath_test.jsonl", 1098), "sat": ("deepseek_math_eval/sat_test.jsonl", 32), "aqua": ("aqua/test.json", 254),
    "math": ("math/test.jsonl.gz", 5000),
}


@pytest.mark.parametrize("name", FILES)
def test_a_suite_is_read_whole_from_its_file(name, shared_data):
    file, count = FILES[name]
    examples = list(data_formats.read(shared_data / file))
    assert len(examples) == count
    assert all(answers.parseable(example.answer) for example in examples)


def test_a_suite_that_is_not_on_the_hub_asks_for_its_file():
    config = Config(data=DataConfig(path="x"), evaluate=EvaluateConfig(suite="mawps"))
    with pytest.raises(UserError, match="evaluate.suite_path"):
        suites.find(config)
    with pytest.raises(UserError, match="Did you mean 'gsm8k'"):
        suites.find(Config(data=DataConfig(path="x"), evaluate=EvaluateConfig(suite="gsm8")))


@pytest.mark.parametrize(
    ("suite", "mode", "part"),
    [
        ("math500", "cot", "\nPlease reason step by step, and put your final answer within \\boxed{}."),
        ("cmath", "cot", "请通过逐步推理"), ("gsm8k", "tool", "integrate natural language reasoning with programs"), ("mgsm_zh", "tool", "Python程序语言"),
    ],
)
def test_the_papers_prompts(suite, mode, part):
    config = Config(data=DataConfig(path="x"), evaluate=EvaluateConfig(suite=suite, prompt=mode))
    assert part in suites.prompt(config, suites.SUITES[suite])


def test_the_prompt_that_a_model_was_trained_with_wins():
    config = Config(data=DataConfig(path="x", prompt="Solve: {question}"), evaluate=EvaluateConfig(suite="gsm8k"))
    assert suites.prompt(config, suites.SUITES["gsm8k"]) == "Solve: {question}"


def test_comta_s_terms_are_said():
    assert "evaluation only" in suites.SUITES["comta"].note


@pytest.mark.parametrize(("shots", "count"), [(few_shot.GSM8K, 8), (few_shot.MATH, 4)])
def test_published_examples_end_in_the_answer_that_their_solution_works_out(shots, count):
    assert len(shots.examples) == count
    for _, solution in shots.examples:
        stated = answers.extract(solution)
        worked = re.findall(r"boxed\{((?:[^{}]|\{[^{}]*\})+)\}", solution) or [solution.rsplit("The answer", 1)[0].rstrip(". ").split()[-1]]
        assert stated is not None and answers.equal(worked[-1], stated) or stated in solution.rsplit("The answer", 1)[0], solution


def test_a_few_shot_prompt_ends_where_the_solution_begins():
    text = few_shot.GSM8K.prompt("What is 1 + 1?")
    assert text.startswith("Q: There are 15 trees") and text.endswith("\n\n\nQ: What is 1 + 1?\nA:") and text.count("\nA: ") == 8
    assert few_shot.MATH.prompt("Find $x$.").endswith("I hope it is correct.\n\nProblem:\nFind $x$.\n\nSolution:")


def test_examples_from_a_file_of_ones_own(shared_data):
    examples = list(data_formats.read(shared_data / "gsm8k" / "train.jsonl", limit=3))
    shots = few_shot.from_examples(examples, 2, "train.jsonl")
    assert shots.prompt("Q?").count("Question: ") == 3
    with pytest.raises(UserError, match="3 examples with a worked solution, expected evaluate.shots=4"):
        few_shot.from_examples(examples, 4, "train.jsonl")
