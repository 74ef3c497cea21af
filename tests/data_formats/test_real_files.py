"""Every file of ../shared/data: what it is taken for, how many rows, and what must hold in them."""

from __future__ import annotations

import gzip
import json
import re

import pytest
from formats_for_tests import SHARED, is_canonical, needs_shared

import data_formats
from data_formats import DataFormatError
from data_formats.gold import last_boxed

pytestmark = needs_shared

# file: (format, read, kept, examples without an assistant turn at the end, assistant turns learnt, answers by type)
FILES = {
    "alpaca/identity.json": ("alpaca", 91, 91, 0, 91, {"none": 91}),
    "alpaca/seed_tasks.jsonl": ("alpaca", 175, 175, 0, 175, {"none": 175}),
    "aqua/dev.json": ("multiple_choice", 254, 254, 0, 254, {"choice": 254}),
    "aqua/test.json": ("multiple_choice", 254, 254, 0, 254, {"choice": 254}),
    "bridge/train.json": ("bridge", 419, 419, 0, 419, {"none": 419}),
    "bridge/validation.json": ("bridge", 71, 71, 0, 71, {"none": 71}),
    "bridge/test.json": ("bridge", 210, 210, 0, 210, {"none": 210}),
    "cima/dataset_10.json": ("cima", 30, 30, 0, 30, {"none": 30}),
    "comta_schema_synthetic/sample.json": ("comta", 2, 2, 2, 0, {"none": 2}),
    "deepseek_math_eval/cmath_test.jsonl": ("qa_answer", 1098, 1098, 1098, 0, {"number": 1064, "latex": 34}),
    "deepseek_math_eval/gaokao-mathcloze.jsonl": (
        "qa_answer",
        118,
        118,
        0,
        118,
        {"latex": 79, "number": 38, "text": 1},
    ),
    "deepseek_math_eval/gsm8k_test_30.jsonl": ("qa_answer", 30, 30, 0, 30, {"number": 30}),
    "deepseek_math_eval/mgsm_zh.jsonl": ("messages", 250, 250, 250, 0, {"number": 250}),
    "deepseek_math_eval/sat_test.jsonl": ("multiple_choice", 32, 32, 32, 0, {"choice": 32}),
    "gsm8k/train.jsonl": ("gsm8k", 7473, 7473, 0, 7473, {"number": 7473}),
    "gsm8k/test.jsonl": ("gsm8k", 1319, 1319, 0, 1319, {"number": 1319}),
    "gsm8k/test_socratic.jsonl": ("gsm8k_socratic", 1319, 1319, 0, 6138, {"number": 1319}),
    "gsm_hard/test_150.jsonl": ("word_problem", 150, 150, 150, 0, {"number": 150}),
    "llamafactory/v1_sft_demo_60.jsonl": ("messages", 60, 60, 0, 60, {"none": 60}),
    "math/math500_test.jsonl": ("math_boxed", 500, 500, 0, 500, {"number": 326, "latex": 173, "text": 1}),
    "math/test.jsonl.gz": (
        "math_boxed",
        5000,
        5000,
        0,
        5000,
        {"number": 3229, "latex": 1753, "list": 8, "text": 5, "choice": 5},
    ),
    "math/train_answers_only_7474.json": (
        "math_boxed",
        7474,
        7470,
        7470,
        0,
        {"number": 4901, "latex": 2532, "text": 20, "list": 11, "choice": 6},
    ),
    "math/train_with_solutions_3682.jsonl": (
        "math_boxed",
        3682,
        3682,
        0,
        3682,
        {"number": 2078, "latex": 1588, "text": 9, "list": 4, "choice": 3},
    ),
    "mathdial/test.jsonl": ("mathdial", 599, 599, 0, 3603, {"number": 599}),
    "mathdial/example.jsonl": ("mathdial", 2, 2, 0, 8, {"number": 2}),
    "mathdial/test_first120.csv": ("mathdial", 120, 120, 0, 739, {"number": 120}),
    "mathinstruct/sample.jsonl": ("mathinstruct", 2, 2, 0, 2, {"choice": 1, "none": 1}),
    "mathtutorbench/mathdial_bridge_100.json": ("dialog_history", 100, 100, 0, 200, {"number": 60, "none": 40}),
    "mawps/test.jsonl": ("word_problem", 2065, 2065, 2065, 0, {"number": 2065}),
    "metamath/GSM8K_Backward_40_two_keysets.jsonl": ("metamath", 40, 40, 20, 20, {"number": 40}),
    "metamath/MetaMathQA_sample.jsonl": ("metamath", 2, 2, 0, 2, {"latex": 1, "number": 1}),
    "mlx/lora_valid.jsonl": ("text", 100, 100, 0, 100, {"none": 100}),
    "mlx/wwdc25_valid.jsonl": ("prompt_completion", 144, 144, 0, 144, {"none": 144}),
    "mrbench/MRBench_V2.json": ("mrbench", 20, 20, 0, 20, {"number": 11, "none": 9}),
    "mrbench/mrbench_v3_devset_40.json": ("mrbench", 40, 40, 0, 40, {"none": 40}),
    "ms_swift/rft_math.json": ("math_boxed", 500, 500, 0, 500, {"number": 326, "latex": 172, "list": 1, "choice": 1}),
    "oasst/realistic_seed_data.json": ("oasst_tree", 158, 158, 0, 380, {"none": 158}),
    "openai_messages/kto_en_demo_10.json": ("messages", 10, 10, 0, 19, {"none": 10}),
    "openai_messages/reason_tool_use_demo_12.jsonl": ("messages", 12, 12, 0, 28, {"none": 12}),
    "openai_messages/toy_chat_fine_tuning.jsonl": ("messages", 5, 5, 0, 8, {"none": 5}),
    "openmathinstruct2/sample.jsonl": ("openmathinstruct", 1, 1, 0, 1, {"number": 1}),
    "parquet/prompt_only_messages.parquet": ("prompt_only", 200, 200, 200, 0, {"none": 200}),
    "sharegpt/dpo_en_demo_20.json": ("sharegpt", 20, 20, 0, 31, {"none": 20}),
    "sharegpt/fastchat_dummy_conversation.json": ("sharegpt", 500, 500, 0, 1000, {"none": 500}),
    "sharegpt/glaive_toolcall_en_demo_40.json": ("sharegpt", 40, 40, 0, 133, {"none": 40}),
    "socrateach_schema_synthetic/SocraTeach_multi.sample.json": ("socrateach", 1, 1, 0, 4, {"number": 1}),
    "socrateach_schema_synthetic/SocraTeach_single.sample.json": ("socrateach", 2, 2, 0, 2, {"none": 2}),
    "svamp/SVAMP.json": ("word_problem", 20, 20, 20, 0, {"number": 20}),
    "theoremqa/theoremqa_test.json": (
        "theoremqa",
        800,
        747,
        747,
        0,
        {"number": 560, "bool": 112, "list": 59, "choice": 16},
    ),
    "tora/examples.jsonl": ("tool_integrated", 30, 30, 0, 55, {"number": 21, "latex": 9}),
    "tora/tora70b_gsm8k_outputs_200.jsonl": ("tool_integrated", 200, 200, 0, 399, {"number": 200}),
    "verl_schema_synthetic/sample.jsonl": ("verl", 1, 1, 1, 0, {"number": 1}),
}

