"""Tokenizers in GGUF: the pre-tokenizer recognised, and llama.cpp's own tokens equal to the tokenizer's."""

import json
import shutil
from pathlib import Path

import pytest
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from tokenizers.pre_tokenizers import ByteLevel, Digits, Sequence, Split

from merge import MergeError
from merge.gguf import to_gguf
from merge.gguf_pretokenizer import _CASED_LETTERS, _HAN_HANGUL, PROBES
from merge.gguf_tokenizer import BYTE, CONTROL, UNUSED, USER_DEFINED, portable_template, read_tokenizer

LLAMA3 = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
NO_REGEX = ByteLevel(add_prefix_space=False, use_regex=False)


def isolated(*expressions: str) -> list[Split]:
    return [Split(Regex(expression), "isolated") for expression in expressions]


# As these models' tokenizer.json files write them, which is not how llama.cpp does.
PUBLISHED = {
    "gpt-2": ByteLevel(add_prefix_space=False),
    "smollm": Sequence([Digits(individual_digits=True), ByteLevel(add_prefix_space=False)]),
    "smaug-bpe": Sequence([*isolated(LLAMA3), NO_REGEX]),
    "qwen2": Sequence([*isolated(LLAMA3.replace("{1,3}", "")), NO_REGEX]),
    "deepseek-llm": Sequence(
        [
            *isolated(
                "[\r\n]", rf"\s?[{_CASED_LETTERS}]+", "\\s?[!-/:-~！-／：-～‘-‟\u3000-。]+", r"\s+$", _HAN_HANGUL
            ),
            Digits(individual_digits=True),
            NO_REGEX,
        ]
    ),
    "deepseek-coder": Sequence(
        [*isolated("[\r\n]", r"\s?\p{L}+", r"\s?\p{P}+", _HAN_HANGUL), Digits(individual_digits=True), NO_REGEX]
    ),
}


