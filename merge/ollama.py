"""An Ollama Modelfile whose TEMPLATE is proved to render as the model's chat template does.

Ollama does not run Jinja: its TEMPLATE is a Go text/template. The chat template is probed for what it puts around each
role's text, the same is written as a Go template, and both render a set of chats. Any difference is refused: a prompt
that differs from training's by one space costs accuracy and shows no error.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from merge.checkpoint import read_json
from merge.errors import MergeError
from merge.gguf_tokenizer import GgufTokenizer, read_chat_template, read_tokenizer

Message = dict[str, str]
Render = Callable[[list[Message], bool], str]

_SAMPLING = {"temperature": "temperature", "top_p": "top_p", "top_k": "top_k", "min_p": "min_p"}

_SYSTEM = "You are a patient tutor.\nAsk before you tell."
_QUESTIONS = ("What is 3/4 of 20?", 'Why "15"?\n\nExplain {step} by {{step}}.', "¿Y 25%? 请解释。 \\boxed{5}")
_ANSWERS = ("Try a quarter first:\n20 / 4 = ?", "Good. <b>Now</b> three of them: 3 * 5 = 15.")


def _chat(turns: int, system: bool) -> list[Message]:
    """A chat that ends with the user's `turns`-th question."""
    chat = [{"role": "system", "content": _SYSTEM}] if system else []
    for index in range(turns):
        chat.append({"role": "user", "content": _QUESTIONS[index]})
        if index < turns - 1:
            chat.append({"role": "assistant", "content": _ANSWERS[index]})
    return chat


@dataclass(frozen=True)
class ChatFormat:
    """What a chat template puts around each text."""

    opening: str
    """Before the first message of a chat without a system message (a default system prompt, for instance)."""
    around: dict[str, tuple[str, str]]
    """role -> text before and after a message of that role. Without "system" where the template refuses or drops it."""
    generation: str
    """After the last message, where the answer begins."""

    def go_template(self) -> str:
        """The same as a Go text/template over Ollama's `.Messages`, without a trim marker, so every text stands as it is."""
        opening = (
            f'{{{{ if ne (index .Messages 0).Role "system" }}}}{self.opening}{{{{ end }}}}' if self.opening else ""
        )
        branches = [
            f'if eq .Role "{role}" }}}}{before}{{{{ .Content }}}}{after}'
            for role, (before, after) in self.around.items()
        ]
        return opening + "{{ range .Messages }}{{ " + "{{ else ".join(branches) + "{{ end }}{{ end }}" + self.generation


def modelfile(
    model_dir: str | Path, gguf_file: str | Path, *, adapter: str | Path | Sequence[str | Path] | None = None
) -> str:
    """The text of a Modelfile, to be saved beside gguf_file, which `to_gguf` made of model_dir (and adapter, if any).

    Sampling follows generation_config.json as transformers would: greedy unless do_sample is true, and no repeat penalty
    unless one is set (Ollama's defaults are temperature 0.8 and a penalty of 1.1, which hurts arithmetic).
    Raises MergeError where the chat template has no equal Go template, there is none, the GGUF has another one, or an
    assistant's turn does not end with a stop token.
    """
    model_dir, gguf_file = Path(model_dir), Path(gguf_file)
    adapters = [] if adapter is None else [adapter] if isinstance(adapter, str | Path) else list(adapter)
    folders = [Path(each) for each in reversed(adapters)] + [model_dir]
    source = read_chat_template(folders)
    if source is None:
        raise MergeError(
            f"{model_dir} has no chat template (chat_template.jinja), so a chat cannot be served; add one."
        )
    tokenizer, context = _check_gguf(gguf_file, folders)
    render = _renderer(source, tokenizer, model_dir)
    chat_format = read_chat_format(render, model_dir)
    template = chat_format.go_template()
    _prove(template, render, "system" in chat_format.around, model_dir)
    _check_stops(chat_format, tokenizer, model_dir)
    lines = [f"FROM ./{gguf_file.name}", f'TEMPLATE """{template}"""']
    lines += [f'PARAMETER stop "{stop}"' for stop in tokenizer.stops]
    lines += [f"PARAMETER {name} {value}" for name, value in _sampling(model_dir, context).items()]
    if "system" not in chat_format.around:
        lines.insert(0, "# The chat template takes no system message; Ollama leaves one out.")
    padded = [{"role": "user", "content": " 1 + 1 = ?\n"}]
    if render_go(template, padded) != render(padded, True):
        lines.insert(0, "# The chat template strips white space around a message; Ollama keeps it.")
    return "\n".join(lines) + "\n"


