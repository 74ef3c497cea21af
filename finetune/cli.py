"""The command line: DictConfig -> Config, run directory, `pipeline.run_stages(config, run)`. The only module that imports hydra."""

import difflib
import errno
import logging
import os
import re
import sys
import time
import traceback
from pathlib import Path

import hydra
import yaml
from hydra.core.config_store import ConfigStore
from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from rich.console import Console
from rich.logging import RichHandler

from data_formats import DataFormatError
from finetune import pipeline, usage
from finetune.config import Config
from finetune.errors import UserError
from finetune.run import Run

FREE_ON_RESUME = ("recipe", "resume", "run_dir", "stages", "debug")
"""What may differ from the stored configuration when a run is resumed."""

MISTAKES = (UserError, DataFormatError, HydraException, OmegaConfBaseException, OSError)
"""What a user can cause and mend: one message, exit code 2."""

log = logging.getLogger("finetune")


def main() -> None:
    """Entry point of `python -m finetune` and of the console script. Exits with 2 on a user's mistake."""
    arguments = sys.argv[1:]
    if "--help" in arguments or "-h" in arguments:
        print(usage.full_help(arguments))
        return
    # Hydra turns exceptions into its own messages and exit code 1 unless this is set (hydra/_internal/utils.py, run_and_report).
    os.environ["HYDRA_FULL_ERROR"] = "1"
    debug = any(argument.lower() in ("debug=true", "debug=1", "debug=yes") for argument in arguments)
    try:
        arguments = with_stored_recipe(arguments)
        if not any(argument.startswith("recipe=") for argument in arguments) and not any(
            argument.startswith("--") and argument not in ("--multirun", "--config-dir") for argument in arguments
        ):
            print(usage.list_recipes(arguments))
            print("Run one with: python -m finetune recipe=NAME", file=sys.stderr)
            sys.exit(2)
        # argparse wants Hydra's own options before the overrides.
        overrides = [open_mapping(quote_letters(argument)) for argument in arguments if "=" in argument and not argument.startswith("-")]
        sys.argv[1:] = [argument for argument in arguments if "=" not in argument or argument.startswith("-")] + overrides
        ConfigStore.instance().store(name="schema", node=Config)
        mistakes: list[Exception] = []

        def job(composed: DictConfig) -> None:
            """run_job, whose mistakes pass by Hydra, which would put a line of its own before our message."""
            try:
                run_job(composed)
            except MISTAKES as error:
                if HydraConfig.get().mode == RunMode.MULTIRUN:
                    raise
                mistakes.append(error)

        hydra.main(version_base="1.3", config_path=str(usage.RECIPES), config_name="config")(job)()
        if mistakes:
            raise mistakes[0]
    except KeyboardInterrupt:
        print("\nStopped. What was finished is kept; go on with resume=DIR.", file=sys.stderr)
        sys.exit(130)
    except MISTAKES as error:
        if debug:
            traceback.print_exc()
        print(f"Error: {explain(error)}", file=sys.stderr)
        sys.exit(2)


def quote_letters(argument: str) -> str:
    """`data.path=Übung.csv` as Hydra wants it: its grammar knows letters beyond ASCII in quotes only."""
    key, _, value = argument.partition("=")
    return argument if value.isascii() or any(mark in value for mark in "'\"[{") else f"{key}='{value}'"


def open_mapping(argument: str) -> str:
    """`data.columns.question=q` as Hydra wants it: keys below a mapping are the user's own, so they may be new (`++`)."""
    key = argument.partition("=")[0]
    return f"++{argument}" if any(key == name or key.startswith(f"{name}.") for name in usage.mappings()) else argument


def replace_mappings(composed: DictConfig, overrides: list[str]) -> None:
    """A mapping given whole on the command line (`grpo.rewards={boxed: 1}`) takes the recipe's place; Hydra would merge them."""
    for override in OverridesParser.create().parse_overrides(overrides):
        if override.key_or_group in usage.mappings() and isinstance(override.value(), dict):
            OmegaConf.update(composed, override.key_or_group, override.value(), merge=False)


def run_job(composed: DictConfig) -> None:
    """One job of Hydra's: convert and check the configuration, open the run directory, run the stages."""
    replace_mappings(composed, HydraConfig.get().overrides.task)
    config = to_config(composed, HydraConfig.get().runtime.choices["recipe"])
    overrides = HydraConfig.get().overrides.task
    resume = config.resume
    found = resume is not None and (Path(resume) / "config.yaml").exists()
    if resume is not None and found:
        run = Run.open(Path(resume))
        config = stored_config(run, config, overrides)
    else:
        directory = resume or config.run_dir or default_run_dir(config.recipe)
        config.run_dir, config.resume = str(Path(directory).resolve()), None
        run = Run.create(Path(config.run_dir), OmegaConf.to_yaml(OmegaConf.structured(config)))
    start_logging(run.dir / "finetune.log")
    if resume is not None and not found:
        log.warning("resume=%s holds no run yet: a new one starts there", resume)
    log.info("recipe %s in %s: %s", config.recipe, run.dir, " -> ".join(config.stages))
    try:
        pipeline.run_stages(config, run)
    except Exception:
        log.debug("stopped by an error", exc_info=True)
        raise
    log.info("everything is in %s", run.dir)


