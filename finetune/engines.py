"""What answers an evaluation's prompts: a model in this process, a GGUF file or an OpenAI-compatible server, behind one call."""

import importlib.util
import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from finetune import generation, models
from finetune.config import EvaluateConfig
from finetune.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


@dataclass(frozen=True)
class Prompt:
    """What a model goes on from: a chat and the start of the assistant's turn, or, without a chat, plain text."""

    messages: list[Any] | None
    """role and content of each; None: plain text."""
    text: str = ""


@dataclass(frozen=True)
class Answer:
    """What it went on with."""

    text: str
    """Up to the first stop string, without it."""
    tokens: int
    finished: bool
    """Whether it ended by itself or at a stop string; False: cut off at max_new_tokens."""


class Engine(Protocol):
    """A model that answers prompts."""

    def length(self, prompt: Prompt) -> int:
        """How long the prompt is (tokens, or characters where tokens are not known): what batches are sorted by."""
        ...

    def answer(self, prompts: Sequence[Prompt], settings: EvaluateConfig, seed: int, stop: tuple[str, ...]) -> list[Answer]:
        """One answer for each prompt, sampled as `settings` and `seed` say; it ends before the first of `stop`."""
        ...


@dataclass
class Local:
    """A transformers model in this process."""

    model: "PreTrainedModel"
    tokenizer: "PreTrainedTokenizerBase"

    def encode(self, prompt: Prompt) -> list[int]:
        """Token ids: the chat as its template renders it, without special tokens in what follows; plain text with its BOS."""
        if prompt.messages is None:
            return self.tokenizer(prompt.text)["input_ids"]
        ids = models.encode_chat(self.tokenizer, prompt.messages, add_generation_prompt=True)
        return ids + (self.tokenizer(prompt.text, add_special_tokens=False)["input_ids"] if prompt.text else [])

    def length(self, prompt: Prompt) -> int:
        return len(self.encode(prompt))

    def answer(self, prompts: Sequence[Prompt], settings: EvaluateConfig, seed: int, stop: tuple[str, ...]) -> list[Answer]:
        import torch

        torch.manual_seed(seed)
        completions = generation.generate(
            self.model, self.tokenizer, [self.encode(prompt) for prompt in prompts], settings.max_new_tokens, settings.batch_size,
            settings.temperature, settings.top_p, settings.top_k, stop_strings=stop,
        )
        texts = [before_stop(completion.text, stop) for completion in completions]
        return [
            Answer(text, len(completion.ids), completion.finished or text != completion.text)
            for text, completion in zip(texts, completions, strict=True)
        ]


def before_stop(text: str, stop: tuple[str, ...]) -> str:
    """The text before the first stop string in it."""
    return text[: min((text.index(string) for string in stop if string in text), default=len(text))]


