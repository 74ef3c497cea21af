"""Every shipped recipe composes and converts; every configuration field is read somewhere; imports go one way."""

import ast
import subprocess
import sys
from dataclasses import fields, is_dataclass
from pathlib import Path

import pytest
from hydra import compose, initialize_config_dir
from hydra.core.config_store import ConfigStore

from finetune import cli, pipeline, usage
from finetune.config import STAGE_NAMES, Config
from finetune.errors import UserError

ROOT = Path(__file__).resolve().parents[1]
RECIPES = sorted(path.stem for path in (usage.RECIPES / "recipe").glob("*.yaml"))
CONTRACT = {
    "quickstart", "deepseek_math", "deepseek_math_t4", "tutor", "sft", "grpo", "merge", "export", "evaluate", "inspect", "serve", "chat",
}
KEYS = """model.path model.quantization model.dtype model.attention model.adapter data.path data.format data.split data.limit lora.r
lora.alpha lora.variant sft.max_steps sft.learning_rate sft.max_length sft.batch_size grpo.max_steps grpo.group_size
grpo.max_completion_length grpo.preset grpo.rewards merge.base merge.adapter merge.out merge.onto export.source export.targets
export.gguf_type evaluate.k evaluate.temperature evaluate.top_p evaluate.top_k evaluate.max_new_tokens evaluate.limit
evaluate.prompt seed debug run_dir resume stages""".split()


def composed(recipe: str, *overrides: str) -> Config:
    """The recipe as the command line converts it."""
    ConfigStore.instance().store(name="schema", node=Config)
    with initialize_config_dir(config_dir=str(usage.RECIPES), version_base="1.3"):
        return cli.to_config(compose("config", overrides=[f"recipe={recipe}", *overrides]), recipe)


def test_the_promised_recipes_are_there():
    assert set(RECIPES) >= CONTRACT


@pytest.mark.parametrize("recipe", RECIPES)
def test_a_recipe_composes_and_converts(recipe):
    config = composed(recipe)
    assert config.stages, "a recipe names its stages"


@pytest.mark.parametrize("group", sorted(path.name for path in usage.RECIPES.iterdir() if path.is_dir() and path.name != "recipe"))
def test_every_option_of_a_group_composes(group):
    for option in sorted(path.stem for path in (usage.RECIPES / group).glob("*.yaml")):
        try:
            composed("sft", f"{group}={option}")
        except UserError as error:  # an option may need a file of the user's, and then says which key names it
            assert f"{group}." in str(error) and "Set " in str(error) or "Give it as" in str(error), error


def test_the_promised_keys_are_there():
    known = usage.keys()
    assert [key for key in KEYS if key not in known] == []


def test_a_command_line_group_beats_the_recipe_and_a_key_beats_both():
    assert composed("quickstart", "sft.max_steps=3").sft.max_steps == 3


def test_stage_names_are_the_pipeline_s():
    assert tuple(pipeline.STAGES) == STAGE_NAMES


def test_every_config_field_is_read_somewhere():
    """A key that nothing reads is a defect: look for `.field` (or the field as a keyword's value) outside config.py."""
    read: set[str] = set()
    for path in (ROOT / "finetune").rglob("*.py"):
        if path.name != "config.py":
            tree = ast.parse(path.read_text(encoding="utf-8"))
            read |= {node.attr for node in ast.walk(tree) if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Load)}
            # getattr(settings, name) over literal names
            read |= {node.value for node in ast.walk(tree) if isinstance(node, ast.Constant) and isinstance(node.value, str)}
    unread = []

    def walk(prefix: str, node: object) -> None:
        for item in fields(node):  # type: ignore[arg-type]
            value = getattr(node, item.name)
            if item.name not in read:
                unread.append(prefix + item.name)
            if is_dataclass(value):
                walk(f"{prefix}{item.name}.", value)

    walk("", Config())
    assert unread == []


LAYERS = [
    {"errors"}, {"config"}, {"run", "hardware", "usage"},
    {"data", "sources", "decontaminate", "chats", "packing", "over_length", "nf4_cache", "models", "answers", "rewards", "generation", "sandbox"},
]
"""finetune's modules from the ground up; one imports only from its own layer or below. What is not named here is a stage or
its helper, above all of these; pipeline is above the stages, cli above the pipeline."""


def imported(path: Path) -> set[str]:
    """Top modules of this project that a file imports: 'merge', 'data_formats', 'finetune.x'."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module and node.level == 0:
            names |= {f"{node.module}.{alias.name}" for alias in node.names} if node.module == "finetune" else {node.module}
    return names


def test_imports_go_one_way():
    for package in ("data_formats", "merge"):
        for path in (ROOT / package).rglob("*.py"):
            assert not any(name.split(".")[0] == "finetune" for name in imported(path)), f"{path} imports finetune"
    rank = {name: level for level, names in enumerate(LAYERS) for name in names}
    rank |= {"pipeline": 100, "cli": 101, "__main__": 102}
    for path in (ROOT / "finetune").rglob("*.py"):
        own = path.relative_to(ROOT / "finetune").parts[0].removesuffix(".py")
        for name in imported(path):
            parts = name.split(".")
            if parts[0] == "finetune" and len(parts) > 1 and parts[1] != own:
                assert rank.get(parts[1], 50) <= rank.get(own, 50), f"{path} imports {name}"


def test_only_the_command_line_imports_hydra():
    for path in (ROOT / "finetune").rglob("*.py"):
        if path.name != "cli.py":
            assert not any(name.split(".")[0] == "hydra" for name in imported(path)), f"{path} imports hydra"


def test_libraries_import_without_heavy_packages():
    code = "import sys, data_formats, finetune.answers, finetune.config; print(sorted({'torch', 'transformers', 'sympy'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, timeout=120)
    assert done.stdout.strip() == "[]", done.stdout + done.stderr
    code = "import sys, merge; print(sorted({'transformers', 'peft', 'gguf'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, timeout=120)
    assert done.stdout.strip() == "[]", done.stdout + done.stderr
