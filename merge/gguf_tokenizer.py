"""A Hugging Face tokenizer as GGUF metadata: tokens, merges or scores, special tokens, chat template.

Two kinds: ByteLevel BPE (llama.cpp's "gpt2": DeepSeek, SmolLM2, Llama 3, Qwen2) and SentencePiece BPE with byte
fallback (llama.cpp's "llama": Llama 1 and 2), from tokenizer.json or, where that is absent, from tokenizer.model.
The metadata keys and token types are those that llama.cpp's convert_hf_to_gguf.py writes.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from merge.checkpoint import read_json
from merge.errors import MergeError
from merge.gguf_pretokenizer import PRETOKENIZERS, recognize, same_tokens

if TYPE_CHECKING:
    from gguf import GGUFWriter
    from tokenizers import Tokenizer

# gguf.TokenType, repeated here so that this module imports without gguf.
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = 1, 2, 3, 4, 5, 6

# Texts at which llama.cpp itself ends a generation, whatever the metadata says (llama-vocab.cpp, special_eog_ids).
_KNOWN_STOPS = frozenset(
    "<|eot_id|> <|im_end|> <|end|> <|return|> <|call|> <end_of_turn> <|endoftext|> </s> <|eom_id|> <EOT> _<EOT> "
    "<|end_of_text|> <eos> <｜end▁of▁sentence｜>".split()
)

_GENERATION_TAG = re.compile(r"\{%([-+]?)\s*(end)?generation\s*([-+]?)%\}")


@dataclass(frozen=True)
class Vocabulary:
    """Tokens by id, one for each row of the embedding, and how text is cut into them."""

    model: str
    """"gpt2" (ByteLevel BPE) or "llama" (SentencePiece BPE)."""
    pre: str
    """llama.cpp's name of the pre-tokenizer."""
    tokens: list[str]
    types: list[int]
    before: list[int]
    """Ids that the tokenizer puts before a text by itself: the BOS, or nothing."""
    after: list[int]
    merges: list[str] = field(default_factory=list)
    scores: list[float] = field(default_factory=list)
    add_space_prefix: bool = False


@dataclass(frozen=True)
class GgufTokenizer:
    """All that a GGUF says of its tokenizer."""

    vocabulary: Vocabulary
    special: dict[str, int]
    """bos, eos, unk, pad, eot, eom -> token id, where there is one. eos there always is."""
    stops: list[str]
    """Texts of the tokens at which a generation ends, eos first."""
    add_bos: bool
    add_eos: bool
    chat_template: str | None

    def write(self, writer: GGUFWriter) -> None:
        """Add every key to a GGUF that is being written."""
        vocabulary = self.vocabulary
        writer.add_tokenizer_model(vocabulary.model)
        writer.add_tokenizer_pre(vocabulary.pre)
        writer.add_add_space_prefix(vocabulary.add_space_prefix)
        writer.add_token_list(vocabulary.tokens)
        writer.add_token_scores(vocabulary.scores)
        writer.add_token_types(vocabulary.types)
        writer.add_token_merges(vocabulary.merges)
        add_id = {
            "bos": writer.add_bos_token_id,
            "eos": writer.add_eos_token_id,
            "unk": writer.add_unk_token_id,
            "pad": writer.add_pad_token_id,
            "eot": writer.add_eot_token_id,
            "eom": writer.add_eom_token_id,
        }
        for name, token_id in self.special.items():
            add_id[name](token_id)
        # Always written: left out, llama.cpp's default differs from one pre-tokenizer to the next.
        writer.add_add_bos_token(self.add_bos)
        writer.add_add_eos_token(self.add_eos)
        if self.chat_template is not None:
            writer.add_chat_template(self.chat_template)


def read_tokenizer(folders: Sequence[Path], rows: int, pretokenizer: str | None = None) -> GgufTokenizer:
    """Read a tokenizer and its chat template from the first of the folders that has one.

    folders: adapters, the last trained first, then the model (config.json and generation_config.json are taken from
    there). rows: rows of the embedding; the vocabulary is filled up to it with unused tokens. pretokenizer: llama.cpp's
    name, for a tokenizer whose pre-tokenizer is not recognised.
    Raises MergeError for a missing or unknown tokenizer, more tokens than rows, or no end-of-sequence token.
    """
    home = _home(folders)
    settings = _optional_json(home / "tokenizer_config.json")
    if (home / "tokenizer.json").is_file():
        vocabulary = _from_json(home / "tokenizer.json", rows, pretokenizer)
    else:
        vocabulary = _from_sentencepiece(home / "tokenizer.model", settings, rows)
    special, stops = _special_tokens(home, folders[-1], settings, vocabulary)
    template = read_chat_template(folders)
    return GgufTokenizer(
        vocabulary,
        special,
        stops,
        # The configured flag wins over tokenizer.json, as in transformers.
        add_bos=bool(settings.get("add_bos_token", special.get("bos") in vocabulary.before)),
        add_eos=bool(settings.get("add_eos_token", special["eos"] in vocabulary.after)),
        chat_template=None if template is None else portable_template(template),
    )


