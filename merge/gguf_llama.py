"""llama.cpp's `llama` architecture: the models it computes, its tensor names, order of q and k rows, and metadata.

All of it follows llama.cpp's conversion/llama.py and conversion/base.py.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from merge.errors import MergeError

if TYPE_CHECKING:
    from gguf import GGUFWriter

ARCHITECTURES = ("LlamaForCausalLM",)
"""The `architectures` of config.json that can be exported: Llama 1 to 3, DeepSeek LLM / Coder / Math 7B, SmolLM2,
..."""

OUTSIDE_LAYERS = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
}
IN_LAYER = {
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
"""transformers' module -> llama.cpp's, the latter after `blk.N.`"""


def check_model(folder: Path, config: dict[str, Any]) -> None:
    """Refuse by name what llama.cpp's `llama` architecture does not compute."""
    architectures = config.get("architectures") or []
    if not any(name in ARCHITECTURES for name in architectures):
        raise MergeError(
            f"{folder}/config.json: architectures = {architectures}; GGUF export supports {', '.join(ARCHITECTURES)}. "
            "Convert this model with llama.cpp's convert_hf_to_gguf.py."
        )
    if config.get("hidden_act", "silu") != "silu":
        raise MergeError(
            f"{folder}/config.json: hidden_act = {config['hidden_act']!r}; llama.cpp's llama computes silu."
        )
    needed = "hidden_size intermediate_size num_hidden_layers num_attention_heads max_position_embeddings rms_norm_eps"
    absent = [key for key in needed.split() if key not in config]
    if absent:
        raise MergeError(f"{folder}/config.json lacks {', '.join(absent)}, which a GGUF must state; add it.")
    rope = _rope(config)
    if rope["rope_type"] not in ("default", "linear", "llama3"):
        raise MergeError(
            f"{folder}/config.json: rope_type = {rope['rope_type']!r}; GGUF export supports default, linear and llama3."
        )


def _rope(config: dict[str, Any]) -> dict[str, Any]:
    """Rotary settings with `rope_type` and `rope_theta`, from the form that transformers 5 writes or the earlier
    one."""
    rope = dict(config.get("rope_parameters") or config.get("rope_scaling") or {})
    rope.setdefault("rope_type", rope.get("type", "default"))
    rope.setdefault("rope_theta", config.get("rope_theta", 10000.0))
    return rope


def head_dim(config: dict[str, Any]) -> int:
    """Rows of one head."""
    return config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"]


def heads_of(name: str, config: dict[str, Any]) -> int:
    """Heads of a tensor whose rows llama.cpp orders otherwise, or 0."""
    if ".attn_q." in name:
        return config["num_attention_heads"]
    if ".attn_k." in name:
        return config.get("num_key_value_heads") or config["num_attention_heads"]
    return 0


def row_order(rows: int, heads: int) -> torch.Tensor:
    """Where each row of q or k goes, (rows,): transformers rotates a head's two halves, llama.cpp neighbouring
    pairs."""
    return torch.arange(rows).view(heads, -1, 2).swapaxes(1, 2).reshape(-1)


def gguf_name(source: str, layers: int, where: str) -> str:
    """llama.cpp's name of a tensor; MergeError, which begins with `where`, if it has none."""
    module, _, suffix = source.rpartition(".")
    name = OUTSIDE_LAYERS.get(module)
    if name is None and module.startswith("model.layers."):
        number, _, inner = module.removeprefix("model.layers.").partition(".")
        if inner in IN_LAYER and number.isdecimal() and int(number) < layers:
            name = f"blk.{number}.{IN_LAYER[inner]}"
    if name is None or suffix not in ("weight", "bias"):
        raise MergeError(f"{where}: tensor {source} has no place in llama.cpp's llama model of {layers} layers.")
    return f"{name}.{suffix}"


def rope_factors(config: dict[str, Any]) -> torch.Tensor | None:
    """Llama 3's frequency factors, (head_dim / 2,) fp32, or None for other scalings.

    As in transformers' modeling_rope_utils.py, _compute_llama3_parameters, whose frequencies these divide.
    """
    rope = _rope(config)
    if rope["rope_type"] != "llama3":
        return None
    size = head_dim(config)
    wavelengths = 2 * math.pi * rope["rope_theta"] ** (torch.arange(0, size, 2, dtype=torch.float32) / size)
    factor, low, high = rope["factor"], rope["low_freq_factor"], rope["high_freq_factor"]
    context = rope["original_max_position_embeddings"]
    smooth = ((context / wavelengths - low) / (high - low)).clamp(0, 1)
    return 1 / ((1 - smooth) / factor + smooth)


def add_metadata(writer: GGUFWriter, config: dict[str, Any], folder: Path, name: str | None) -> None:
    """Add the `general.*` and `llama.*` keys to a GGUF whose tensors are known already.

    folder: the model's, for its card. name: the model's name, or None to take the card's or the folder's.
    """
    import gguf

    rope = _rope(config)
    total = writer.get_total_parameter_count()
    metadata = gguf.Metadata.load(None, folder, None, total[0])
    metadata.name = name or metadata.name or folder.name
    metadata.size_label = metadata.size_label or gguf.size_label(*total)
    writer.add_type(gguf.GGUFType.MODEL)
    metadata.set_gguf_meta_model(writer)

    heads = config["num_attention_heads"]
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(heads)
    writer.add_head_count_kv(config.get("num_key_value_heads") or heads)
    writer.add_rope_freq_base(rope["rope_theta"])
    if rope["rope_type"] == "linear":
        writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(rope["factor"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_key_length(head_dim(config))
    writer.add_value_length(head_dim(config))
    writer.add_rope_dimension_count(head_dim(config))
