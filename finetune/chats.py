"""A chat as the model sees it: its text by the chat template, its tokens, and the loss mask on the trained turns."""

import re
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from jinja2 import TemplateError

from data_formats.template_tokens import TemplateTokens
from finetune.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Messages = list[dict[str, Any]]


class Rendered(NamedTuple):
    """A chat as text. spans: (start, end) of each trained turn and its EOS, in characters."""

    text: str
    spans: list[tuple[int, int]]


def render(tokenizer: "PreTrainedTokenizerBase", chats: Sequence[tuple[Messages, list[bool]]]) -> list[Rendered]:
    """Text and trained spans of each (messages, a flag for each assistant turn).

    A turn's span is what the template adds to the chat before it (ended by the generation prompt), cut after its EOS: what
    the model sees as a prompt when it is served is thus exactly what stands before the loss. A lone assistant turn is plain
    text for language modelling: no template, BOS where the tokenizer adds one, loss on all of the text and EOS.

    Many chats at a time are rendered much faster than one by one. Raises UserError where the template refuses a chat,
    rewrites earlier turns or does not end a turn with EOS.
    """
    eos = tokenizer.eos_token
    templated = [(messages, train) for messages, train in chats if not is_plain_text(messages)]
    turns = [[index for index, message in enumerate(messages) if message["role"] == "assistant"] for messages, _ in templated]
    befores = [messages[:turn] for (messages, _), places in zip(templated, turns, strict=True) for turn in places]
    afters = [messages[: turn + 1] for (messages, _), places in zip(templated, turns, strict=True) for turn in places]
    prompts = iter(apply_template(tokenizer, befores, generation_prompt=True))
    answered = iter(apply_template(tokenizer, afters))
    whole = iter(apply_template(tokenizer, [messages for messages, _ in templated if messages[-1]["role"] != "assistant"]))
    places_of = iter(turns)
    rendered = []
    for messages, train in chats:
        if is_plain_text(messages):
            first = tokenizer("a")["input_ids"][0]
            start = tokenizer.bos_token if first == tokenizer.bos_token_id else ""
            text = start + messages[0]["content"] + eos
            rendered.append(Rendered(text, [(len(start), len(text))] if train[0] else []))
            continue
        places = next(places_of)
        pieces = [(place, next(prompts), next(answered)) for place in places]
        text = pieces[-1][2] if messages[-1]["role"] == "assistant" else next(whole)
        spans = []
        for (place, before, after), trained in zip(pieces, train, strict=True):
            if not (text.startswith(after.rstrip()) and after.startswith(before)):
                raise UserError(
                    f"The chat template rewrites earlier turns: turn {place} is rendered as {after[-80:]!r}, the whole chat "
                    "has something else there. Set model.chat_template to a template that only appends."
                )
            end = after.rfind(eos)
            if end < len(before):
                raise UserError(
                    f"The chat template does not end an assistant turn with EOS ({eos}): {after[-80:]!r}. "
                    "The model would never learn to stop. Set model.chat_template to one that does."
                )
            if trained:
                spans.append((len(before), end + len(eos)))
        rendered.append(Rendered(text, spans))
    return rendered


def apply_template(tokenizer: "PreTrainedTokenizerBase", chats: list[Messages], generation_prompt: bool = False) -> list[str]:
    """The chats as the template writes them. Raises UserError with the template's own words where it refuses one."""
    if not chats:
        return []
    try:
        return tokenizer.apply_chat_template(chats, tokenize=False, add_generation_prompt=generation_prompt)
    except TemplateError as error:
        roles = sorted({message["role"] for chat in chats for message in chat})
        raise UserError(
            f"The chat template refuses a chat ({error}); the roles in the data are {', '.join(roles)}. "
            "Set model.chat_template to a template that knows them."
        ) from error


def is_plain_text(messages: Messages) -> bool:
    """Whether this is a text for language modelling: an assistant turn with nothing before it, as the format `text` gives."""
    return len(messages) == 1 and messages[0]["role"] == "assistant"


def encode(tokenizer: "PreTrainedTokenizerBase", messages: Messages, train: list[bool]) -> dict[str, list[int]]:
    """input_ids and labels of a chat: labels are the ids on each trained assistant turn and its EOS, -100 elsewhere.

    Raises UserError as `render` does.
    """
    text, spans = render(tokenizer, [(messages, train)])[0]
    encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    labels = [-100] * len(encoded["input_ids"])
    for index, (start, end) in enumerate(encoded["offset_mapping"]):
        if any(first <= start and end <= last for first, last in spans) and end > start:
            labels[index] = encoded["input_ids"][index]
    return {"input_ids": encoded["input_ids"], "labels": labels}


def segments(tokenizer: "PreTrainedTokenizerBase", row: dict[str, Any]) -> list[tuple[str, bool]]:
    """A row of input_ids and labels as text: (text, whether it is learned) of each run of tokens."""
    runs: list[tuple[list[int], bool]] = []
    for token, label in zip(row["input_ids"], row["labels"], strict=True):
        learned = label != -100
        if not runs or runs[-1][1] != learned:
            runs.append(([], learned))
        runs[-1][0].append(token)
    return [(tokenizer.decode(ids), learned) for ids, learned in runs]


# -- what the template writes itself ----------------------------------------------------------------------------------

_PLACES = ("\x02system\x02", "\x02question\x02", "\x02answer\x02", "\x02more\x02", "\x02end\x02")
_BRACKETED = re.compile(r"<<?[^\s<>]+>>?|\[/?[A-Z_]+\]")
_SPEAKER = re.compile(r"(?:^|\n)[ \t]*([^\W\d_][\w ]{0,30}:|#+ ?\w[\w ]{0,30}:)[ \t\n]*$")


def template_tokens(tokenizer: "PreTrainedTokenizerBase") -> TemplateTokens:
    """What must not stand in content: the tokenizer's special tokens, and what the chat template writes around turns.

    The latter is found by rendering a chat with known contents: bracketed words ([INST], <<SYS>>) anywhere, and speakers
    ("User:") at the start of a line.
    """
    system, question, answer, more, end = _PLACES
    turns = [
        {"role": role, "content": content}
        for role, content in (("system", system), ("user", question), ("assistant", answer), ("user", more), ("assistant", end))
    ]
    try:
        text = tokenizer.apply_chat_template(turns, tokenize=False)
    except TemplateError:  # a template without system turns
        text = tokenizer.apply_chat_template(turns[1:], tokenize=False)
    special = {token.content for token in tokenizer.added_tokens_decoder.values() if token.special} | set(tokenizer.all_special_tokens)
    between = re.split("|".join(map(re.escape, _PLACES)), text)
    speakers = {match[1] for piece in between if (match := _SPEAKER.search(piece))}
    bracketed = {found for piece in between for found in _BRACKETED.findall(piece)}
    return TemplateTokens(special | bracketed, speakers)
