"""What GRPO samples from: a dense copy of the policy, refreshed exactly."""

import copy
from typing import TYPE_CHECKING

import torch
from bitsandbytes.functional import dequantize_4bit
from bitsandbytes.nn import Params4bit
from peft.tuners.lora import LoraLayer

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedModel


class DensePolicy:
    """The policy with its weights dense in the compute dtype and the adapter folded in.

    Sampling from an NF4 model dequantises every weight at every token; here it is done once a refresh. The copy holds
    dequant(NF4(W)) + scale B A, summed in fp32 and rounded once: what the trainer scores, up to that rounding. It never goes
    through 4 bits again (peft's merge_adapter on 4-bit layers loses most of a small update). Tensors that the adapter does not
    touch are shared with the policy, so the copy costs 2 bytes for each adapted weight in bf16.
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
        self.refresh()

    @torch.no_grad()
    def refresh(self) -> None:
        """Fold the adapter's present weights into the copy; call it after each optimizer step."""
        for name, layer in self.layers.items():
            weight = layer.base_layer.weight
            dense = dequantize_4bit(weight.data, weight.quant_state) if isinstance(weight, Params4bit) else weight
            self.model.get_submodule(name).weight.copy_(dense.float() + layer.get_delta_weight("default").float())
