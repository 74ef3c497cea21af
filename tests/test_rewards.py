"""The reward functions: their examples, real expert turns against bad ones, and what the guard does with functions that fail."""

import doctest
import json
import random
import statistics
import time
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path

import pytest

import data_formats
from finetune.config import Config, GrpoConfig
from finetune.data import grpo_dataset
from finetune.errors import UserError
from finetune.rewards import REWARDS, find, tutoring
from finetune.rewards.arithmetic import equations, numbers
from finetune.rewards.guard import Guard, RewardError, guarded

TUTORING = ("withholds_answer", "asks", "addresses_error", "one_question", "fits_student", "tells_correctly")
QUESTION = "Tom has 3 bags of 4 apples. He eats 2. How many apples are left?"
ATTEMPT = {"role": "user", "content": f"{QUESTION}\n\nMy solution:\n3 + 4 = 7 apples. 7 - 2 = 5. So 5 apples."}


def said(*texts: str) -> list[list[dict[str, str]]]:
    return [[{"role": "assistant", "content": text}] for text in texts]


def grade(name: str, *texts: str, prompt: list[dict[str, str]] | None = None, answer: str | None = "10", **meta: object) -> list[float]:
    """What `texts` earn as the tutor's next turn after Tom's apples."""
    count = len(texts)
    return REWARDS[name](
        prompts=[prompt or [ATTEMPT]] * count, completions=said(*texts), answer=[answer] * count,
        solution=["3 * 4 = 12 apples. 12 - 2 = 10 apples."] * count, meta=[json.dumps({"question": QUESTION, **meta})] * count,
    )


@pytest.mark.parametrize("name", ["math", "format", "tutoring", "arithmetic"])
def test_examples_in_the_docstrings_hold(name):
    results = doctest.testmod(import_module(f"finetune.rewards.{name}"))
    assert results.attempted > 0
    assert results.failed == 0


def test_every_reward_shows_an_example():
    for name, function in REWARDS.items():
        assert ">>>" in function.__doc__, name


def test_correct_reads_the_answer_type_and_the_whole_batch_at_once():
    texts = said("so \\boxed{1/2}", "(B)", "the answer is 7", "")
    assert find("correct")(texts, answer=["0.5", "B", "8", "3"], answer_type=["number", "choice", "number", ""]) == [1, 1, 0, 0]


# -- arithmetic -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "holds"),
    [
        ("12 + 3 = 15", [True]), ("10 - 3 = 6 spoons", [False]), ("4 x 5 = 20 = 2 * 10", [True]), ("10/3 = 3.33", [True]),
        ("10/3 = 3.5", [False]), ("20% * 50 = 10", [True]), ("3 bids * $50 per bid = $150", [True]), ("$1,200 / 4 = $300", [True]),
        ("x + 5 = 9", []), ("40 x .05 = 2", [True]), ("(40 + 9) * 2 = 98", [True]), ("6 nephews = 96 cookies/6", []), ("1/0 = 3 - 3", []),
    ],
)
def test_equations_are_found_and_checked(text, holds):
    assert [equation.holds for equation in equations(text)] == holds


def test_numbers_are_read_in_figures_words_and_fractions():
    assert {float(value) for value in numbers("one of 1,200, \\frac{1}{4}, thirty-five, 3/8 and .5")} == {1200, 0.25, 35, 0.375, 0.5}


@pytest.mark.parametrize("text", ["1 " * 20000, "(" * 20000, "1+" * 20000 + "=2", "a a a " * 5000 + "=3", "9" * 100000 + "=1", "1 aa bb " * 9000])
def test_no_text_makes_the_reading_of_numbers_slow(text):
    started = time.process_time()
    equations(text), numbers(text)
    assert time.process_time() - started < 5


def test_reference_solutions_of_gsm8k_hold(shared_data):
    rows = [json.loads(line) for line in (shared_data / "gsm8k" / "test.jsonl").read_text(encoding="utf-8").split("\n") if line]
    found = [equation for row in rows for equation in equations(row["answer"].replace("<<", "").replace(">>", " "))]
    assert len(found) > 3000
    assert sum(not equation.holds for equation in found) < 0.01 * len(found)


