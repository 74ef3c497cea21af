"""The serve and chat stages: the merged model behind an OpenAI-compatible server, or in the terminal."""

import importlib.util
import logging
import subprocess
import sys
from pathlib import Path

from finetune import generation, hardware, models
from finetune.config import Config
from finetune.errors import UserError
from finetune.run import Result, Run

log = logging.getLogger("finetune")


def serve(config: Config, run: Run) -> Result:
    """Run `transformers serve` on model.path until it is stopped. Raises UserError where it is not installed or ends by itself."""
    if importlib.util.find_spec("fastapi") is None or importlib.util.find_spec("uvicorn") is None:
        raise UserError("recipe=serve: the server's packages are not installed. Install them with: pip install 'finetune[serve]'")
    folder = models.resolve(config.model.path)
    command = [
        str(Path(sys.executable).with_name("transformers")), "serve", str(folder),
        "--host", config.serve.host, "--port", str(config.serve.port),
    ]
    log.info("serve: http://%s:%d/v1, stop it with Ctrl-C", config.serve.host, config.serve.port)
    code = subprocess.run(command).returncode
    if code != 0:
        raise UserError(f"recipe=serve: transformers serve ended with code {code}, its messages are above.")
    return Result({"model": folder}, [])


def chat(config: Config, run: Run) -> Result:
    """Talk to model.path (with model.adapter on it, if given) in the terminal; an empty line or Ctrl-D ends it."""
    choices = hardware.choose(config, hardware.detect())
    folder = models.resolve(config.model.path)
    tokenizer = models.load_tokenizer(folder, config.model)
    model = models.load_base(folder, config.model, choices)
    if config.model.adapter:
        model = models.load_adapter(model, Path(config.model.adapter))
    settings = config.evaluate
    messages: list[dict[str, str]] = []
    while line := _read("you: "):
        messages.append({"role": "user", "content": line})
        prompt = models.encode_chat(tokenizer, messages, add_generation_prompt=True)
        completion = generation.generate(
            model, tokenizer, [prompt], settings.max_new_tokens, 1, settings.temperature, settings.top_p, settings.top_k
        )[0]
        messages.append({"role": "assistant", "content": completion.text})
        print(f"model: {completion.text}" + ("" if completion.finished else f" [cut off at {settings.max_new_tokens} tokens]"))
    return Result({"model": folder}, [])


def _read(prompt: str) -> str:
    """A line from the terminal, '' at the end of input."""
    try:
        return input(prompt).strip()
    except EOFError:
        return ""