def to_config(composed: DictConfig, recipe: str) -> Config:
    """Convert a composed configuration to dataclasses, which checks every value. Raises UserError or an OmegaConf error."""
    missing = OmegaConf.missing_keys(composed)
    if missing:
        raise UserError(f"{', '.join(sorted(missing))}: not set, and this recipe needs it. Give it as {sorted(missing)[0]}=VALUE.")
    config = OmegaConf.to_object(composed)
    assert isinstance(config, Config)
    config.recipe = recipe
    return config


def stored_config(run: Run, composed: Config, overrides: list[str]) -> Config:
    """The configuration that the run was started with; only FREE_ON_RESUME may be given anew.

    Raises UserError where the recipe or another key on the command line differs from the stored one.
    """
    stored = OmegaConf.merge(OmegaConf.structured(Config), OmegaConf.load(run.dir / "config.yaml"))
    if stored.recipe != composed.recipe:
        raise UserError(
            f"resume={run.dir}: is a run of recipe '{stored.recipe}', not of '{composed.recipe}'. "
            f"Use recipe={stored.recipe}, or start a new run without resume."
        )
    now = OmegaConf.structured(composed)
    for override in overrides:
        key = override.partition("=")[0].lstrip("+~")
        if key not in FREE_ON_RESUME and OmegaConf.select(stored, key) != OmegaConf.select(now, key):
            raise UserError(
                f"{override}: the run in {run.dir} was started with {key}={OmegaConf.select(stored, key)}, and a resumed run "
                f"keeps its settings. Leave {key} out, or start a new run without resume."
            )
    if any(override.startswith("stages=") for override in overrides):
        stored.stages = composed.stages
    stored.debug, stored.run_dir = composed.debug, str(run.dir.resolve())
    config = OmegaConf.to_object(stored)
    assert isinstance(config, Config)
    return config


def with_stored_recipe(arguments: list[str]) -> list[str]:
    """Add the recipe of the run that `resume=DIR` names, where the command line names none."""
    resume = next((argument[7:] for argument in arguments if argument.startswith("resume=")), None)
    if resume is None or any(argument.startswith("recipe=") for argument in arguments):
        return arguments
    path = Path(resume) / "config.yaml"
    if not path.exists():
        raise UserError(f"resume={resume}: not a run directory, it has no config.yaml. Expected the folder of an earlier run.")
    return [f"recipe={yaml.safe_load(path.read_text(encoding='utf-8'))['recipe']}", *arguments]


def default_run_dir(recipe: str) -> str:
    """outputs/RECIPE/TIME with microseconds, so that two runs never share one; Hydra's own folder in a sweep."""
    if HydraConfig.get().mode == RunMode.MULTIRUN:
        return HydraConfig.get().runtime.output_dir
    return f"outputs/{recipe}/{time.strftime('%Y-%m-%d_%H-%M-%S')}_{time.time_ns() // 1000 % 1_000_000:06d}"


class LogFile(logging.FileHandler):
    """The run's log. Where it cannot be written (a full disk) it keeps still: the stage that meets the same fault reports it."""

    def handleError(self, record: logging.LogRecord) -> None:
        if not isinstance(sys.exc_info()[1], OSError):
            super().handleError(record)


def start_logging(path: Path) -> None:
    """Everything to `path`; information and above to the terminal."""
    log.setLevel(logging.DEBUG)
    log.propagate = False
    for handler in list(log.handlers):
        log.removeHandler(handler)
        handler.close()
    to_file = LogFile(path, encoding="utf-8")
    to_file.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
    terminal = RichHandler(console=Console(stderr=True), show_path=False, level=logging.INFO, log_time_format="%H:%M:%S")
    log.addHandler(to_file)
    log.addHandler(terminal)
    # bitsandbytes 0.50 says at each import on a CPU that an optional hub kernel is absent; we neither need nor fetch it.
    logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)


def explain(error: Exception) -> str:
    """One message for a user's mistake, whichever library noticed it."""
    text = str(error).strip()
    if not isinstance(error, OmegaConfBaseException | HydraException):
        if isinstance(error, OSError):
            return explain_os_error(error)
        return text
    if match := re.search(r"Could not find '([^']+)/([^']+)'\n\nAvailable options in '[^']+':\n(.*?)\nConfig search path", text, re.DOTALL):
        group, found, options = match[1], match[2], match[3].split()
        return f"{group}={found}: unknown. Expected one of {', '.join(options)}.{nearest(found, options)}"
    if match := re.search(r"Could not override '([^']+)'", text):
        return f"{match[1]}: unknown key. See --help for all keys.{nearest(match[1], list(usage.keys()))}"
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    key = next((line.partition(":")[2].strip() for line in lines if line.startswith("full_key:")), "")
    return f"{key}: {lines[0]}" if key and key not in lines[0] else lines[0]


def explain_os_error(error: OSError) -> str:
    """A full disk says what to do; everything else names the file and the system's reason."""
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return f"the disk is full ({error.filename or error}). Free some space and go on with resume=DIR; what was finished is kept."
    return f"{error.filename}: {error.strerror}" if error.filename and error.strerror else str(error)


def nearest(found: str, allowed: list[str]) -> str:
    """' Did you mean ...?' or nothing."""
    near = difflib.get_close_matches(found, allowed, n=1)
    return f" Did you mean '{near[0]}'?" if near else ""
