"""Which of llama.cpp's pre-tokenizers a ByteLevel BPE tokenizer has, found out by trying them.

llama.cpp does not read a tokenizer's own pre-tokenizer: the GGUF names one (`tokenizer.ggml.pre`) and llama.cpp has its
regular expressions built in. A wrong name gives wrong tokens and no error. llama.cpp's converter looks a hash of one
probe text up in a table of known models; here the tokenizer's own pre-tokenizer and llama.cpp's expressions both split
the probe texts, so a fine-tuned, resized or newly trained tokenizer is recognised too, and the name is proved.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from merge.errors import MergeError

if TYPE_CHECKING:
    from tokenizers import Tokenizer
    from tokenizers.pre_tokenizers import PreTokenizer

_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)"
_CONTRACTIONS = r"(?:'[sS]|'[tT]|'[rR][eE]|'[vV][eE]|'[mM]|'[lL][lL]|'[dD])"
_TAIL = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_LLAMA3 = _CONTRACTIONS + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}" + _TAIL
_QWEN2 = _CONTRACTIONS + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}" + _TAIL
_CASED_LETTERS = (
    "A-Za-zµÀ-ÖØ-öø-ƺƼ-ƿǄ-ʓʕ-ʯͰ-ͳͶͷͻ-ͽͿΆΈ-ΊΌΎ-ΡΣ-ϵϷ-ҁҊ-ԯԱ-ՖႠ-ჅᎠ-Ᏽᏸ-ᏽᲐ-ᲺᲽ-Ჿᴀ-ᴫᵫ-ᵷᵹ-ᶚḀ-ἕ"
    "Ἐ-Ἕἠ-ὅὈ-Ὅὐ-ὗὙὛὝὟ-ώᾀ-ᾴᾶ-ᾼιῂ-ῄῆ-ῌῐ-ΐῖ-Ίῠ-Ῥῲ-ῴῶ-ῼℂℇℊ-ℓℕℙ-ℝℤΩℨK-ℭℯ-ℴℹℼ-ℿⅅ-ⅉⅎↃↄⰀ-ⱻⱾ-ⳤ"
    "Ⳬ-ⳮⳲⳳꙀ-ꙭꚀ-ꚛꜢ-ꝯꝱ-ꞇꞋ-ꞎꭰ-ꮿﬀ-ﬆﬓ-ﬗＡ-Ｚａ-ｚ𐐀-𐑏𐒰-𐓓𐓘-𐓻𐲀-𐲲𐳀-𐳲𑢠-𑣟𞤀-𞥃"
)
_HAN_HANGUL = "[一-龥ࠀ-一가-\ud7ff]+"

PRETOKENIZERS: dict[str, tuple[list[str], bool]] = {
    "gpt-2": ([_GPT2], False),
    "smollm": ([r"\p{N}", _GPT2], False),
    "llama-bpe": ([_LLAMA3], True),
    "smaug-bpe": ([_LLAMA3], False),
    "qwen2": ([_QWEN2], False),
    "deepseek-llm": (
        [r"[\r\n]", rf"\s?[{_CASED_LETTERS}]+", r"\s?[!-/:-~！-／：-～‘-‟\u3000-。]+", r"\s+$", _HAN_HANGUL, r"\p{N}+"],
        False,
    ),
    "deepseek-coder": ([r"[\r\n]", r"\s?\p{L}+", r"\s?\p{P}+", _HAN_HANGUL, r"\p{N}"], False),
    "deepseek-v3": (
        [
            r"\p{N}{1,3}",
            "[一-龥\u3040-ゟ゠-ヿ]+",
            r"[!\"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+"
            r"| ?[\p{P}\p{S}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+",
        ],
        False,
    ),
    "default": ([r"[\p{P}\$\+<=>\^~\|]+", _GPT2, r"\p{N}+", r"[0-9][0-9][0-9]"], False),
}
"""llama.cpp's name -> the expressions that it splits by, one after the other, and whether a whole word that is a token
skips the merges (`ignore_merges`). What src/llama-vocab.cpp, llm_tokenizer_bpe, does. Names treated alike: once."""

PROBES = (
    "Natalia sold 48 clips in April, and then half as many in May. 48/2 = <<48/2=24>>24; 1,234.50 + 7 = 1241.5",
    "Let $x^{2} - 5x + 6 = 0$.\n\n\\boxed{2, 3}\n\n\n  Thus   x  =  3 \t\t or\r\n x = 2    ",
    "I'm sure you'll say it's HERE'S the 3rd; we've DON'T they'd 'RE 'tis he's!!! ??? ... --- ===",
    "def area(r):\n    # 3.14159 * r**2\n\treturn 22/7*r**2 if r>=0 else None  # {'a': [1, 2]}\n\n\n\n",
    "请通过逐步推理来解答问题，并把最终答案放置于\\boxed{}中。３＋４＝７ 答案：42。ひらがな カタカナ 한국어 12345678",
    "Ünïcödé naïve façade ΑΒΓ αβγ Привет мир עברית العربية हिन्दी ไทย 🚀 (normal) 😶\u200d🌫️ ½ ² Ⅷ ①",
    " leading space\u00a0nbsp  two  spaces 3 33 333 3333 33333\n 7\n  8\n\n   9",
    "'Quote' \"double\" `tick` ~a_b^c|d\\e @x #y %z &",
)
"""Texts on which two pre-tokenizers that differ in anything llama.cpp distinguishes also differ visibly."""


def recognize(tokenizer: Tokenizer, ignore_merges: bool, source: str) -> str:
    """llama.cpp's name for this tokenizer's pre-tokenizer.

    First the name whose expressions split every probe just so, then the one that gives the same tokens (deepseek-llm:
    llama.cpp keeps runs of digits together, the tokenizer does not, and no merge joins digits). source: the file to
    name in the message. Raises MergeError where no name fits.
    """
    own = tokenizer.pre_tokenizer
    candidates = [name for name, (_, ignores) in PRETOKENIZERS.items() if ignores == ignore_merges]
    if own is not None:
        for name in candidates:
            if all(_pieces(own, text) == _pieces(_build(name), text) for text in PROBES):
                return name
        for name in candidates:
            if same_tokens(tokenizer, name):
                return name
    raise MergeError(
        f"{source}: none of llama.cpp's pre-tokenizers known here splits text as this tokenizer's own does "
        f"(tried {', '.join(candidates)}). Find the name that llama.cpp gives this model (convert_hf_to_gguf.py, "
        "get_vocab_base_pre) and pass it as pretokenizer='NAME'."
    )


def same_tokens(tokenizer: Tokenizer, name: str) -> bool:
    """Whether the tokenizer with llama.cpp's expressions in place of its own gives the same tokens on every probe."""
    own = tokenizer.pre_tokenizer
    expected = [tokenizer.encode(text, add_special_tokens=False).ids for text in PROBES]
    tokenizer.pre_tokenizer = _build(name)
    try:
        return expected == [tokenizer.encode(text, add_special_tokens=False).ids for text in PROBES]
    finally:
        tokenizer.pre_tokenizer = own


def _build(name: str) -> PreTokenizer:
    from tokenizers import Regex
    from tokenizers.pre_tokenizers import ByteLevel, Sequence, Split

    splits = [Split(Regex(expression), "isolated") for expression in PRETOKENIZERS[name][0]]
    return Sequence([*splits, ByteLevel(add_prefix_space=False, use_regex=False)])


def _pieces(pretokenizer: PreTokenizer, text: str) -> list[str]:
    return [piece for piece, _ in pretokenizer.pre_tokenize_str(text)]