# Files that cannot be read, and what the message says.
REFUSED = {
    "llamafactory/dataset_info.json": "no known format fits; columns found: 'id', 'file_name'",
    "openai_messages/mllm_demo.json": "the row has images: only text can be used",
}


def _read(name: str, **options):
    return list(data_formats.read(SHARED / name, **options))


@pytest.mark.parametrize("name", FILES)
def test_counts(name):
    format, read, kept, prompt_only, learnt, answers = FILES[name]
    found = data_formats.inspect(SHARED / name)
    assert (found.format, found.read, found.kept, found.skipped) == (format, read, kept, read - kept)
    assert (found.prompt_only, found.trained_turns, dict(found.answers)) == (prompt_only, learnt, answers)
    assert found.why


@pytest.mark.parametrize("name", FILES)
def test_every_example_is_canonical(name):
    for example in data_formats.read(SHARED / name):
        if example.meta.get("language_modelling"):
            assert [message["role"] for message in example.messages] == ["assistant"]
            continue
        assert is_canonical(example.messages, prompt_only=example.completion is None), example
        assert example.answer is None or (isinstance(example.answer, str) and example.answer.strip())
        assert example.id and json.dumps(example.meta, allow_nan=False)


@pytest.mark.parametrize("name", REFUSED)
def test_refused(name):
    with pytest.raises(DataFormatError, match=re.escape(REFUSED[name])):
        _read(name)