class Gguf:
    """A GGUF file through llama-cpp-python, one prompt at a time, with the file's own chat template."""

    def __init__(self, path: Path, threads: int | None) -> None:
        """Raises UserError where llama-cpp-python is not installed or the file has no chat template."""
        if importlib.util.find_spec("llama_cpp") is None:
            raise UserError(f"model.path={path}: llama-cpp-python is not installed. Install it with: pip install llama-cpp-python")
        import llama_cpp
        from llama_cpp import llama_cpp as api
        from llama_cpp.llama_chat_format import Jinja2ChatFormatter

        # llama.cpp's repacking of quantised weights for AMX ends the process on machines that only claim to have it.
        default = api.llama_model_default_params

        def without_repacking() -> Any:
            parameters = default()
            parameters.use_extra_bufts = False
            return parameters

        api.llama_model_default_params = without_repacking
        try:
            self._llama = llama_cpp.Llama(str(path), n_ctx=0, n_threads=threads, n_gpu_layers=-1, verbose=False)
        except ValueError as error:
            raise UserError(f"model.path={path}: llama-cpp-python cannot load it ({error}). Export it again, or get a newer llama-cpp-python.") from error
        finally:
            api.llama_model_default_params = default
        template = self._llama.metadata.get("tokenizer.chat_template")
        if template is None:
            raise UserError(f"model.path={path}: the file has no chat template (tokenizer.chat_template). Convert it again from a folder that has one.")

        def piece(token: int) -> str:
            return self._llama.detokenize([token], special=True).decode("utf-8", "replace") if token >= 0 else ""

        eos = piece(self._llama.token_eos())
        self._format = Jinja2ChatFormatter(template, eos_token=eos, bos_token=piece(self._llama.token_bos()), stop_token_ids=[self._llama.token_eos()])

    def encode(self, prompt: Prompt) -> list[int]:
        """Token ids, see Local.encode."""
        if prompt.messages is None:
            return self._llama.tokenize(prompt.text.encode(), add_bos=True, special=False)
        rendered: str = self._format(messages=prompt.messages).prompt  # type: ignore[arg-type]
        ids = self._llama.tokenize(rendered.encode(), add_bos=False, special=True)
        return ids + (self._llama.tokenize(prompt.text.encode(), add_bos=False, special=False) if prompt.text else [])

    def length(self, prompt: Prompt) -> int:
        return len(self.encode(prompt))

    def answer(self, prompts: Sequence[Prompt], settings: EvaluateConfig, seed: int, stop: tuple[str, ...]) -> list[Answer]:
        return [self._one(prompt, settings, seed + place, stop) for place, prompt in enumerate(prompts)]

    def _one(self, prompt: Prompt, settings: EvaluateConfig, seed: int, stop: tuple[str, ...]) -> Answer:
        # llama-cpp-python's own top_k (40), top_p (0.95), min_p (0.05) and repeat_penalty are not asked for: 0, 1, 0 and 1 switch them off.
        reply: Any = self._llama.create_completion(
            self.encode(prompt), max_tokens=settings.max_new_tokens, temperature=settings.temperature, top_p=settings.top_p,
            top_k=settings.top_k, min_p=0.0, repeat_penalty=1.0, seed=seed, stop=list(stop),
        )
        choice = reply["choices"][0]
        return Answer(choice["text"], reply["usage"]["completion_tokens"], choice["finish_reason"] == "stop")


class Server:
    """An OpenAI-compatible server: its chat completions, or its completions for plain text."""

    def __init__(self, address: str, model: str | None) -> None:
        """`model`: its name there; None: the first that the server lists. Raises UserError where nothing answers at `address`."""
        if importlib.util.find_spec("openai") is None:
            raise UserError(f"model.path={address}: the openai client is not installed. Install it with: pip install 'finetune[serve]'")
        from openai import OpenAI, OpenAIError

        self._address = address
        root = address.rstrip("/").removesuffix("/v1")
        self._client = OpenAI(base_url=f"{root}/v1", api_key=os.environ.get("OPENAI_API_KEY", "none"), max_retries=3)
        try:
            listed = [entry.id for entry in self._client.models.list()] if model is None else [model]
        except OpenAIError as error:
            raise UserError(f"model.path={address}: no OpenAI-compatible server answers there ({error}). Start it, or check the address.") from error
        if not listed:
            raise UserError(f"model.path={address}: the server lists no model. Name one with evaluate.server_model.")
        self.model = listed[0]

    def length(self, prompt: Prompt) -> int:
        return len(prompt.text) + sum(len(message["content"]) for message in prompt.messages or [])

    def answer(self, prompts: Sequence[Prompt], settings: EvaluateConfig, seed: int, stop: tuple[str, ...]) -> list[Answer]:
        with ThreadPoolExecutor(settings.batch_size) as threads:
            return list(threads.map(lambda place: self._one(prompts[place], settings, seed + place, stop), range(len(prompts))))

    def _one(self, prompt: Prompt, settings: EvaluateConfig, seed: int, stop: tuple[str, ...]) -> Answer:
        from openai import OpenAIError

        shared: dict[str, Any] = {
            "model": self.model, "max_tokens": settings.max_new_tokens, "temperature": settings.temperature, "top_p": settings.top_p,
            "seed": seed,
        }
        if settings.top_k:
            shared["extra_body"] = {"top_k": settings.top_k}
        if stop:
            shared["stop"] = list(stop)
        try:
            if prompt.messages is None:
                reply = self._client.completions.create(prompt=prompt.text, **shared)
                text = reply.choices[0].text
            else:
                reply = self._client.chat.completions.create(messages=prompt.messages, **shared)
                text = reply.choices[0].message.content or ""
        except OpenAIError as error:
            raise UserError(f"model.path={self._address}: the server answered with an error ({error}). What was answered before is kept.") from error
        return Answer(text, reply.usage.completion_tokens if reply.usage else 0, reply.choices[0].finish_reason == "stop")