def _check_gguf(gguf_file: Path, folders: list[Path]) -> tuple[GgufTokenizer, int]:
    """The tokenizer, which the GGUF must share, and the context length in tokens."""
    import gguf

    if not gguf_file.is_file():
        raise MergeError(f"{gguf_file} does not exist; export it first with to_gguf.")
    fields = gguf.GGUFReader(gguf_file).fields
    rows, pre = fields["llama.vocab_size"].contents(), fields["tokenizer.ggml.pre"].contents()
    tokenizer = read_tokenizer(folders, rows, pre)
    inside = fields["tokenizer.chat_template"].contents() if "tokenizer.chat_template" in fields else None
    if inside != tokenizer.chat_template:
        raise MergeError(f"{gguf_file} carries another chat template than {folders[0]}; export the GGUF again.")
    return tokenizer, fields["llama.context_length"].contents()


def _renderer(source: str, tokenizer: GgufTokenizer, folder: Path) -> Render:
    """Renders chats with the Jinja template as transformers does, less the BOS that llama.cpp adds by itself."""
    from transformers.utils.chat_template_utils import render_jinja_template

    tokens = tokenizer.vocabulary.tokens
    named = {f"{name}_token": tokens[index] for name, index in tokenizer.special.items()}
    bos = named.get("bos_token", "") if tokenizer.add_bos else ""

    def render(messages: list[Message], generation: bool) -> str:
        rendered, _ = render_jinja_template([messages], chat_template=source, add_generation_prompt=generation, **named)
        if not rendered[0].startswith(bos):
            raise MergeError(
                f"{folder}: the tokenizer adds {bos!r} to every prompt and the chat template does not begin with it, so a "
                "served prompt would not be training's; begin the template with {{ bos_token }} or set add_bos_token to false."
            )
        return rendered[0].removeprefix(bos)

    return render


def read_chat_format(render: Render, folder: Path) -> ChatFormat:
    """Find out what a template puts around each text, by rendering marked chats; MergeError where no such rule is seen."""
    from jinja2.exceptions import TemplateError

    def message(role: str, mark: str) -> Message:
        return {"role": role, "content": mark}

    def rest(whole: str, part: str) -> str:
        if not whole.startswith(part):
            raise MergeError(f"{_no_template(folder)}: a chat's beginning changes with what follows.")
        return whole[len(part) :]

    def split(text: str, mark: str) -> tuple[str, str]:
        if text.count(mark) != 1:
            raise MergeError(f"{_no_template(folder)}: it writes a message {text.count(mark)} times, expected once.")
        before, _, after = text.partition(mark)
        if "{{" in before + after or '"""' in before + after:
            raise MergeError(
                f"{_no_template(folder)}: it contains {{{{ or three quotes, which end a Go template's text."
            )
        return before, after

    first, answer, second = message("user", "@@q1@@"), message("assistant", "@@a1@@"), message("user", "@@q2@@")
    one = render([first], False)
    two = render([first, answer], False)
    three = render([first, answer, second], False)
    around = {"user": split(rest(three, two), "@@q2@@"), "assistant": split(rest(two, one), "@@a1@@")}
    before, after = around["user"]
    turn = f"{before}@@q1@@{after}"
    if not one.endswith(turn):
        raise MergeError(f"{_no_template(folder)}: the first question is written otherwise than later ones.")
    try:
        with_system = render([message("system", "@@s@@"), first], False)
    except TemplateError:
        with_system = ""
    if "@@s@@" in with_system:
        if not with_system.endswith(turn):
            raise MergeError(f"{_no_template(folder)}: a system message changes how the question is written.")
        around = {"system": split(with_system.removesuffix(turn), "@@s@@"), **around}
    opening, _ = split(one.removesuffix(turn) + "@@", "@@")
    return ChatFormat(opening, around, split(rest(render([first], True), one) + "@@", "@@")[0])