def test_every_shared_file_is_in_a_table():
    text = {p.name for p in SHARED.rglob("*") if re.match(r"SOURCE|LICENSE|README", p.name)}
    files = {str(p.relative_to(SHARED)) for p in SHARED.rglob("*") if p.is_file() and p.name not in text}
    assert {name for name in files if not name.startswith("_dirty/")} == FILES.keys() | REFUSED.keys()


def test_gsm8k_solution_and_target():
    first = _read("gsm8k/train.jsonl", limit=1)[0]
    assert first.answer == "72" and first.answer_type == "number"
    assert first.completion.endswith("= 72 clips altogether in April and May.\nThe answer is \\boxed{72}.")
    assert "<<" not in first.completion and "####" not in first.completion
    raw = _read("gsm8k/train.jsonl", limit=1, strip_calculator=False, boxed_answer=False)[0]
    assert "<<48/2=24>>" in raw.completion and raw.completion.endswith("#### 72")


def test_gsm8k_golds_are_the_text_after_the_last_hash():
    for example, line in zip(
        _read("gsm8k/train.jsonl"), open(SHARED / "gsm8k/train.jsonl", encoding="utf-8"), strict=True
    ):
        assert example.answer == json.loads(line)["answer"].split("####")[-1].strip().replace(",", "")


def test_socratic_turns_are_the_steps():
    examples = _read("gsm8k/test_socratic.jsonl")
    assert sum(e.solution.count("\n") + 1 for e in examples) == 4821
    first = examples[0].messages
    assert first[1] == {"role": "assistant", "content": "How many eggs does Janet sell?", "train": True}
    assert first[2]["role"] == "user" and first[2]["content"].startswith("Janet sells 16 - 3 - 4 = 9")


def test_math500_answers_equal_their_column():
    with open(SHARED / "math/math500_test.jsonl", encoding="utf-8") as file:
        rows = [json.loads(line) for line in file]
    assert sum(last_boxed(row["solution"]) == row["answer"] for row in rows) == 500
    assert [example.answer for example in _read("math/math500_test.jsonl")] == [row["answer"] for row in rows]


def test_last_box_agrees_with_the_answer_column_of_math_train():
    with open(SHARED / "math/train_with_solutions_3682.jsonl", encoding="utf-8") as file:
        rows = [json.loads(line) for line in file]
    assert sum(last_boxed(row["solution"]) == row["answer"].strip() for row in rows) == 3682


def test_math_test_has_an_answer_in_every_row():
    with gzip.open(SHARED / "math/test.jsonl.gz", "rt", encoding="utf-8") as file:
        boxes = [json.loads(line)["solution"] for line in file]
    assert sum(len(re.findall(r"\\(?:boxed|fbox)", solution)) > 1 for solution in boxes) >= 90
    assert all(example.answer for example in _read("math/test.jsonl.gz"))


def test_math_train_without_answers_are_the_known_rows():
    skips = data_formats.inspect(SHARED / "math/train_answers_only_7474.json").skips
    assert skips["neither a solution nor an answer"].rows == [887, 1010, 5329, 5331]


def test_mathdial_moves_system_and_first_turn():
    examples = _read("mathdial/test.jsonl")
    moves = [move for example in examples for turn in example.meta["moves"] for move in turn]
    # The file has 1259, 952, 890 and 598: thirteen moves stand alone, with nothing said, and go with their empty turns.
    assert {name: moves.count(name) for name in set(moves)} == {
        "focus": 1252,
        "probing": 947,
        "generic": 890,
        "telling": 597,
    }
    for example in examples:
        assistants = [m for m in example.messages if m["role"] == "assistant"]
        assert len(example.meta["moves"]) == len(assistants)
        assert not any(re.match(r"\((focus|probing|generic|telling)\)", m["content"]) for m in assistants)
        assert example.messages[1]["content"].startswith(example.meta["question"])


def test_mathdial_ground_truth_is_only_in_the_system_prompt_when_asked():
    without, given = (_read("mathdial/test.jsonl", limit=5, ground_truth_in_system=on) for on in (False, True))
    assert all("Reference solution" not in example.messages[0]["content"] for example in without)
    assert all(
        example.solution in given_.messages[0]["content"] for example, given_ in zip(without, given, strict=True)
    )


