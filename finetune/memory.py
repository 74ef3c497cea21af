"""How much memory a training step takes, found without any: the real model class, the real peft layers and the real loss run
forward and backward on fake tensors (shape and dtype, no data; torch.subclasses FakeTensorMode), and the bytes alive are counted.

Two depths, one and two layers, give the share of a layer and the share of the rest. The fake device is always the CPU, whose sdpa
keeps what a GPU's memory-efficient and flash kernels keep: the output and one number a row. All figures are in bytes.
"""

import copy
import functools
import weakref
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from peft import get_peft_model
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import AutoConfig, AutoModelForCausalLM
from trl.trainer.utils import selective_log_softmax

from finetune import models, packing
from finetune.config import LoraConfig
from finetune.loss import chunked_nll

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass(frozen=True)
class Step:
    """One micro-batch's forward and backward pass."""

    lengths: tuple[int, ...]
    """Tokens of each example; padded to the longest unless `packed`."""
    dtype: str
    """Compute type: bfloat16, float16 or float32."""
    quantization: str
    """nf4 or none."""
    packed: bool = True
    """The examples stand end to end in one row."""
    checkpointing: bool = False
    """Activations are computed again in the backward pass."""
    completion: int | None = None
    """GRPO: every logit of the last so many tokens is kept; None: supervised tokens' logits in chunks."""


@dataclass(frozen=True)
class Account:
    """Bytes that a training step takes, by cause."""

    weights: int
    """The frozen base."""
    trainable: int
    """The adapter in fp32, its gradient and AdamW's two moments."""
    activations: int
    """What is alive beside these at the peak."""

    @property
    def total(self) -> int:
        return self.weights + self.trainable + self.activations


class Peak(TorchDispatchMode):
    """Counts the bytes of tensor storages alive (`now`), and the most that ever were (`peak`), while it is the active mode.

    What torch.distributed._tools.mem_tracker.MemTracker does, which fails on frozen parameters (it hooks the gradient of each).
    """

    def __init__(self) -> None:
        super().__init__()
        self.alive: dict[int, tuple[Any, int]] = {}
        self.now = self.peak = 0

    def add(self, tensor: torch.Tensor) -> None:
        """Count a tensor's storage, once."""
        storage = tensor.untyped_storage()
        key = id(storage)
        if key in self.alive:
            return
        self.alive[key] = (weakref.ref(storage, lambda _: self._drop(key)), storage.nbytes())
        self.now += storage.nbytes()
        self.peak = max(self.peak, self.now)

    def _drop(self, key: int) -> None:
        self.now -= self.alive.pop(key)[1]

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(out):
            if isinstance(leaf, torch.Tensor):
                self.add(leaf)
        return out


class _Nf4Matmul(torch.autograd.Function):
    """Allocates what bitsandbytes' matmul_4bit does: the dense weight for the length of a product, in both directions."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, out_features: int) -> torch.Tensor:
        ctx.shape = (out_features, x.shape[-1])
        return torch.nn.functional.linear(x, x.new_empty(ctx.shape))

    @staticmethod
    def backward(ctx: Any, upstream: torch.Tensor) -> tuple[torch.Tensor, None]:
        return upstream @ upstream.new_empty(ctx.shape), None


class Nf4Linear(torch.nn.Linear):
    """A linear layer with the size of one in NF4."""

    def __init__(self, dense: torch.nn.Linear) -> None:
        super().__init__(dense.in_features, dense.out_features, dense.bias is not None, dtype=dense.weight.dtype)
        size = nf4_bytes(dense.weight.numel())
        self.weight = torch.nn.Parameter(torch.empty(size, dtype=torch.uint8), requires_grad=False)
        self.compute_dtype = dense.weight.dtype

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out = _Nf4Matmul.apply(x.to(self.compute_dtype), self.out_features)
        return (out if self.bias is None else out + self.bias).to(x.dtype)


def nf4_bytes(weights: int) -> int:
    """Bytes of one tensor in NF4 with double quantisation: 4 bits a weight, a byte for each block of 64 weights, 4 bytes for each
    256 blocks, and the tables of 16 and 256 values (QLoRA, arXiv 2305.14314, section 3)."""
    blocks = -(-weights // 64)
    return -(-weights // 2) + blocks + 4 * -(-blocks // 256) + 4 * (16 + 256 + 1)


def skeleton(folder: Path, dtype: str, quantization: str, layers: int | None = None) -> "PreTrainedModel":
    """The base on the meta device, of `layers` layers (None: all), its linear layers as NF4 stores them where asked."""
    config = copy.deepcopy(AutoConfig.from_pretrained(folder))
    if layers is not None:
        config.num_hidden_layers = layers
        if getattr(config, "layer_types", None):  # models that mix kinds of attention list one a layer
            config.layer_types = config.layer_types[:layers]
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=getattr(torch, dtype), attn_implementation="sdpa")
        if quantization == "nf4":
            head = model.get_output_embeddings()
            for name, module in list(model.named_modules()):
                if type(module) is torch.nn.Linear and module is not head:
                    parent, _, leaf = name.rpartition(".")
                    setattr(model.get_submodule(parent), leaf, Nf4Linear(module))
    return model.requires_grad_(False)


def weight_bytes(folder: Path, dtype: str, quantization: str) -> int:
    """Bytes of the base's weights as they are held."""
    return sum(parameter.nbytes for parameter in skeleton(folder, dtype, quantization).parameters())


