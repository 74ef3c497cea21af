"""Read a peft LoRA adapter folder and say, for each base tensor, what the adapter does to it.

`Adapter(folder).plan(base)` maps the name of each base tensor to its updates, in the order in which they apply.
Everything in the folder must be understood: an unknown peft_type, a configuration field that changes weights in a way
not known here, or a tensor that no rule claims is refused. The rules follow peft 0.21 (tuners/lora/layer.py,
tuners/lora/dora.py, utils/save_and_load.py).
"""

import math
import re
from pathlib import Path
from typing import Any

from merge.checkpoint import FLOATS, Checkpoint, TensorInfo, read_json
from merge.errors import MergeError
from merge.updates import AddBias, LowRank, Replace, SetRows, Undo, Update

PREFIX = "base_model.model."

HARMLESS = frozenset(
    "alpha_pattern auto_mapping base_model_name_or_path bias corda_config ensure_weight_tying eva_config exclude_modules fan_in_fan_out inference_mode "
    "init_lora_weights layers_pattern layers_to_transform loftq_config lora_alpha lora_bias lora_dropout lora_ga_config megatron_core modules_to_save "
    "peft_type peft_version qalora_group_size r rank_pattern revision runtime_config target_modules task_type trainable_token_indices use_dora "
    "use_rslora velora_config".split()
)
"""Fields of adapter_config.json that are either handled here or leave the trained weights' meaning alone (dropout,
training-time memory tricks)."""

REFUSED = {
    "alora_invocation_tokens": "aLoRA acts only on the tokens after its invocation, so no single weight equals it; serve it as an adapter",
    "arrow_config": "Arrow routes each token to its own adapters, so no single weight equals it",
    "kasa_config": "KaSA also truncates the base weights by an SVD, which is not supported",
    "layer_replication": "it repeats layers, so the merged model has another shape than the base",
    "megatron_config": "Megatron's parallel layers are not supported",
    "monteclora_config": "MonteCLoRA samples its weights, so no single weight equals it",
    "target_parameters": "LoRA on bare parameters (mixture-of-experts tensors) is not supported; merge it with peft's merge_and_unload",
    "use_bdlora": "block-diagonal LoRA is not supported; merge it with peft's merge_and_unload",
    "use_qalora": "QA-LoRA pools the inputs, so its delta is not B @ A",
}

CHANGES_BASE = {"pissa": "scale_first", "corda": "scale_first", "olora": "scale_first", "lora_ga": "scale_last"}
"""Initialisations that subtract scale * B0 @ A0 from the base when training begins, and how peft groups that
product."""

INITIAL_FOLDERS = ("initial", "pissa_init", "corda_init", "olora_init", "lora_ga_init")
"""Names, inside the adapter folder, under which the state at the start of training is looked for."""


