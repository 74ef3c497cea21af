"""Tiny random models with peft adapters whose every trained tensor differs from its start, and the dense fp32 reference
that peft itself makes."""

from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from transformers import (
    AutoModelForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
)


def llama(**changes: Any) -> PreTrainedModel:
    """A 2-layer Llama with grouped queries; sizes that do not divide evenly into blocks."""
    torch.manual_seed(0)
    sizes = dict(
        vocab_size=101,
        hidden_size=64,
        intermediate_size=136,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
    )
    return LlamaForCausalLM(LlamaConfig(**{**sizes, "initializer_range": 0.05, **changes}))


def gpt2() -> PreTrainedModel:
    torch.manual_seed(0)
    return GPT2LMHeadModel(
        GPT2Config(vocab_size=101, n_positions=32, n_embd=64, n_layer=2, n_head=4, bos_token_id=0, eos_token_id=0)
    )


def train(model: PeftModel, seed: int = 1, size: float = 0.02) -> None:
    """Random values into all that training would change."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn(parameter.shape, generator=generator) * size)


def save_base(model: PreTrainedModel, folder: Path, dtype: torch.dtype = torch.bfloat16, **options: Any) -> Path:
    model.to(dtype).save_pretrained(folder, **options)
    return folder


def save_adapter(base: Path, folder: Path, *, resize: int | None = None, seed: int = 1, **config: Any) -> Path:
    """Train a random adapter on the base in fp32 (as loaded) and save it."""
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    if resize is not None:
        torch.manual_seed(3)
        model.resize_token_embeddings(resize)
    torch.manual_seed(2)
    config = {"r": 4, "lora_alpha": 6, "task_type": "CAUSAL_LM", "target_modules": ["q_proj", "down_proj"], **config}
    peft_model = get_peft_model(model, LoraConfig(**config))
    train(peft_model, seed)
    peft_model.save_pretrained(folder)
    return folder


def reference(base: Path, adapters: list[Path], resize: int | None = None, **options: Any) -> dict[str, torch.Tensor]:
    """What peft makes of base + adapters when everything is fp32: state dict, tied weights under both names."""
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    if resize is not None:
        model.resize_token_embeddings(resize)
    for folder in adapters:
        model = PeftModel.from_pretrained(model, folder, **options).merge_and_unload()
    return {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}


def written(folder: Path) -> dict[str, torch.Tensor]:
    """All tensors of a folder's safetensors files."""
    return {name: tensor for file in sorted(folder.glob("*.safetensors")) for name, tensor in load_file(file).items()}


def bits(tensor: torch.Tensor) -> torch.Tensor:
    """A tensor's bytes, for a comparison that tells -0 from 0 and takes NaN for equal."""
    return tensor.contiguous().view(torch.uint8)
