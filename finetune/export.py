"""The hand-overs from adapter to weights and from weights to a server: the merge and export stages around the merge package."""

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TransferSpeedColumn

import merge as merger
from finetune import data, models
from finetune.card import model_card
from finetune.config import Config
from finetune.errors import UserError
from finetune.run import Result, Run, write_atomic

log = logging.getLogger("finetune")

SAMPLE_CHATS = 16
"""Training chats on which `merge.onto=best` compares the two ways of merging."""


def merge(config: Config, run: Run) -> Result:
    """The merge stage: fold the last adapter into the full-precision base, `merged/` with card and certificate.

    Raises UserError where there is no adapter, or the fold cannot be done exactly or changes nothing.
    """
    base = models.resolve(config.merge.base or config.model.path)
    adapter = Path(config.merge.adapter) if config.merge.adapter else run.last_adapter()
    if adapter is None:
        raise UserError(
            "merge.adapter: not set, and the run has no trained adapter. Give merge.adapter=DIR, or run sft or grpo first."
        )
    out = Path(config.merge.out) if config.merge.out else run.dir / "merged"
    if config.merge.out is None:
        run.discard("merged")  # an attempt killed after the rename left it
    onto, divergence = config.merge.onto, None
    with merge_errors("merge"):
        if onto == "best":
            onto, divergence = merger.choose_base(base, adapter, sample_chats(config, run, base))
            log.info("merge: onto=%s is closer to the trained policy: %s", onto, divergence)
        with byte_progress("merge") as advance:
            certificate = merger.fold(base, adapter, out, onto=onto, progress=advance)
        if divergence is not None:
            certificate.divergence = divergence
            certificate.save(out)
    write_atomic(out / "README.md", model_card(config, base, certificate))
    log.info("merge: %s\n%s", out, certificate.table())
    return Result({"base": base, "adapter": adapter}, [] if config.merge.out else ["merged"])


def sample_chats(config: Config, run: Run, base: Path) -> list[list[int]]:
    """Token ids of some training chats, answers included."""
    tokenizer = models.load_tokenizer(base, config.model)
    chats = [
        data.prompt_messages(example, config.data.prompt) + [{"role": "assistant", "content": example.completion}]
        for example in data.load(config, run).train
        if example.completion is not None
    ]
    return [models.encode_chat(tokenizer, chat) for chat in chats[:SAMPLE_CHATS]]


def export(config: Config, run: Run) -> Result:
    """The export stage: `export/` with a file for each target and `serve.txt`, the commands that serve them.

    Targets: safetensors is the merged folder itself; gguf a file for llama.cpp, ollama a Modelfile beside it; vllm an adapter
    folder that vLLM loads onto the base. Raises UserError where there is nothing to export or a target refuses.
    """
    settings = config.export
    adapter = Path(settings.adapter) if settings.adapter else None
    source = models.resolve(settings.source) if settings.source else run.dir / "merged"
    if not (source / "config.json").exists():
        raise UserError(f"export.source={source}: no merged model there. Run the merge stage first, or name a merged folder.")
    name = f"{config.recipe}-{settings.gguf_type.lower()}.gguf"
    gguf_file = modelfile = vllm = None
    with run.output("export") as folder, merge_errors("export"):
        if "gguf" in settings.targets or "ollama" in settings.targets:
            with byte_progress("gguf") as advance:
                merger.to_gguf(source, folder / name, settings.gguf_type, adapter=adapter, progress=advance)
            gguf_file = run.dir / "export" / name
        if "ollama" in settings.targets:
            (folder / "Modelfile").write_text(merger.modelfile(source, folder / name, adapter=adapter), encoding="utf-8")
            modelfile = run.dir / "export" / "Modelfile"
        if "vllm" in settings.targets:
            trained = adapter or run.last_adapter()
            if trained is None:
                raise UserError("export.targets=[vllm]: there is no adapter. Give export.adapter=DIR, or train one first.")
            vllm = merger.vllm_adapter(trained, folder / "vllm-adapter")
        commands = {"transformers": f"transformers serve {source}"} | merger.serving_commands(
            config.recipe, source, gguf_file=gguf_file, modelfile=modelfile, adapter=vllm
        )
        text = "".join(f"# {engine}\n{command}\n".replace(str(folder), str(run.dir / "export")) for engine, command in commands.items())
        (folder / "serve.txt").write_text(text, encoding="utf-8")
    log.info("export: serve it with\n%s", text)
    if settings.push_to is not None:
        push(source, settings.push_to)
    return Result({"source": source} | ({"adapter": adapter} if adapter else {}), ["export"])


def push(folder: Path, name: str) -> None:
    """Upload a merged folder, its card included, to the hub repository `name` (private until you change that)."""
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError

    hub = HfApi()
    try:
        hub.create_repo(name, private=True, exist_ok=True)
        hub.upload_folder(repo_id=name, folder_path=folder)
    except (HfHubHTTPError, OSError) as error:
        raise UserError(f"export.push_to={name}: the hub did not take it ({error}). Log in with `hf auth login` and try again.") from error
    log.info("export: pushed to %s", name)


@contextmanager
def merge_errors(stage: str) -> Iterator[None]:
    """Turn the merge package's refusals into the user's message."""
    try:
        yield
    except merger.MergeError as error:
        raise UserError(f"{stage}: {error}") from error


@contextmanager
def byte_progress(title: str) -> Iterator[Callable[[int, int], None]]:
    """A progress bar in bytes: yields `advance(done, total)`."""
    columns = (TextColumn(title), BarColumn(), DownloadColumn(), TransferSpeedColumn())
    with Progress(*columns, console=Console(stderr=True)) as bar:
        task = bar.add_task(title, total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)
