"""The stages, and running those that a configuration names, in order."""

import importlib
import logging
import time

from finetune.config import Config
from finetune.run import Run

log = logging.getLogger("finetune")

STAGES = {
    "inspect": "finetune.data:inspect",
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


def run_stages(config: Config, run: Run) -> None:
    """Run `config.stages` in order, skipping those that are done; what a stage raises ends the run."""
    for name in config.stages:
        if run.is_done(name):
            log.info("%s: done before, skipped", name)
            continue
        log.info("%s: starts", name)
        run.start(name)
        started = time.monotonic()
        module, function = STAGES[name].split(":")
        result = getattr(importlib.import_module(module), function)(config, run)
        seconds = time.monotonic() - started
        run.finish(name, seconds, result)
        log.info("%s: done in %.0f s", name, seconds)
