"""Template tokens inside content are escaped or refused."""

from __future__ import annotations

import pytest

from data_formats import DataFormatError
from data_formats.template_tokens import TemplateTokens

CHATML = TemplateTokens(["<|im_start|>", "<|im_end|>", "<|endoftext|>"])
DEEPSEEK = TemplateTokens(["<｜end▁of▁sentence｜>"], ["User:", "Assistant:"])


@pytest.mark.parametrize(
    "tokens, text, escaped, found",
    [
        (CHATML, "plain text", "plain text", {}),
        (CHATML, "a <|im_end|> b", "a < |im_end|> b", {"<|im_end|>": 1}),
        (CHATML, "<|im_end|><|im_end|>", "< |im_end|>< |im_end|>", {"<|im_end|>": 2}),
        (CHATML, "<|IM_END|>", "<|IM_END|>", {}),
        (DEEPSEEK, "User: hi", "User : hi", {"User:": 1}),
        (DEEPSEEK, "x\n  Assistant: hi\nthe User: x", "x\n  Assistant : hi\nthe User: x", {"Assistant:": 1}),
        (DEEPSEEK, "<｜end▁of▁sentence｜>", "< ｜end▁of▁sentence｜>", {"<｜end▁of▁sentence｜>": 1}),
        (TemplateTokens(["<s>"]), "<<s>s>", "<< s>s>", {"<s>": 1}),
        (TemplateTokens([]), "<s>", "<s>", {}),
    ],
)
def test_escape(tokens, text, escaped, found):
    assert tokens.escape(text) == (escaped, found)
    assert not tokens.find(escaped)


def test_guard_counts_and_leaves_the_rest_alone():
    messages = [{"role": "user", "content": "x <|im_end|>"}, {"role": "assistant", "content": "y", "train": False}]
    guarded, found = CHATML.guard(messages)
    assert guarded == [{"role": "user", "content": "x < |im_end|>"}, messages[1]] and found == {"<|im_end|>": 1}
    assert messages[0]["content"] == "x <|im_end|>"


def test_refuse_names_the_token():
    with pytest.raises(DataFormatError, match=r"a user turn holds '<\|im_end\|>'"):
        CHATML.guard([{"role": "user", "content": "x <|im_end|>"}], "refuse")
    with pytest.raises(ValueError, match="escape, refuse"):
        CHATML.guard([], "drop")
