"""The hand-over from adapter to weights to server: the merge and export stages around the merge package."""

import logging
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TransferSpeedColumn

import merge as merger
from finetune import models
from finetune.card import model_card
from finetune.config import Config
from finetune.errors import UserError
from finetune.run import Result, Run, write_atomic

log = logging.getLogger("finetune")


def merge(config: Config, run: Run) -> Result:
    """The merge stage: fold the last adapter into the full-precision base, `merged/` with card and certificate.

    Raises UserError where there is no adapter, or the fold cannot be done exactly or changes nothing.
    """
    base = models.resolve(config.merge.base or config.model.path)
    adapter = Path(config.merge.adapter) if config.merge.adapter else run.last_adapter()
    if adapter is None:
        raise UserError("merge.adapter: not set, and the run has no trained adapter. Give merge.adapter=DIR, or run sft or grpo first.")
    inside = config.merge.out is None
    out = run.dir / "merged" if config.merge.out is None else Path(config.merge.out)
    if inside:
        run.discard("merged")  # left by an attempt that was killed after the rename
    with Progress(TextColumn("merge"), BarColumn(), DownloadColumn(), TransferSpeedColumn(), console=Console(stderr=True)) as bar:
        task = bar.add_task("merge", total=None)
        try:
            certificate = merger.fold(
                base, adapter, out, onto=config.merge.onto, progress=lambda done, total: bar.update(task, completed=done, total=total)
            )
        except merger.MergeError as error:
            raise UserError(f"merge: {error}") from error
    write_atomic(out / "README.md", model_card(config, base, certificate))
    log.info("merge: %s\n%s", out, certificate.table())
    return Result({"base": base, "adapter": adapter}, ["merged"] if inside else [])


def export(config: Config, run: Run) -> Result:
    """The export stage: each target from the merged folder, and the commands that serve it."""
    source = Path(config.export.source) if config.export.source else run.dir / "merged"
    if not (source / "config.json").exists():
        raise UserError(f"export.source={source}: no merged model there. Run the merge stage first, or name a merged folder.")
    log.info("export: serve it with  transformers serve %s  or  vllm serve %s", source, source)
    return Result({"merged": source}, [])