def _no_template(folder: Path) -> str:
    return f"{folder}: the chat template cannot be written for Ollama (llama-server --jinja and vLLM run it as it is)"


def _prove(template: str, render: Render, system: bool, folder: Path) -> None:
    for turns in (1, 2, 3):
        for with_system in (False, True) if system else (False,):
            chat = _chat(turns, with_system)
            expected, actual = render(chat, True), render_go(template, chat)
            if actual != expected:
                raise MergeError(
                    f"{_no_template(folder)}: for {chat} it gives {expected!r}, Ollama would give {actual!r}."
                )


def _check_stops(chat_format: ChatFormat, tokenizer: GgufTokenizer, folder: Path) -> None:
    after = chat_format.around["assistant"][1]
    if not any(after.lstrip().startswith(stop) for stop in tokenizer.stops):
        raise MergeError(
            f"{folder}: the chat template ends an assistant's turn with {after!r}, and the stop tokens are "
            f"{tokenizer.stops}: the served model would never stop. Name that token as eos_token or in "
            "generation_config.json's eos_token_id."
        )


def _sampling(folder: Path, context: int) -> dict[str, float]:
    """Ollama parameters; num_ctx because Ollama would otherwise cut a chat at its own default, silently."""
    file = folder / "generation_config.json"
    config: dict[str, Any] = read_json(file) if file.is_file() else {}
    sampled = {ours: config[theirs] for theirs, ours in _SAMPLING.items() if config.get(theirs) is not None}
    if not config.get("do_sample"):
        sampled = {"temperature": 0}
    return {**sampled, "repeat_penalty": config.get("repetition_penalty") or 1.0, "num_ctx": min(context, 8192)}


_ACTION = re.compile(r"\{\{ (.*?) \}\}")
_CONDITION = re.compile(r'(?:else )?if (eq|ne) (\.Role|\(index \.Messages 0\)\.Role) "(\w+)"')


def render_go(template: str, messages: list[Message]) -> str:
    """Render the part of Go's text/template that `ChatFormat.go_template` writes.

    That is `range .Messages`, `.Content`, and `if` / `else if` with eq or ne on a role. Raises ValueError for the rest.
    """
    parts = _ACTION.split(template)
    text, end = _render_until_end(parts, 0, messages, None)
    if end != len(parts):
        raise ValueError(f"an {{{{ end }}}} too many in {template!r}")
    return text


def _render_until_end(parts: list[str], at: int, messages: list[Message], here: Message | None) -> tuple[str, int]:
    """Render from parts[at] (a text; actions stand at odd places) to the `end` or `else` that closes the block."""
    out = []
    while at < len(parts):
        out.append(parts[at])
        if at + 1 == len(parts):
            return "".join(out), len(parts)
        action, at = parts[at + 1], at + 2
        if action == "end" or action.startswith("else "):
            return "".join(out), at - 1
        if action == ".Content" and here is not None:
            out.append(here["content"])
        elif action == "range .Messages":
            start = at
            for each in messages:
                text, at = _render_until_end(parts, start, messages, each)
                out.append(text)
            at += 1
        elif action.startswith("if "):
            text, at = _render_if(parts, at - 1, messages, here)
            out.append(text)
        else:
            raise ValueError(f"the Go template action {action!r} is not supported here")
    return "".join(out), at


def _render_if(parts: list[str], at: int, messages: list[Message], here: Message | None) -> tuple[str, int]:
    """Render the first branch that holds, from the `if` at parts[at]; returns its text and the place after `end`."""
    chosen = None
    while parts[at] != "end":
        condition = _CONDITION.fullmatch(parts[at])
        if condition is None:
            raise ValueError(f"the Go template action {parts[at]!r} is not supported here")
        subject = here if condition[2] == ".Role" else messages[0]
        text, at = _render_until_end(parts, at + 1, messages, here)
        if chosen is None and subject is not None and (subject["role"] == condition[3]) == (condition[1] == "eq"):
            chosen = text
    return chosen or "", at + 1
