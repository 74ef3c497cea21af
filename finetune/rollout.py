"""What GRPO samples from and scores with: a dense copy of the policy, refreshed exactly."""

import copy
from typing import TYPE_CHECKING, Any

import torch
from bitsandbytes.functional import dequantize_4bit
from bitsandbytes.nn import Params4bit
from peft.tuners.lora import LoraLayer
from peft.utils import ModulesToSaveWrapper

from finetune.errors import UserError

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedModel


class DensePolicy:
    """The policy with its weights dense in the compute dtype and an adapter folded in.

    An NF4 model dequantises every weight at every use; here it is done once a fold. The copy holds dequant(NF4(W)) + scale B A
    (DoRA: rescaled to its magnitudes), summed in fp32 and rounded once. It never goes through 4 bits again (peft's
    merge_adapter on 4-bit layers loses most of a small update). Tensors that the adapter does not touch are shared with the
    policy, so the copy costs 2 bytes for each adapted weight in bf16.

    Completions are sampled from `model` and scored by it too (finetune.scoring), so what is sampled from is what is trained:
    in the backward pass its linear layers hand their gradients to the adapter's A and B (`trains`; not for DoRA).
    """

    def __init__(self, policy: "PeftModel") -> None:
        base = policy.get_base_model()
        self.layers = {name: module for name, module in base.named_modules() if isinstance(module, LoraLayer)}
        config = copy.deepcopy(base.config)
        if hasattr(config, "quantization_config"):
            del config.quantization_config
        config.use_cache = True
        with torch.device("meta"):
            model: PreTrainedModel = type(base)._from_config(config, dtype=base.dtype)
            for name, module in self.layers.items():
                model.set_submodule(name, FoldedLinear(module))
        own = set(model.state_dict())
        shared = {name: tensor for name, tensor in base.state_dict().items() if name in own}
        shared |= {
            f"{name}.bias": module.base_layer.bias for name, module in self.layers.items() if module.base_layer.bias is not None
        }
        folded = {
            f"{name}.weight": torch.empty(module.out_features, module.in_features, dtype=base.dtype, device=base.device)
            for name, module in self.layers.items()
        }
        model.load_state_dict(shared | folded, assign=True)
        for name, buffer in base.named_buffers():
            if name in dict(model.named_buffers()):  # rotary tables are not in the state dict
                parent, _, leaf = name.rpartition(".")
                model.get_submodule(parent)._buffers[leaf] = buffer
        model.tie_weights()
        model.generation_config = copy.deepcopy(base.generation_config)
        self.model = model.requires_grad_(False).eval()
        self.trains = not any(layer.use_dora.get("default", False) for layer in self.layers.values())
        """Whether gradients reach the adapter through this copy."""
        self.held: tuple[str | None, int] | None = None
        """The adapter that `hold` folded in, and the optimizer step of its weights."""
        self.fold()

    def hold(self, adapter: str | None, step: int) -> None:
        """Fold in `adapter` (None: the bare base) unless it is there with its weights of this optimizer step."""
        if self.held != (adapter, step):
            self.fold(adapter)
            self.held = (adapter, step)

    @torch.no_grad()
    def fold(self, adapter: str | None = "default") -> None:
        """Fold the adapter's present weights into the copy."""
        for name, layer in self.layers.items():
            self.model.get_submodule(name).weight.copy_(folded_weight(layer, adapter))


def folded_weight(layer: LoraLayer, adapter: str | None) -> torch.Tensor:
    """W + scale B A in fp32, (out, in); for DoRA (arXiv 2402.09353, equation 5) each row rescaled to its magnitude."""
    weight = layer.base_layer.weight
    dense = dequantize_4bit(weight.data, weight.quant_state) if isinstance(weight, Params4bit) else weight
    if adapter is None:
        return dense
    total = dense.float() + layer.get_delta_weight(adapter).float()
    if layer.use_dora.get(adapter, False):
        total *= (layer.lora_magnitude_vector[adapter].weight.float() / total.norm(dim=1))[:, None]
    return total