# -- tutoring -------------------------------------------------------------------------------------------------------------


def test_an_empty_turn_earns_nothing():
    for name in TUTORING:
        assert grade(name, "", "  \n", "...") == [0, 0, 0], name


def test_the_answer_is_withheld_until_the_student_has_tried():
    assert grade("withholds_answer", "It is 10.", "Ten apples.", "What do 3 bags hold?") == [0, 0, 1]
    tried = [ATTEMPT, *[{"role": role, "content": text} for text in ("So 3 + 4 = 7?", "Or 3 + 2 = 5?") for role, text in
                        (("assistant", "Try again."), ("user", text))]]
    assert grade("withholds_answer", "It is 10.", prompt=tried) == [1]


def test_an_answer_that_the_student_has_found_may_be_confirmed():
    found = [ATTEMPT, {"role": "assistant", "content": "How many are in the bags?"}, {"role": "user", "content": "12, so 10 are left."}]
    assert grade("withholds_answer", "Yes, 10 is right!", prompt=found) == [1]
    assert grade("addresses_error", "Well done!", prompt=found) == [1]


def test_a_number_of_the_problem_is_a_leak_only_when_it_is_called_the_answer():
    assert grade("withholds_answer", "There are 4 in a bag.", "The answer is 4.", "\\boxed{4}", answer="4") == [1, 0, 0]


def test_answers_that_are_no_numbers_can_leak_too():
    assert grade("withholds_answer", "It is x ^ 2 + 1.", "What is x times x?", "The answer is (B).", answer="x^2+1") == [0, 1, 1]
    assert grade("withholds_answer", "The answer is (B).", "Look at (B) and (C).", answer="B") == [0, 1]


@pytest.mark.parametrize(
    ("move", "grades"),
    [("focus", [1, 0.5, 0.5, 0]), ("probing", [1, 0.5, 0.5, 0]), ("telling", [0.5, 1, 1, 0]), ("generic", [1, 1, 0.5, 0.5])],
)
def test_asking_is_graded_by_the_teachers_move(move, grades):
    texts = ("What do the 3 bags hold?", "Each bag has 4 apples.", "3 * 4 = 12, what is left?", "3 * 4 = 12. 12 - 2 = 10.")
    assert grade("asks", *texts, moves=[[move]]) == grades


def test_bridge_strategies_count_as_moves():
    assert grade("asks", "What is left?", "12 were there.", strategy="ask_question") == [1, 0]
    assert grade("asks", "What is left?", "12 were there.", strategy="provide_correction") == [0.5, 1]


def test_the_turn_must_take_up_the_wrong_step():
    (turn,) = tutoring.turns([[ATTEMPT]], said(""), answer=["10"], solution=["3 * 4 = 12. 12 - 2 = 10."], meta=[json.dumps({"question": QUESTION})])
    assert tutoring.wrong_step(turn) == "3 + 4 = 7 apples."
    texts = ("How did you get 7?", "Can you talk me through your solution?", "Did you see the match?", "Are you well?")
    assert grade("addresses_error", *texts) == [1, 1, 0, 0]


def test_false_equations_and_false_answers_are_not_told():
    texts = ("3 * 4 = 12.", "3 * 4 = 14.", "Is 3 * 4 = 14?", "The answer is 12.", "The answer is 10.", "That answer is not right.")
    assert grade("tells_correctly", *texts) == [1, 0, 1, 0, 1, 1]


def turns_of(path: Path) -> Iterator[dict[str, object]]:
    """Each teacher turn of a file that is learnt, with the dialogue before it."""
    for example in data_formats.read(path):
        for place, message in enumerate(example.messages):
            if message["role"] == "assistant" and message.get("train", True):
                yield {
                    "prompt": example.messages[:place], "said": message["content"], "answer": example.answer,
                    "solution": example.solution or "", "meta": json.dumps(example.meta),
                }