def train(folder: Path, pretokenizer: pre_tokenizers.PreTokenizer, ignore_merges: bool = False) -> Path:
    """A ByteLevel BPE tokenizer trained on the probes, in tokenizer.json and tokenizer_config.json."""
    tokenizer = Tokenizer(models.BPE(ignore_merges=ignore_merges))
    tokenizer.pre_tokenizer = pretokenizer
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=700, special_tokens=["<s>", "</s>"], initial_alphabet=ByteLevel.alphabet(), show_progress=False
    )
    tokenizer.train_from_iterator(PROBES * 3, trainer)
    folder.mkdir(exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    save_json(folder / "tokenizer_config.json", {"bos_token": "<s>", "eos_token": "</s>"})
    return folder


def save_json(file: Path, value: dict) -> None:
    file.write_text(json.dumps(value), encoding="utf-8")


def edit_json(file: Path, **changes: object) -> None:
    save_json(file, json.loads(file.read_text(encoding="utf-8")) | changes)


@pytest.mark.parametrize("name", list(PUBLISHED))
def test_published_pretokenizers_are_recognised(tmp_path: Path, name: str) -> None:
    tokenizer = read_tokenizer([train(tmp_path / "t", PUBLISHED[name])], 800)
    assert tokenizer.vocabulary.pre == name


def test_llama_3_is_told_by_ignore_merges(tmp_path: Path) -> None:
    folder = train(tmp_path / "t", PUBLISHED["smaug-bpe"], ignore_merges=True)
    assert read_tokenizer([folder], 800).vocabulary.pre == "llama-bpe"


def test_an_unknown_pretokenizer_is_refused_and_can_be_named(tmp_path: Path) -> None:
    folder = train(tmp_path / "t", Sequence([*isolated(r"\p{Lu}", r"[aeiou]+"), NO_REGEX]))
    with pytest.raises(MergeError, match="pass it as pretokenizer='NAME'"):
        read_tokenizer([folder], 800)
    assert read_tokenizer([folder], 800, "my-own").vocabulary.pre == "my-own"
    with pytest.raises(MergeError, match="pretokenizer='gpt-2' cuts text otherwise"):
        read_tokenizer([folder], 800, "gpt-2")


def test_a_normalizer_that_llama_cpp_lacks_is_refused(tmp_path: Path) -> None:
    folder = train(tmp_path / "t", PUBLISHED["gpt-2"])
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.save(str(folder / "tokenizer.json"))
    with pytest.raises(MergeError, match="normalizer .*Lowercase"):
        read_tokenizer([folder], 800)
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.save(str(folder / "tokenizer.json"))
    assert read_tokenizer([folder], 800).vocabulary.pre == "gpt-2"


def test_tokens_fill_the_embedding_and_may_not_overflow_it(tmp_path: Path) -> None:
    folder = train(tmp_path / "t", PUBLISHED["smollm"])
    size = Tokenizer.from_file(str(folder / "tokenizer.json")).get_vocab_size()
    vocabulary = read_tokenizer([folder], size + 3).vocabulary
    assert len(vocabulary.tokens) == len(vocabulary.types) == size + 3
    assert vocabulary.tokens[size:] == [f"[PAD{size + i}]" for i in range(3)]
    assert vocabulary.types[size:] == [UNUSED] * 3 and vocabulary.types[:2] == [CONTROL] * 2
    with pytest.raises(MergeError, match=f"token id {size - 1}, but the embedding has {size - 1} rows"):
        read_tokenizer([folder], size - 1)


def test_added_tokens_are_control_or_user_defined(tmp_path: Path) -> None:
    folder = train(tmp_path / "t", PUBLISHED["smollm"])
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    tokenizer.add_tokens(
        ["<hint>", "<|end_of_turn|>"]
    )  # ordinary added tokens, the second with a control token's looks
    tokenizer.save(str(folder / "tokenizer.json"))
    vocabulary = read_tokenizer([folder], 800).vocabulary
    assert vocabulary.types[vocabulary.tokens.index("<hint>")] == USER_DEFINED
    assert vocabulary.types[vocabulary.tokens.index("<|end_of_turn|>")] == CONTROL


def test_stop_tokens_come_from_every_file(tmp_path: Path) -> None:
    folder = train(tmp_path / "t", PUBLISHED["smollm"])
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    tokenizer.add_special_tokens(["<turn>", "<call>", "<more>"])
    tokenizer.save(str(folder / "tokenizer.json"))
    ids = [tokenizer.token_to_id(text) for text in ("</s>", "<turn>", "<call>", "<more>")]
    save_json(folder / "generation_config.json", {"eos_token_id": ids[:2]})
    save_json(folder / "config.json", {"eos_token_id": ids[0:3:2]})
    read = read_tokenizer([folder], 800)
    assert read.stops == ["</s>", "<turn>", "<call>"]
    assert (read.special["eos"], read.special["eot"], read.special["eom"]) == tuple(ids[:3])
    save_json(folder / "generation_config.json", {"eos_token_id": ids})
    with pytest.raises(MergeError, match="a GGUF holds eos and two more"):
        read_tokenizer([folder], 800)


def test_a_tokenizer_without_eos_or_with_a_foreign_one_is_refused(tmp_path: Path) -> None:
    folder = train(tmp_path / "t", PUBLISHED["smollm"])
    save_json(folder / "tokenizer_config.json", {})
    with pytest.raises(MergeError, match="would never stop"):
        read_tokenizer([folder], 800)
    save_json(folder / "tokenizer_config.json", {"eos_token": {"content": "<end>"}})
    with pytest.raises(MergeError, match="eos_token '<end>' is not in the vocabulary"):
        read_tokenizer([folder], 800)


def test_no_tokenizer_at_all_is_refused_before_work_starts(tiny_model: Path, tmp_path: Path) -> None:
    shutil.copytree(tiny_model, tmp_path / "model", ignore=shutil.ignore_patterns("tokenizer*"))
    with pytest.raises(MergeError, match="no tokenizer.json and no tokenizer.model"):
        to_gguf(tmp_path / "model", tmp_path / "out.gguf", "F16")


@pytest.mark.parametrize("configured", [None, True, False])
def test_bos_is_added_where_the_tokenizer_or_its_settings_say_so(tmp_path: Path, configured: bool | None) -> None:
    from tokenizers.processors import TemplateProcessing

    folder = train(tmp_path / "t", PUBLISHED["smollm"])
    assert read_tokenizer([folder], 800).add_bos is False
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    tokenizer.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    tokenizer.save(str(folder / "tokenizer.json"))
    if configured is not None:
        edit_json(folder / "tokenizer_config.json", add_bos_token=configured)
    assert read_tokenizer([folder], 800).add_bos is (configured is not False)


def test_an_adapter_s_tokenizer_and_template_win(tmp_path: Path) -> None:
    model, adapter = train(tmp_path / "m", PUBLISHED["smollm"]), tmp_path / "a"
    (model / "chat_template.jinja").write_text("model")
    adapter.mkdir()
    assert read_tokenizer([adapter, model], 800).chat_template == "model"
    train(adapter, PUBLISHED["gpt-2"])
    read = read_tokenizer([adapter, model], 800)
    assert (read.vocabulary.pre, read.chat_template) == ("gpt-2", "model")
    (adapter / "chat_template.jinja").write_text("adapter")
    assert read_tokenizer([adapter, model], 800).chat_template == "adapter"


def test_generation_tags_leave_the_template_without_a_trace_in_what_it_renders() -> None:
    from transformers.utils.chat_template_utils import render_jinja_template

    source = (
        "{% for m in messages %}\n  {%- if m.role == 'assistant' %}\n{{ 'A: ' }}{% generation %}{{ m.content }}\n"
        "{%- endgeneration -%}\n  <end>\n{% else %}\n{{ m.content }}{% endif %}{% endfor %}"
    )
    chat = [[{"role": "user", "content": "q"}, {"role": "assistant", "content": "a "}]]
    portable = portable_template(source)
    assert "generation" not in portable
    assert render_jinja_template(chat, chat_template=portable) == render_jinja_template(chat, chat_template=source)


def sentencepiece_tokenizer(folder: Path) -> Path:
    """A Llama-2-like tokenizer.json: BPE over ▁-marked text with byte fallback."""
    tokenizer = Tokenizer(models.BPE(byte_fallback=True, fuse_unk=True, unk_token="<unk>"))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    special = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    trainer = trainers.BpeTrainer(vocab_size=600, special_tokens=special, show_progress=False, limit_alphabet=90)
    tokenizer.train_from_iterator(PROBES[:4] * 3, trainer)
    folder.mkdir(exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    spec = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))
    spec["added_tokens"] = spec["added_tokens"][:3]  # bytes are tokens of the model, not added ones
    save_json(folder / "tokenizer.json", spec)
    save_json(folder / "tokenizer_config.json", {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"})
    return folder


@pytest.mark.parametrize("kind", ["smollm", "gpt-2", "qwen2", "deepseek-llm", "deepseek-coder", "sentencepiece"])
def test_llama_cpp_cuts_text_as_the_tokenizer_does(tiny_model: Path, tmp_path: Path, kind: str) -> None:
    llama_cpp = pytest.importorskip("llama_cpp")
    folder = tmp_path / "model"
    shutil.copytree(tiny_model, folder)
    if kind == "sentencepiece":
        sentencepiece_tokenizer(folder)
    else:
        train(folder, PUBLISHED[kind])
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    resize(folder, tokenizer.get_vocab_size() + 5)
    model = llama_cpp.Llama(str(to_gguf(folder, tmp_path / "out.gguf", "F16")), vocab_only=True, verbose=False)
    texts = [*PROBES, "</s>12 x", "a  3\n\n   4x", "é" * 40]
    for text in texts:
        expected = tokenizer.encode(text, add_special_tokens=False).ids
        assert model.tokenize(text.encode(), add_bos=False, special=True) == expected, text
    if kind == "sentencepiece":
        read = read_tokenizer([folder], tokenizer.get_vocab_size())
        assert read.vocabulary.model == "llama" and read.vocabulary.types.count(BYTE) == 256
    model.close()


def resize(folder: Path, rows: int) -> None:
    """Give a model folder embeddings of so many rows."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig.from_pretrained(folder)
    config.vocab_size = rows
    LlamaForCausalLM(config).save_pretrained(folder)
