"""The packaged chat templates render the models' own chat forms, learnable turn by turn."""

from pathlib import Path

import pytest
from transformers import AutoTokenizer

from finetune import data, models
from finetune.config import ModelConfig

CHAT = [
    {"role": "user", "content": "What is 1 + 1?"},
    {"role": "assistant", "content": "It is \\boxed{2}."},
    {"role": "user", "content": "And 2 + 2?"},
    {"role": "assistant", "content": "It is \\boxed{4}."},
]


def load(folder: Path, template: str):  # noqa: ANN201
    return models.load_tokenizer(folder, ModelConfig(path=str(folder), chat_template=template))


@pytest.mark.parametrize(
    ("template", "expected", "prompt"),
    [
        (
            "deepseek_math",
            "<|im_start|>User: What is 1 + 1?\n\nAssistant: It is \\boxed{2}.<|im_end|>User: And 2 + 2?\n\nAssistant: It is \\boxed{4}.<|im_end|>",
            "<|im_start|>User: What is 1 + 1?\n\nAssistant:",
        ),
        (
            "deepseek_r1",
            "<|im_start|><｜User｜>What is 1 + 1?<｜Assistant｜>It is \\boxed{2}.<|im_end|><｜User｜>And 2 + 2?<｜Assistant｜>It is \\boxed{4}.<|im_end|>",
            "<|im_start|><｜User｜>What is 1 + 1?<｜Assistant｜>",
        ),
    ],
)
def test_chat_form_and_what_is_learned(tiny_model: Path, template: str, expected: str, prompt: str) -> None:
    """BOS once, then the turns; the tiny tokenizer's BOS is <|im_start|> and its EOS <|im_end|>. Answers and their EOS are learned."""
    tokenizer = load(tiny_model, template)
    assert tokenizer.apply_chat_template(CHAT, tokenize=False) == expected
    assert tokenizer.apply_chat_template(CHAT[:1], tokenize=False, add_generation_prompt=True) == prompt
    row = data.encode(tokenizer, CHAT, [True, True])
    assert row["input_ids"].count(tokenizer.bos_token_id) == 1
    learned = tokenizer.decode([label for label in row["labels"] if label != -100])
    assert learned.split() == "It is \\boxed{2}.<|im_end|> It is \\boxed{4}.<|im_end|>".split() or learned == (
        "It is \\boxed{2}.<|im_end|>It is \\boxed{4}.<|im_end|>"
    )


def test_the_generation_block_covers_answer_and_eos(tiny_model: Path) -> None:
    """What TRL's assistant_only_loss would mask is what we learn."""
    tokenizer = load(tiny_model, "deepseek_math")
    rendered = tokenizer.apply_chat_template(CHAT, tokenize=True, return_dict=True, return_assistant_tokens_mask=True)
    masked = [token for token, inside in zip(rendered["input_ids"], rendered["assistant_masks"], strict=True) if inside]
    labels = [label for label in data.encode(tokenizer, CHAT, [True, True])["labels"] if label != -100]
    assert tokenizer.decode(masked).replace(" ", "") == tokenizer.decode(labels).replace(" ", "")
    assert masked[-1] == labels[-1] == tokenizer.eos_token_id


def test_the_tokenizer_goes_with_its_template(tiny_model: Path, tmp_path: Path) -> None:
    """Pain points 3 and 4: a template given for a base without one is saved with the adapter's tokenizer, and renders the same ids."""
    tokenizer = load(tiny_model, "deepseek_math")
    tokenizer.save_pretrained(tmp_path)
    again = AutoTokenizer.from_pretrained(tmp_path)
    assert models.encode_chat(again, CHAT[:3], add_generation_prompt=True) == models.encode_chat(tokenizer, CHAT[:3], add_generation_prompt=True)