@pytest.fixture(scope="module")
def means(shared_data):
    """Mean reward by file, kind of turn and reward, on real dialogues."""
    found: dict[tuple[str, str], dict[str, float]] = {}
    for file in ("mathdial/test.jsonl", "bridge/test.json"):
        rows = list(turns_of(shared_data / file))
        random.Random(0).shuffle(rows)
        rows = rows[:300]
        kinds = {
            "expert": [row["said"] for row in rows],
            "another dialogue's": [row["said"] for row in rows[1:] + rows[:1]],
            "solution": [f"{row['solution']}\nThe answer is {row['answer']}." for row in rows],
            "answer": [f"The answer is {row['answer']}." for row in rows],
            "off topic": ["Did you see the football match on television yesterday evening?"] * len(rows),
            "evasive": ["I am not sure about that, sorry."] * len(rows),
            "essay": ["Let us consider what you did. " * 30 + "What? Why? How?"] * len(rows),
            "empty": [""] * len(rows),
        }
        columns = {name: [row[name] for row in rows] for name in ("answer", "solution", "meta")}
        for kind, texts in kinds.items():
            found[file, kind] = {
                name: statistics.mean(REWARDS[name](prompts=[row["prompt"] for row in rows], completions=said(*texts), **columns))
                for name in TUTORING
            }
    return found


@pytest.mark.parametrize("file", ["mathdial/test.jsonl", "bridge/test.json"])
def test_real_expert_turns_earn_more_than_bad_ones(means, file):
    expert = sum(means[file, "expert"].values())
    for kind in ("another dialogue's", "solution", "answer", "off topic", "evasive", "essay", "empty"):
        assert expert > sum(means[file, kind].values()) + 0.1, kind


def test_each_reward_sees_the_fault_that_it_is_for(means):
    expert = means["mathdial/test.jsonl", "expert"]
    for name, kind in [
        ("withholds_answer", "answer"), ("asks", "solution"), ("addresses_error", "off topic"), ("addresses_error", "another dialogue's"),
        ("one_question", "essay"), ("fits_student", "essay"), ("tells_correctly", "empty"),
    ]:
        assert expert[name] > means["mathdial/test.jsonl", kind][name] + 0.15, (name, kind)
    assert expert["withholds_answer"] > 0.98
    assert expert["tells_correctly"] > 0.98


# -- the guard ------------------------------------------------------------------------------------------------------------

FAILING = '''
import os, re, signal, time

def bad(completions): return [c[-1]["content"] == "bad" for c in completions]
def good(completions, answer, **columns): print("noise"); return [float(a) for a in answer]
def raises(completions, **columns): return [1 / (1 - b) for b in bad(completions)]
def nan(completions, **columns): return [float("nan") if b else 0.0 for b in bad(completions)]
def infinite(completions, **columns): return [float("inf") if b else 0.0 for b in bad(completions)]
def none(completions, **columns): return [None if b else 0.0 for b in bad(completions)]
def words(completions, **columns): return ["high" if b else 0.0 for b in bad(completions)]
def short(completions, **columns): return [0.0 for b in bad(completions) if not b]
def number(completions, **columns): return 1.0
def one(completions, **columns): return [1.0]
def sleeps(completions, **columns):
    if any(bad(completions)): time.sleep(1e6)
    return [0.0] * len(completions)
def spins(completions, **columns):
    while any(bad(completions)): pass
    return [0.0] * len(completions)
def backtracks(completions, **columns):  # holds the interpreter's lock: no thread could end it
    if any(bad(completions)): re.match("(a+)+$", "a" * 60 + "b")
    return [0.0] * len(completions)
def dies(completions, **columns):
    if any(bad(completions)): os.kill(os.getpid(), signal.SIGSEGV)
    return [0.0] * len(completions)
def needs_main_thread(completions, **columns):
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    return [0.0] * len(completions)
'''


@pytest.fixture
def own(tmp_path, monkeypatch):
    """A module of the user's own, failing_rewards."""
    (tmp_path / "failing_rewards.py").write_text(FAILING)
    monkeypatch.syspath_prepend(tmp_path)
    return "failing_rewards."


