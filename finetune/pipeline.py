"""The stages, and running those that a configuration names, in order."""

import importlib
import logging
import time

from safetensors import SafetensorError

from finetune.config import Config
from finetune.errors import UserError
from finetune.run import Run

log = logging.getLogger("finetune")

STAGES = {
    "inspect": "finetune.inspect:inspect",
    "preflight": "finetune.preflight:check",
    "sft": "finetune.sft:train",
    "grpo": "finetune.grpo:train",
    "merge": "finetune.export:merge",
    "export": "finetune.export:export",
    "evaluate": "finetune.evaluate:evaluate",
    "report": "finetune.report:write",
    "serve": "finetune.serve:serve",
    "chat": "finetune.serve:chat",
}
"""Each stage's function, `stage(config, run) -> Result`; its module is imported when the stage runs."""


def with_preflight(stages: list[str]) -> list[str]:
    """The stages with `preflight` in front of the first that trains, unless it is among them."""
    first = next((place for place, stage in enumerate(stages) if stage in ("sft", "grpo")), None)
    if first is None or "preflight" in stages:
        return stages
    return [*stages[:first], "preflight", *stages[first:]]


def run_stages(config: Config, run: Run) -> None:
    """Run `config.stages` in order, after a preflight where one of them trains, skipping those that are done; what a stage raises ends the run.

    torch and safetensors report a full disk each in their own way: it becomes one UserError.
    """
    for name in with_preflight(config.stages):
        if run.is_done(name):
            log.info("%s: done before, skipped", name)
            continue
        log.info("%s: starts", name)
        run.start(name)
        started = time.monotonic()
        module, function = STAGES[name].split(":")
        try:
            result = getattr(importlib.import_module(module), function)(config, run)
        except (OSError, RuntimeError, SafetensorError) as error:
            if "No space left on device" in str(error) or run.disk_is_full():
                raise UserError(
                    f"{name}: the disk of {run.dir} is full. Free some space and go on with resume={run.dir}; what was finished is kept."
                ) from error
            raise
        seconds = time.monotonic() - started
        run.finish(name, seconds, result)
        log.info("%s: done in %.0f s", name, seconds)
