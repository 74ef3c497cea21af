"""Examples longer than sft.max_length: no answer loses its end, every turn is trained once, everything is counted."""

from pathlib import Path

import pytest
from transformers import AutoTokenizer

from finetune import data, over_length


@pytest.fixture
def encode(tiny_model: Path):  # noqa: ANN201
    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    return tokenizer, lambda messages, train: data.encode(tokenizer, messages, train)


def text(tokenizer, row: dict) -> str:  # noqa: ANN001
    return tokenizer.decode(row["input_ids"])


def learned(tokenizer, row: dict) -> str:  # noqa: ANN001
    return tokenizer.decode([label for label in row["labels"] if label != -100])


def test_truncate_prompt_cuts_the_start_of_the_question(encode) -> None:  # noqa: ANN001
    tokenizer, encode_turns = encode
    messages = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "first " * 40 + "the end: 1 + 1?"},
        {"role": "assistant", "content": "It is 2."},
    ]
    (row,) = over_length.truncate_prompt(messages, [True], 60, encode_turns, tokenizer)
    assert len(row["input_ids"]) <= 60
    assert "Be brief." in text(tokenizer, row) and "the end: 1 + 1?" in text(tokenizer, row)
    assert learned(tokenizer, row) == "It is 2.<|im_end|>"
    assert over_length.truncate_prompt(messages, [True], 20, encode_turns, tokenizer) == []


def dialogue(turns: int) -> list[dict]:
    messages = [{"role": "system", "content": "Help."}]
    for turn in range(turns):
        messages += [{"role": "user", "content": f"question {turn}"}, {"role": "assistant", "content": f"answer {turn}"}]
    return messages


def test_split_turns_trains_every_turn_once_with_context(encode) -> None:  # noqa: ANN001
    tokenizer, encode_turns = encode
    messages, train = dialogue(12), [True] * 12
    whole = len(encode_turns(messages, train)["input_ids"])
    limit = whole // 2
    rows, too_long = over_length.split_turns(messages, train, limit, encode_turns)
    assert too_long == 0 and len(rows) >= 2
    assert all(len(row["input_ids"]) <= limit for row in rows)
    everything = "".join(learned(tokenizer, row) for row in rows)
    assert everything == "".join(f"answer {turn}<|im_end|>" for turn in range(12))
    for row in rows[1:]:
        assert text(tokenizer, row).startswith("<|im_start|>system\nHelp.")
        before = text(tokenizer, row).split(learned(tokenizer, row).split("<|im_end|>")[0])[0]
        assert "answer" in before, "a later part begins with turns that are context"


def test_split_turns_keeps_untrained_turns_untrained_and_counts_what_never_fits(encode) -> None:  # noqa: ANN001
    tokenizer, encode_turns = encode
    messages = dialogue(6)
    messages[6]["content"] = "long " * 200
    rows, too_long = over_length.split_turns(messages, [True, False, True, True, True, True], 120, encode_turns)
    assert too_long == 1
    assert "".join(learned(tokenizer, row) for row in rows) == "".join(f"answer {turn}<|im_end|>" for turn in (0, 3, 4, 5))