def _home(folders: Sequence[Path]) -> Path:
    """The first folder with a tokenizer."""
    for folder in folders:
        if (folder / "tokenizer.json").is_file() or (folder / "tokenizer.model").is_file():
            return folder
    raise MergeError(
        f"{folders[-1]}: no tokenizer.json and no tokenizer.model; a served model needs its tokenizer, so copy the "
        "tokenizer's files into the folder."
    )


def _optional_json(file: Path) -> dict[str, Any]:
    return read_json(file) if file.is_file() else {}


def _fill(tokens: dict[int, tuple[str, int]], rows: int, source: Path) -> tuple[list[str], list[int]]:
    """Texts and types in the order of their ids; ids without a token become unused ones, named as llama.cpp names
    them."""
    if max(tokens) >= rows:
        raise MergeError(
            f"{source} has token id {max(tokens)}, but the embedding has {rows} rows; expected every id below that. "
            "Resize the embedding (resize_token_embeddings), or export with the tokenizer the model was trained with."
        )
    filled = [tokens.get(index, (f"[PAD{index}]", UNUSED)) for index in range(rows)]
    return [text for text, _ in filled], [kind for _, kind in filled]


def _looks_special(text: str) -> bool:
    """Some models mark control tokens as ordinary added ones (deepseek-coder); their looks tell, as in llama.cpp."""
    return text in ("<pad>", "<mask>") or re.fullmatch(r"<\|.*\|>|<｜.*｜>", text) is not None


def _from_json(file: Path, rows: int, pretokenizer: str | None) -> Vocabulary:
    from tokenizers import Tokenizer

    spec = read_json(file)
    model = spec["model"]
    if model.get("type") != "BPE":
        raise MergeError(
            f"{file}: the tokenizer's model is {model.get('type')!r}; expected BPE (ByteLevel, or SentencePiece with "
            "byte fallback)."
        )
    tokenizer = Tokenizer.from_file(str(file))
    plain, whole = (tokenizer.encode("a", add_special_tokens=flag).ids for flag in (False, True))
    start = next(i for i in range(len(whole)) if whole[i : i + len(plain)] == plain)
    before, after = whole[:start], whole[start + len(plain) :]
    pairs = [pair.split(" ") if isinstance(pair, str) else pair for pair in model["merges"]]
    sentencepiece = bool(model.get("byte_fallback"))

    tokens = {index: (text, NORMAL) for text, index in model["vocab"].items()}
    if sentencepiece:
        tokens |= {i: (text, BYTE) for i, (text, _) in tokens.items() if re.fullmatch("<0x[0-9A-F]{2}>", text)}
    for added in spec.get("added_tokens", []):
        control = added["special"] or _looks_special(added["content"])
        text = added["content"] if control else added["content"].replace("▁", " ")
        tokens[added["id"]] = (text, CONTROL if control else USER_DEFINED)
    if sentencepiece and model.get("unk_token") in model["vocab"]:
        tokens[model["vocab"][model["unk_token"]]] = (model["unk_token"], UNKNOWN)
    texts, types = _fill(tokens, rows, file)

    if sentencepiece:
        # llama.cpp merges the pair whose result scores highest, the tokenizer the pair whose merge comes first.
        rank: dict[str, int] = {}
        for left, right in pairs:
            rank.setdefault(left + right, len(rank))
        scores = [-1e6 if kind in (NORMAL, USER_DEFINED) else 0.0 for kind in types]
        for text, place in rank.items():
            scores[model["vocab"][text]] = -float(place)
        prefix = tokenizer.encode("a", add_special_tokens=False).tokens[0].startswith("▁")
        return Vocabulary("llama", "default", texts, types, before, after, scores=scores, add_space_prefix=prefix)

    pre = _pretokenizer_name(file, spec, tokenizer, pretokenizer)
    return Vocabulary("gpt2", pre, texts, types, before, after, [" ".join(pair) for pair in pairs])


def _pretokenizer_name(file: Path, spec: dict[str, Any], tokenizer: Tokenizer, named: str | None) -> str:
    """Recognise the pre-tokenizer, or check the one that the user named."""
    normalizer = spec.get("normalizer") or {}
    kinds = [part["type"] for part in normalizer.get("normalizers", [normalizer]) if part]
    # llama.cpp normalises nothing. NFC leaves ordinary text as it is, and llama.cpp's converter lets it pass (Qwen2).
    if any(kind != "NFC" for kind in kinds):
        raise MergeError(f"{file}: normalizer {kinds} has no counterpart in llama.cpp; expected none, or NFC.")
    if named is None:
        return recognize(tokenizer, bool(spec["model"].get("ignore_merges")), str(file))
    if named in PRETOKENIZERS and not same_tokens(tokenizer, named):
        raise MergeError(
            f"{file}: pretokenizer={named!r} cuts text otherwise than this tokenizer does; leave pretokenizer out to "
            "have it recognised."
        )
    return named