def training_step(folder: Path, lora: LoraConfig, step: Step) -> Account:
    """The account of a training step on the whole base.

    lora.variant counts as lora: dora's further activations are not in it.
    """
    depth = AutoConfig.from_pretrained(folder).num_hidden_layers
    plain = replace(lora, variant="lora")
    one, two = (_run(folder, plain.r, plain.target_modules, step, layers) for layers in (1, 2))
    return Account(*(round(first + (depth - 1) * (second - first)) for first, second in zip(one, two, strict=True)))


@functools.lru_cache(maxsize=256)
def _run(folder: Path, rank: int, target_modules: str, step: Step, layers: int) -> tuple[int, int, int]:
    """weights, trainable and activations of a base cut to `layers` layers."""
    model = skeleton(folder, step.dtype, step.quantization, layers)
    policy = get_peft_model(model, models.peft_config(LoraConfig(r=rank, target_modules=target_modules)), low_cpu_mem_usage=True)
    if step.packed:
        packing.prepare(model, "batch")
    if step.checkpointing:
        policy.gradient_checkpointing_enable({"use_reentrant": False})
        policy.enable_input_require_grads()
        policy.train()
    with FakeTensorMode():
        for module in policy.modules():
            for name, parameter in module._parameters.items():
                if parameter is not None:
                    dtype = torch.float32 if parameter.requires_grad else parameter.dtype
                    empty = torch.empty(parameter.shape, dtype=dtype)
                    module._parameters[name] = torch.nn.Parameter(empty, requires_grad=parameter.requires_grad)
            for name, buffer in module._buffers.items():
                if buffer is not None:
                    module._buffers[name] = torch.empty(buffer.shape, dtype=buffer.dtype)
        policy.tie_weights()
        peak = Peak()
        for tensor in [*policy.parameters(), *policy.buffers()]:
            peak.add(tensor)
        adapter = sum(parameter.nbytes for parameter in policy.parameters() if parameter.requires_grad)
        weights = peak.now - adapter
        for parameter in policy.parameters():
            if parameter.requires_grad:  # gradients stand while micro-batches accumulate
                parameter.grad = torch.empty_like(parameter)
                peak.add(parameter.grad)
        with peak:
            forward_backward(model, step)
        return weights, 4 * adapter, peak.peak - weights - 2 * adapter


def forward_backward(model: "PreTrainedModel", step: Step) -> None:
    """What sft.nll and the GRPO loss do with a micro-batch, on tensors of zeros; every token is taken as supervised."""
    rows, width = (1, sum(step.lengths)) if step.packed else (len(step.lengths), max(step.lengths))
    ids = torch.zeros((rows, width), dtype=torch.long)
    dtype = getattr(torch, step.dtype)
    where: dict[str, Any] = {"attention_mask": torch.ones_like(ids)}
    if step.packed:
        where = {"position_ids": torch.zeros_like(ids), "lengths": list(step.lengths)}
    with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
        hidden = model.get_decoder()(input_ids=ids, use_cache=False, **where)[0][:, :-1]
        if step.completion is not None:
            logits = model.get_output_embeddings()(hidden[:, -step.completion :]) / 1.0
            loss = selective_log_softmax(logits, ids[:, -step.completion :]).sum()
            del logits
    if step.completion is None:
        loss = chunked_nll(hidden.flatten(0, 1), model.get_output_embeddings(), ids[:, 1:].flatten())
    del hidden
    loss.backward()