def choose(policy: "PeftModel", engine: str) -> tuple[str, str]:
    """(dense or policy, the reason) for `grpo.engine`. Raises UserError where dense is asked for and cannot be."""
    layers = [module for module in policy.get_base_model().modules() if isinstance(module, LoraLayer)]
    size = sum(layer.in_features * layer.out_features for layer in layers) * policy.dtype.itemsize
    obstacle = None
    if any(isinstance(module, ModulesToSaveWrapper) for module in policy.modules()):
        obstacle = "the adapter trains whole modules beside its low-rank ones"
    elif not all(isinstance(layer.base_layer, torch.nn.Linear) for layer in layers):
        obstacle = "the adapter is on layers that are not linear"
    elif not all(isinstance(layer.base_layer.weight, Params4bit) or layer.base_layer.weight.is_floating_point() for layer in layers):
        obstacle = "the base is quantised otherwise than NF4"
    elif policy.device.type == "cuda" and size > torch.cuda.mem_get_info()[0] / 2:
        obstacle = f"a dense copy takes {size / 1e9:.1f} GB, more than half of the GPU memory that is free"
    if engine == "policy":
        return "policy", "as configured"
    if obstacle and engine == "dense":
        raise UserError(f"grpo.engine=dense: {obstacle}. Use grpo.engine=auto or policy.")
    if obstacle:
        return "policy", f"not from a dense copy, {obstacle}"
    return "dense", f"a dense copy of the adapted weights, {size / 1e9:.2f} GB, serves sampling and scoring"


def sampling_model(policy: "PeftModel", engine: str) -> Any:
    """The model that `engine` (dense or policy) samples from, with the policy's present weights."""
    return DensePolicy(policy).model if engine == "dense" else policy


class FoldedLinear(torch.nn.Linear):
    """A linear layer of the dense copy: one product with the folded weight, gradients to the adapter `default`."""

    def __init__(self, layer: LoraLayer) -> None:
        super().__init__(layer.in_features, layer.out_features, bias=layer.base_layer.bias is not None)
        self.lora = (layer,)  # in a tuple: the policy's modules do not become ours

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if not torch.is_grad_enabled():
            return super().forward(x)
        (layer,) = self.lora
        a, b = layer.lora_A["default"].weight, layer.lora_B["default"].weight
        return _Folded.apply(x, self.weight, self.bias, a, b, layer.scaling["default"])


class _Folded(torch.autograd.Function):
    """y = x (W + s B A)^T + bias with gradients of x, A and B: dA = s B^T dy^T x, dB = s dy^T x A^T.

    The folded weight moves with A and B although it is rounded to the compute dtype, as in any training with fp32 master
    weights. Against peft's layer it saves the dequantisation, forth and back, and the two products in fp32.
    """

    @staticmethod
    def forward(
        ctx: Any, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, a: torch.Tensor, b: torch.Tensor, scale: float
    ) -> torch.Tensor:
        ctx.save_for_backward(x, weight, a, b)
        ctx.scale = scale
        return torch.nn.functional.linear(x, weight, bias)

    @staticmethod
    def backward(ctx: Any, dy: torch.Tensor) -> tuple[torch.Tensor | None, None, None, torch.Tensor, torch.Tensor, None]:
        x, weight, a, b = ctx.saved_tensors
        rows, upstream = x.flatten(0, -2), dy.flatten(0, -2)
        inner = rows @ a.to(x.dtype).T  # (tokens, r)
        outer = upstream @ b.to(x.dtype)  # (tokens, r)
        da = ctx.scale * (outer.T @ rows).to(a.dtype)
        db = ctx.scale * (upstream.T @ inner).to(b.dtype)
        return dy @ weight if ctx.needs_input_grad[0] else None, None, None, da, db, None
