"""Hand a model to a serving engine: an adapter folder that vLLM takes, and the commands to type."""

from __future__ import annotations

import json
import shlex
import shutil
from dataclasses import dataclass
from pathlib import Path

from merge.adapter import Adapter
from merge.errors import MergeError

VLLM_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)
"""What `vllm serve --max-lora-rank` accepts (its default is 16)."""

_UNSUPPORTED = {
    "use_dora": "vLLM does not support DoRA",
    "modules_to_save": "vLLM loads low-rank matrices only, and would serve the base's copy of these modules",
    "rank_pattern": "vLLM reads one rank for all layers",
    "alpha_pattern": "vLLM reads one lora_alpha for all layers, and would scale some wrongly",
    "trainable_token_indices": "vLLM loads low-rank matrices only, and would serve the base's token embeddings",
    "lora_bias": "vLLM does not support a bias in lora_B",
    "fan_in_fan_out": "vLLM expects (out, in) matrices",
}


@dataclass(frozen=True)
class VllmAdapter:
    """An adapter folder that vLLM loads."""

    path: Path
    rank: int
    max_lora_rank: int
    """The value that `vllm serve --max-lora-rank` needs."""


def vllm_adapter(adapter_dir: str | Path, out_dir: str | Path) -> VllmAdapter:
    """Copy an adapter to a new folder with what vLLM reads of it, once it is sure that vLLM will serve what was trained.

    Raises MergeError, with the reason, for an adapter that vLLM refuses or would serve wrongly; fold such a one instead.
    """
    adapter, out_dir = Adapter(adapter_dir), Path(out_dir)
    try:
        return _copy(adapter, out_dir)
    finally:
        adapter.close()


def _copy(adapter: Adapter, out_dir: Path) -> VllmAdapter:
    config, folder = adapter.config, adapter.folder
    advice = "Fold it into the base (merge.fold) and serve that."
    for key, reason in _UNSUPPORTED.items():
        if config.get(key):
            raise MergeError(f"{folder}/adapter_config.json: {key} = {config[key]!r}: {reason}. {advice}")
    if config.get("bias", "none") != "none":
        raise MergeError(
            f"{folder}/adapter_config.json: bias = {config['bias']!r}: vLLM serves no trained biases. {advice}"
        )
    if adapter.base_change is not None:
        raise MergeError(
            f"{folder}/adapter_config.json: init_lora_weights = {config['init_lora_weights']!r} changed the base weights "
            f"when training began, which vLLM does not know. {advice}"
        )
    others = [key for key in adapter.weights.tensors if not key.endswith((".lora_A.weight", ".lora_B.weight"))]
    if others:
        raise MergeError(f"{folder}: {others[0]} is not a LoRA matrix of a linear layer; vLLM ignores it. {advice}")
    rank = int(config["r"])
    if rank > VLLM_RANKS[-1]:
        raise MergeError(f"{folder}: rank {rank}; vLLM serves at most {VLLM_RANKS[-1]}. {advice}")
    if not adapter.weights.is_safetensors:
        raise MergeError(f"{folder}: the weights are adapter_model.bin; save the adapter as safetensors.")
    if out_dir.exists():
        raise MergeError(f"{out_dir} exists already; give another folder or remove it.")
    temporary = out_dir.with_name(f".{out_dir.name}.unfinished")
    temporary.mkdir()
    try:
        for shard in adapter.weights.shards:
            shutil.copyfile(shard.file, temporary / shard.file.name)
        (temporary / "adapter_config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
        temporary.rename(out_dir)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return VllmAdapter(out_dir, rank, next(size for size in VLLM_RANKS if size >= rank))


def serving_commands(
    name: str,
    model_dir: str | Path,
    *,
    gguf_file: str | Path | None = None,
    modelfile: str | Path | None = None,
    adapter: VllmAdapter | None = None,
) -> dict[str, str]:
    """The commands that serve what was exported, by engine, ready to print.

    name: what clients call the model. model_dir: the merged folder, or the base when an adapter is given.
    """
    called, folder = shlex.quote(name), shlex.quote(str(model_dir))
    commands = {"vLLM": f"vllm serve {folder} --served-model-name {called}"}
    if adapter is not None:
        module = shlex.quote(f"{name}={adapter.path}")
        commands["vLLM"] = (
            f"vllm serve {folder} --enable-lora --max-lora-rank {adapter.max_lora_rank} --lora-modules {module}"
        )
    if gguf_file is not None:
        file = shlex.quote(str(gguf_file))
        commands["llama.cpp"] = f"llama-server -m {file} --alias {called} --jinja"
        # Its repeat penalty of 1.1 would change greedy answers; no flag turns it off, each request must.
        server = f"python -m llama_cpp.server --model {file} --model_alias {called}"
        commands["llama-cpp-python"] = f"{server}  # and ask with repeat_penalty=1.0"
    if modelfile is not None:
        commands["Ollama"] = f"ollama create {called} -f {shlex.quote(str(modelfile))} && ollama run {called}"
    return commands
