"""Write a LoRA adapter alone as GGUF, for `llama-server -m base.gguf --lora adapter.gguf`."""

from __future__ import annotations

from pathlib import Path

import torch

from merge.adapter import Adapter
from merge.checkpoint import read_json
from merge.errors import MergeError
from merge.gguf import new_file
from merge.gguf_llama import check_model, gguf_name, heads_of, row_order


def to_gguf_lora(adapter_dir: str | Path, base_dir: str | Path, out_file: str | Path) -> Path:
    """Write a LoRA adapter alone as GGUF (fp32), for `llama-server -m base.gguf --lora out_file`; returns its path.

    Raises MergeError for an adapter that is more than low-rank matrices on a Llama's linear layers (DoRA, trained
    biases, modules_to_save, trainable tokens, an initialisation that changed the base): llama.cpp would serve it
    wrongly.
    """
    import gguf

    out_file, adapter = Path(out_file), Adapter(adapter_dir)
    config = read_json(Path(base_dir) / "config.json")
    check_model(Path(base_dir), config)
    if adapter.base_change is not None:
        raise MergeError(
            f"{adapter_dir}: init_lora_weights = {adapter.config['init_lora_weights']!r} changed the base weights, "
            "which an adapter alone cannot say; export base + adapter with to_gguf(..., adapter=...)."
        )
    tensors: dict[str, torch.Tensor] = {}
    alpha = float(adapter.config["lora_alpha"])
    for key in sorted(adapter.weights.tensors):
        if not key.endswith((".lora_A.weight", ".lora_B.weight")):
            raise MergeError(
                f"{adapter_dir}: {key} is not a LoRA matrix of a linear layer, and llama.cpp loads no others; export "
                "base + adapter with to_gguf(..., adapter=...) instead."
            )
        module = key.removeprefix("base_model.model.").rpartition(".lora_")[0]
        name = gguf_name(module + ".weight", config["num_hidden_layers"], str(adapter_dir))
        matrix = adapter.weights.read_rows(key).float()
        if not bool(torch.isfinite(matrix).all()):
            raise MergeError(f"{adapter_dir}: {key} holds a value that is not finite; the training diverged.")
        if key.endswith(".lora_A.weight"):
            tensors[name + ".lora_a"] = matrix
            continue
        # llama.cpp scales by alpha / rank, with one alpha: another scale (rsLoRA, alpha_pattern) goes into B.
        rank = matrix.shape[1]
        matrix = matrix * (adapter.scale(module, rank) / (alpha / rank))
        heads = heads_of(name, config)
        tensors[name + ".lora_b"] = matrix[row_order(matrix.shape[0], heads).argsort()] if heads else matrix
    if not tensors:
        raise MergeError(f"{adapter_dir}: the adapter file holds no tensors; training saved nothing.")
    with new_file(out_file, sum(tensor.nbytes for tensor in tensors.values())) as temporary:
        writer = gguf.GGUFWriter(temporary, "llama")
        writer.add_type(gguf.GGUFType.ADAPTER)
        writer.add_string(gguf.Keys.Adapter.TYPE, "lora")
        writer.add_float32(gguf.Keys.Adapter.LORA_ALPHA, alpha)
        writer.add_name(out_file.stem)
        writer.add_file_type(gguf.LlamaFileType.ALL_F32)
        for name, tensor in tensors.items():
            writer.add_tensor(name, tensor.contiguous().numpy())
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
    return out_file