def _from_sentencepiece(file: Path, settings: dict[str, Any], rows: int) -> Vocabulary:
    try:
        from sentencepiece import SentencePieceProcessor
    except ImportError:
        raise MergeError(
            f"{file}: reading it needs the sentencepiece package (pip install sentencepiece), or a tokenizer.json."
        ) from None
    model = SentencePieceProcessor(model_file=str(file))
    tokens, scores = {}, [-10000.0] * rows
    for index in range(model.vocab_size()):
        kind = NORMAL
        if model.IsUnknown(index):
            kind = UNKNOWN
        elif model.IsControl(index):
            kind = CONTROL
        elif model.IsUnused(index):
            kind = UNUSED
        elif model.IsByte(index):
            kind = BYTE
        tokens[index] = (model.IdToPiece(index), kind)
    added = {text: int(index) for text, index in _optional_json(file.with_name("added_tokens.json")).items()}
    added |= {entry["content"]: int(index) for index, entry in settings.get("added_tokens_decoder", {}).items()}
    for text, index in added.items():
        if index >= model.vocab_size():
            tokens[index] = (text, CONTROL if _looks_special(text) else USER_DEFINED)
    texts, types = _fill(tokens, rows, file)
    for index in range(model.vocab_size()):
        scores[index] = model.GetScore(index)
    # Without tokenizer.json, transformers' Llama tokenizer puts BOS before a text and nothing after it.
    return Vocabulary("llama", "default", texts, types, [model.bos_id()], [], scores=scores, add_space_prefix=True)


def _special_tokens(
    folder: Path, model_folder: Path, settings: dict[str, Any], vocabulary: Vocabulary
) -> tuple[dict[str, int], list[str]]:
    """Ids of the special tokens (tokenizer_config.json, else config.json) and the texts of all stop tokens."""
    config = _optional_json(model_folder / "config.json")
    ids = {text: index for index, text in enumerate(vocabulary.tokens)}
    special: dict[str, int] = {}
    for name in ("bos", "eos", "unk", "pad"):
        entry = settings.get(f"{name}_token")
        text = entry.get("content") if isinstance(entry, dict) else entry
        if text is not None:
            if text not in ids:
                raise MergeError(
                    f"{folder}/tokenizer_config.json: {name}_token {text!r} is not in the vocabulary; correct it."
                )
            special[name] = ids[text]
        elif name not in special and config.get(f"{name}_token_id") is not None:
            special[name] = _as_list(config[f"{name}_token_id"])[0]
    if "eos" not in special:
        raise MergeError(
            f"{folder}: neither tokenizer_config.json (eos_token) nor config.json (eos_token_id) names the token that "
            "ends an answer, so the served model would never stop; name it."
        )
    generation = _optional_json(model_folder / "generation_config.json")
    stop_ids = [special["eos"], *_as_list(generation.get("eos_token_id")), *_as_list(config.get("eos_token_id"))]
    outside = [index for index in stop_ids if not 0 <= index < len(vocabulary.tokens)]
    if outside:
        raise MergeError(
            f"{model_folder}: eos_token_id {outside[0]} is not among the {len(vocabulary.tokens)} tokens; correct it."
        )
    stops = list(dict.fromkeys(vocabulary.tokens[index] for index in stop_ids))
    # llama.cpp has room for two further stop tokens, and knows the usual ones by their texts.
    further = sorted(stops[1:], key=lambda text: text in _KNOWN_STOPS)
    if sum(text not in _KNOWN_STOPS for text in further) > 2:
        raise MergeError(
            f"{model_folder}: stop tokens {stops}: a GGUF holds eos and two more; shorten generation_config.json's "
            "list."
        )
    special |= {name: ids[text] for name, text in zip(("eot", "eom"), further, strict=False)}
    return special, stops


def _as_list(value: int | list[int] | None) -> list[int]:
    if value is None:
        return []
    return value if isinstance(value, list) else [value]


def read_chat_template(folders: Sequence[Path]) -> str | None:
    """The chat template that training used: the tokenizer's folder's own, else the first chat_template.jinja."""
    for folder in (_home(folders), *folders):
        file = folder / "chat_template.jinja"
        if file.is_file():
            return file.read_text(encoding="utf-8")
        template = _optional_json(folder / "tokenizer_config.json").get("chat_template")
        if isinstance(template, list):
            named = {entry["name"]: entry["template"] for entry in template}
            if "default" not in named:
                raise MergeError(
                    f"{folder}/tokenizer_config.json: chat templates {list(named)}, none called 'default'; name one so."
                )
            return named["default"]
        if template is not None:
            return template
    return None


def portable_template(template: str) -> str:
    """A chat template without transformers' {% generation %} tags, which other Jinja engines do not know."""
    # An `if` that is always true takes each tag's place, so that its effect on the white space around it stays.
    return _GENERATION_TAG.sub(lambda m: f"{{%{m[1]} {'endif' if m[2] else 'if true'} {m[3]}%}}", template)