def test_mathdial_csv_and_jsonl_are_the_same_dialogues():
    table, lines = _read("mathdial/test_first120.csv"), _read("mathdial/test.jsonl", limit=120)
    assert [e.messages for e in table] == [e.messages for e in lines]


def test_bridge_learns_the_expert_only_and_keeps_the_annotations():
    for name in ("train", "validation", "test"):
        for example in _read(f"bridge/{name}.json"):
            learnt = [m for m in example.messages if m.get("train")]
            assert learnt == [example.messages[-1]]
            assert {"error", "strategy", "intention", "rejected"} <= example.meta.keys()
    assert (
        _read("bridge/test.json", limit=1)[0].completion
        == "Close! A hexagon actually has 6 sides. A pentagon has 5 sides."
    )


def test_bridge_shares_94_contexts_between_train_and_test():
    train = {example.key for example in _read("bridge/train.json")}
    assert sum(example.key in train for example in _read("bridge/test.json")) == 94


def test_mrbench_keeps_the_other_replies_with_their_annotations():
    example = _read("mrbench/MRBench_V2.json", limit=1)[0]
    assert "Expert" in [reply["tutor"] for reply in example.meta["responses"]]
    assert example.meta["question"].startswith("Elliott is trying to walk 10,000 steps a day.")
    assert "\u00a0" not in "".join(m["content"] for m in example.messages)
    assert example.answer == "2000"


def test_tora_output_is_a_tool_turn_without_loss():
    examples = _read("tora/examples.jsonl")
    assert sum(any(m["role"] == "tool" for m in e.messages) for e in examples) == 25
    for example in examples + _read("tora/tora70b_gsm8k_outputs_200.jsonl"):
        for message in example.messages:
            assert "train" not in message if message["role"] == "tool" else "```output" not in message["content"]


def test_theoremqa_sets_the_picture_rows_aside():
    found = data_formats.inspect(SHARED / "theoremqa/theoremqa_test.json")
    assert {reason: tally.count for reason, tally in found.skips.items()} == {"needs its picture": 53}


def test_svamp_body_and_question_are_joined_and_the_answer_is_whole():
    first = _read("svamp/SVAMP.json", limit=1)[0]
    assert first.question == (
        "Each pack of dvds costs 76 dollars. If there is a discount of 25 dollars on each pack. "
        "How much do you have to pay to buy each pack?"
    )
    assert first.answer == "51"


def test_gsm_hard_large_and_negative_targets():
    assert _read("gsm_hard/test_150.jsonl", limit=1)[0].answer == "-9867630"


def test_comta_is_for_evaluation_only():
    reader = data_formats.read(SHARED / "comta_schema_synthetic/sample.json")
    assert all(example.meta["evaluation_only"] and example.completion is None for example in reader)
    assert "forbids training" in " ".join(reader.inspection.notes)


def test_metamath_exposes_the_original_question():
    assert all(len(e.questions) == 2 for e in _read("metamath/GSM8K_Backward_40_two_keysets.jsonl"))


def test_mathinstruct_program_has_no_answer():
    text, program = _read("mathinstruct/sample.jsonl")
    assert (text.answer, text.answer_type, program.answer) == ("A", "choice", None)


def test_glaive_tools_calls_and_observations():
    example = next(
        e for e in _read("sharegpt/glaive_toolcall_en_demo_40.json") if any(m["role"] == "tool" for m in e.messages)
    )
    place = [m["role"] for m in example.messages].index("tool")
    assert re.fullmatch(r"<tool_call>\n\{.*\}\n</tool_call>", example.messages[place - 1]["content"], re.DOTALL)
    assert json.loads(example.meta["tools"])


def test_preference_rows_learn_the_chosen_reply():
    first = _read("sharegpt/dpo_en_demo_20.json", limit=1)[0]
    assert first.completion.startswith("That sounds like a fun and engaging idea!")
    assert first.meta["rejected"].startswith("Hello!")


def test_llamafactory_loss_weights_are_honoured():
    assert all(e.messages[-1]["train"] for e in _read("llamafactory/v1_sft_demo_60.jsonl"))


def test_chinese_grade_school_fractions_are_kept():
    answers = [e.answer for e in _read("deepseek_math_eval/cmath_test.jsonl")]
    with open(SHARED / "deepseek_math_eval/cmath_test.jsonl", encoding="utf-8") as file:
        assert answers == [json.loads(line)["golden"] for line in file]