class Adapter:
    """One adapter folder: configuration and tensors. Raises MergeError for anything that could not be folded
    exactly."""

    def __init__(self, folder: str | Path):
        self.folder = Path(folder)
        self.config = read_json(self.folder / "adapter_config.json")
        self._check_config()
        self.weights = Checkpoint(self.folder, stem="adapter_model", bin_stem="adapter_model")
        self.initial = self._initial_state()
        self.parts = [self]

    def _check_config(self) -> None:
        where = self.folder / "adapter_config.json"
        kind = self.config.get("peft_type")
        if kind != "LORA":
            raise MergeError(
                f"{where}: peft_type is {kind!r}; only LORA adapters (with rsLoRA, DoRA, ...) can be folded. Merge this one with peft."
            )
        for key, reason in REFUSED.items():
            if self.config.get(key):
                raise MergeError(f"{where}: {key} = {self.config[key]!r} cannot be folded: {reason}.")
        unknown = [key for key, value in self.config.items() if value and key not in HARMLESS and key not in REFUSED]
        if unknown:
            raise MergeError(
                f"{where}: unknown field {unknown[0]!r} = {self.config[unknown[0]]!r}; it may change the weights, so the fold stops. Merge with the peft that wrote it."
            )
        for key in ("r", "lora_alpha"):
            if not isinstance(self.config.get(key), int | float) or self.config["r"] <= 0:
                raise MergeError(f"{where}: {key} is {self.config.get(key)!r}; expected a number above 0.")

    def _initial_state(self) -> Checkpoint | None:
        init = self.config.get("init_lora_weights", True)
        kind = str(init).lower()
        if kind == "loftq":
            raise MergeError(
                f"{self.folder}: init_lora_weights is 'loftq', which trains on base weights that LoftQ itself quantised, and they cannot be computed from the "
                "original. Save that base (model.get_base_model().save_pretrained), fold onto it, and set init_lora_weights to true in adapter_config.json."
            )
        self.base_change = next((order for name, order in CHANGES_BASE.items() if kind.startswith(name)), None)
        if self.base_change is None:
            if kind not in ("true", "false", "gaussian", "eva", "orthogonal", "mica"):
                raise MergeError(
                    f"{self.folder}/adapter_config.json: init_lora_weights = {init!r} is not known; it may have changed the base weights."
                )
            return None
        found = [name for name in INITIAL_FOLDERS if (self.folder / name).is_dir()]
        if not found:
            raise MergeError(
                f"{self.folder}: init_lora_weights is {init!r}, which changed the base weights when training began, and the adapter's state at that moment "
                f"is not saved (no folder {' / '.join(INITIAL_FOLDERS[:2])} in it). Save it with save_pretrained before the first step, or convert the adapter with "
                "peft's save_pretrained(path_initial_model_for_weight_conversion=...)."
            )
        if kind.startswith("olora") and self.config.get("fan_in_fan_out"):
            raise MergeError(f"{self.folder}: OLoRA on fan_in_fan_out layers is not defined by peft.")
        return Checkpoint(self.folder / found[0], stem="adapter_model", bin_stem="adapter_model")

    def scale(self, module: str, rank: int) -> float:
        """alpha / r, or alpha / sqrt(r) for rsLoRA (arXiv 2312.03732), after rank_pattern and alpha_pattern. Raises if
        the rank is not the tensor's."""
        r = _pattern(self.config.get("rank_pattern"), module, self.config["r"])
        alpha = _pattern(self.config.get("alpha_pattern"), module, self.config["lora_alpha"])
        if r != rank:
            raise MergeError(
                f"{self.folder}: {module} has lora_A of rank {rank}, adapter_config.json says {r} (r and rank_pattern); the two files do not belong together."
            )
        return alpha / math.sqrt(r) if self.config.get("use_rslora") else alpha / r

    def plan(self, base: Checkpoint, lm_head: TensorInfo | None = None) -> dict[str, list[Update]]:
        """Base tensor name -> updates. `lm_head` is the tensor behind a tied output layer that the base does not store,
        if any."""
        known = dict(base.tensors)
        if lm_head is not None:
            known.setdefault("lm_head.weight", lm_head)
        plan: dict[str, list[Update]] = {}
        modules: dict[str, dict[str, TensorInfo]] = {}
        for key, info in self.weights.tensors.items():
            module, part = _split(key, self.folder)
            if info.dtype not in FLOATS:
                raise MergeError(f"{self.folder}: {key} has dtype {info.dtype}; expected float32, float16 or bfloat16.")
            modules.setdefault(module, {})[part] = info
        for module, parts in modules.items():
            for target, update in self._updates(module, parts):
                if target not in known:
                    close = [name for name in known if name.endswith(module.rpartition(".")[2] + ".weight")][:1]
                    raise MergeError(
                        f"{self.folder} changes {target}, which the base {base.folder} does not have{f' (it has {close[0]}, for instance)' if close else ''}; "
                        "the adapter was trained on another base."
                    )
                update.check(known[target], self.folder)
                plan.setdefault(target, []).append(update)
        if not plan:
            raise MergeError(f"{self.folder}: the adapter file holds no tensors; training saved nothing.")
        return plan

    def _updates(self, module: str, parts: dict[str, TensorInfo]) -> list[tuple[str, Update]]:
        found: list[tuple[str, Update]] = []
        for part in ("weight", "bias"):
            for key in (part, f"base_layer.{part}", f"modules_to_save.{part}", f"modules_to_save.default.{part}"):
                if key in parts:
                    found.append((f"{module}.{part}", Replace(self.weights, parts.pop(key))))
                    # After a resize peft also saves the untrained start of a saved module; the trained values supersede
                    # it.
                    parts.pop(f"original_module.{part}", None)
        if "token_adapter.trainable_tokens_delta" in parts:
            rows = parts.pop("token_adapter.trainable_tokens_delta")
            found.append((f"{module}.weight", SetRows(self.weights, rows, self._token_indices(module, rows))))
        pairs = (
            ("lora_A.weight", "lora_B.weight", bool(self.config.get("fan_in_fan_out"))),
            ("lora_embedding_A", "lora_embedding_B", True),
        )
        for a_key, b_key, transposed in pairs:
            if a_key in parts and b_key in parts:
                a, b = parts.pop(a_key), parts.pop(b_key)
                scale = self.scale(module, a.shape[0])
                magnitude = parts.pop("lora_magnitude_vector", None) or parts.pop("lora_magnitude_vector.weight", None)
                if bool(self.config.get("use_dora")) != (magnitude is not None):
                    raise MergeError(
                        f"{self.folder}: use_dora is {self.config.get('use_dora')!r} but {module} has {'a' if magnitude else 'no'} lora_magnitude_vector."
                    )
                if self.initial is not None and a_key == "lora_A.weight":
                    a0, b0 = (self.initial.tensors.get(f"{PREFIX}{module}.{key}") for key in (a_key, b_key))
                    if a0 is None or b0 is None:
                        raise MergeError(
                            f"{self.initial.folder} has no {module}: it is not the initial state of {self.folder}."
                        )
                    found.append(
                        (
                            f"{module}.weight",
                            Undo(
                                self.initial,
                                a0,
                                b0,
                                self.scale(module, a0.shape[0]),
                                transposed,
                                self.base_change == "scale_first",
                            ),
                        )
                    )
                found.append((f"{module}.weight", LowRank(self.weights, a, b, scale, transposed, magnitude)))
                if "lora_B.bias" in parts:
                    found.append((f"{module}.bias", AddBias(self.weights, parts.pop("lora_B.bias"), scale)))
        if parts:
            part = next(iter(parts))
            raise MergeError(
                f"{self.folder}: tensor {parts[part].name} is not understood ({part} of {module}); nothing is skipped, so the fold stops."
            )
        return found

    def _token_indices(self, module: str, rows: TensorInfo) -> list[int]:
        indices: Any = self.config.get("trainable_token_indices")
        if isinstance(indices, dict):
            indices = next(
                (value for key, value in indices.items() if module == key or module.endswith(f".{key}")), None
            )
        if not isinstance(indices, list) or len(indices) != rows.rows:
            raise MergeError(
                f"{self.folder}: {rows.name} has {rows.rows} rows, trainable_token_indices names {indices!r} for it; expected one index a row."
            )
        return indices

    def close(self) -> None:
        self.weights.close()
        if self.initial is not None:
            self.initial.close()


PARTS = re.compile(
    r"\.?(lora_A\.weight|lora_B\.weight|lora_B\.bias|lora_embedding_A|lora_embedding_B|lora_magnitude_vector(?:\.weight)?|token_adapter\.trainable_tokens_delta|"
    r"(?:base_layer\.|original_module\.|modules_to_save\.(?:default\.)?)?(?:weight|bias))$"
)


def _split(key: str, folder: Path) -> tuple[str, str]:
    """'base_model.model.model.layers.0.q_proj.lora_A.weight' -> ('model.layers.0.q_proj', 'lora_A.weight')."""
    match = PARTS.search(key)
    if not key.startswith(PREFIX) or match is None:
        raise MergeError(
            f"{folder}: tensor {key} is not understood; expected {PREFIX}<module>.lora_A.weight and the like. Nothing is skipped, so the fold stops."
        )
    return key[len(PREFIX) : match.start()], match.group(1)


def _pattern(patterns: dict[str, Any] | None, module: str, default: float) -> float:
    """The value of the first pattern that matches the end of the module's name (peft's get_pattern_key)."""
    for pattern, value in (patterns or {}).items():
        if re.match(rf"(.*\.)?({pattern})$", module):
            return value
    return default
