"""What `--help` and a bare `python -m finetune` print: recipes, groups and keys. Imports neither hydra nor torch."""

from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any

from finetune.config import Config

RECIPES = Path(__file__).resolve().parents[1] / "recipes"
"""Works from a checkout, a wheel and an editable install; Hydra's pkg:// does not."""

USAGE = """\
Usage: python -m finetune recipe=NAME [group=option] [key=value] ...

  recipe=NAME            which recipe to run (see below)
  run_dir=DIR            where everything is written (default: outputs/NAME/TIME)
  resume=DIR             go on with an earlier run at its first unfinished stage
  stages=[sft,merge]     run only these stages, in this order
  seed=N                 seed of the data split, the adapter's start, the data order and the sampling
  debug=true             show tracebacks
  --config-dir DIR       your own recipes: DIR/recipe/NAME.yaml
  --cfg job              print the composed configuration and stop
  --multirun             a sweep over comma-separated values, with any Hydra launcher
"""


def recipe_files(arguments: list[str]) -> list[Path]:
    """Packaged recipes and those under --config-dir."""
    folders = [RECIPES]
    for position, argument in enumerate(arguments):
        if argument == "--config-dir" and position + 1 < len(arguments):
            folders.append(Path(arguments[position + 1]))
        elif argument.startswith("--config-dir="):
            folders.append(Path(argument.partition("=")[2]))
    return [path for folder in folders for path in sorted((folder / "recipe").glob("*.yaml"))]


def list_recipes(arguments: list[str]) -> str:
    """A line for each recipe: its name and the first comment of its file after the package line."""
    lines = ["Recipes:"]
    for path in recipe_files(arguments):
        comments = [line[1:].strip() for line in path.read_text(encoding="utf-8").splitlines() if line.startswith("#")]
        described = [comment for comment in comments if not comment.startswith("@package")]
        lines.append(f"  {path.stem:<18} {described[0] if described else ''}")
    return "\n".join(lines) + "\n"


def list_groups() -> str:
    """The other configuration groups with their options."""
    lines = ["Groups (group=option):"]
    for folder in sorted(path for path in RECIPES.iterdir() if path.is_dir() and path.name != "recipe"):
        options = ", ".join(sorted(path.stem for path in folder.glob("*.yaml")))
        if options:
            lines.append(f"  {folder.name:<18} {options}")
    return "\n".join(lines) + "\n"


def keys() -> dict[str, Any]:
    """Every configuration key with its default."""
    found: dict[str, Any] = {}

    def walk(prefix: str, node: Any) -> None:
        for item in fields(node):
            value = getattr(node, item.name)
            if is_dataclass(value):
                walk(f"{prefix}{item.name}.", value)
            else:
                found[prefix + item.name] = value

    walk("", Config())
    return found


def full_help(arguments: list[str]) -> str:
    """The text of `--help`."""
    lines = ["Keys (key=default):", *(f"  {key}={value}" for key, value in keys().items())]
    return "\n".join([USAGE, list_recipes(arguments), list_groups(), *lines])


def mappings() -> list[str]:
    """Keys whose value is a mapping with names of the user's own: data.columns, grpo.rewards, ..."""
    return [key for key, value in keys().items() if isinstance(value, dict)]