BATCH = {
    "prompts": [[{"role": "user", "content": f"question {index}"}] for index in range(4)], "completions": said("fine", "okay", "bad", "good"),
    "completion_ids": [[1]] * 4, "id": ["row-a", "row-b", "row-c", "row-d"], "answer": ["1", "2", "3", "4"], "trainer_state": object(),
}


@pytest.mark.parametrize(
    ("name", "problem"),
    [
        ("raises", "ZeroDivisionError"), ("nan", "returned nan"), ("infinite", "returned inf"), ("none", "returned None"), ("words", "'high'"),
        ("short", "returned 0 rewards for 1 completions"), ("sleeps", "within 1 s"), ("spins", "within 1 s"), ("backtracks", "within 1 s"),
        ("dies", "exit code -11"),
    ],
)
def test_a_failing_reward_is_named_with_its_sample(own, name, problem):
    with pytest.raises(RewardError) as error:
        Guard(own + name, 1.0)(**BATCH)
    message = str(error.value)
    assert own + name in message
    assert problem in message
    assert "row-c" in message
    assert "question 2" in message


@pytest.mark.parametrize(("name", "problem"), [("one", "returned 1 rewards for 4 completions"), ("number", "returned float")])
def test_a_reward_of_the_wrong_shape_is_named_with_its_batch(own, name, problem):
    with pytest.raises(RewardError, match=f"{own}{name}.*{problem}.*row-a"):
        Guard(own + name, 5.0)(**BATCH)


def test_own_rewards_run_beside_the_packages_and_keep_their_names(own):
    functions = guarded({"boxed": 1.0, own + "good": 0.5, own + "needs_main_thread": 1.0}, 10.0)
    assert [function.__name__ for function in functions] == ["boxed", own + "good", own + "needs_main_thread"]
    assert [function(**BATCH) for function in functions] == [[0.0] * 4, [1.0, 2.0, 3.0, 4.0], [0.0] * 4]


@pytest.mark.parametrize(
    ("name", "problem"),
    [("corect", "'corect' is unknown"), ("no_such_module.reward", "No module named"), ("failing_rewards.missing", "no function 'missing'")],
)
def test_a_reward_that_is_not_there_is_named(own, name, problem):
    with pytest.raises(UserError, match=problem):
        Guard(name, 5.0)


def test_a_module_that_cannot_be_imported_is_named(tmp_path, monkeypatch):
    (tmp_path / "broken_rewards.py").write_text("def reward(:")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(UserError, match="broken_rewards.reward.*while its module was imported"):
        Guard("broken_rewards.reward", 5.0)


# -- the prompts ----------------------------------------------------------------------------------------------------------


def test_under_tutoring_rewards_each_learnt_turn_is_a_prompt_and_needs_no_gold():
    dialogue = data_formats.Example(
        [{"role": "user", "content": "1 + 1 = 3"}, {"role": "assistant", "content": "Count again?", "train": True},
         {"role": "user", "content": "2"}, {"role": "assistant", "content": "Yes.", "train": True}],
        answer="2", answer_type="number", id="a", meta={"question": "1 + 1?", "moves": [["focus"], ["generic"]]},
    )
    silent = data_formats.Example(
        [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "not learnt", "train": False}, {"role": "user", "content": "5?"},
         {"role": "assistant", "content": "How?", "train": True}], id="b",
    )
    rows = grpo_dataset([dialogue, silent], Config(grpo=GrpoConfig(rewards={"asks": 1.0})))
    assert [(row["id"], len(row["prompt"]), row["answer"]) for row in rows] == [("a:0", 1, "2"), ("a:1", 3, "2"), ("b:0", 3, None)]
    first, second, _ = tutoring.turns(rows["prompt"], said("", "", ""), meta=rows["meta"])
    assert (first.move, second.move) == ("focus", "generic")
    rows = grpo_dataset([dialogue, silent], Config(grpo=GrpoConfig(rewards={"correct": 1.0, "asks": 1.0})))
    assert [(row["id"], len(row["prompt"])) for row in rows] == [("a", 3)]
