"""onto='nf4': the base is bitsandbytes' own NF4 round trip, double quantisation included, bit for bit, and the fold on
it is exact."""

from pathlib import Path

import pytest
import torch
from bitsandbytes import functional
from peft import PeftModel
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

import merge
from merge.checkpoint import Checkpoint
from merge.nf4 import Nf4Tensor
from tests.merge.merge_models import bits, gpt2, llama, reference, save_adapter, save_base, written


@pytest.mark.parametrize("shape", [(64, 64), (300, 512), (7, 96), (4100, 520), (3, 50)])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_round_trip_equals_bitsandbytes(shape: tuple[int, int], dtype: torch.dtype, tmp_path: Path) -> None:
    from safetensors.torch import save_file

    weight = (torch.randn(shape, generator=torch.Generator().manual_seed(0)) * 0.03).to(dtype)
    save_file({"w": weight}, tmp_path / "model.safetensors")
    checkpoint = Checkpoint(tmp_path)
    packed, state = functional.quantize_4bit(weight, compress_statistics=True, quant_type="nf4")
    expected = functional.dequantize_4bit(packed, state)
    tensor = Nf4Tensor(checkpoint["w"], checkpoint.read, dtype)
    assert torch.equal(bits(tensor.rows(0, shape[0]).to(dtype)), bits(expected))
    assert torch.equal(tensor.rows(1, shape[0]), expected.float()[1:])


def test_fold_onto_what_qlora_trained(tmp_path: Path) -> None:
    """Against a real 4-bit model: each linear layer dequantised by bitsandbytes, plus peft's delta in fp32, rounded
    once."""
    base = save_base(llama(), tmp_path / "base")
    adapter = save_adapter(base, tmp_path / "adapter", target_modules=["q_proj", "down_proj"])
    certificate = merge.fold(base, adapter, tmp_path / "out", onto="nf4")
    settings = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16,
    )
    model = AutoModelForCausalLM.from_pretrained(
        base, dtype=torch.bfloat16, quantization_config=settings, device_map="cpu"
    )
    expected = {}
    for name, module in model.named_modules():
        if type(module).__name__ == "Linear4bit":
            expected[f"{name}.weight"] = functional.dequantize_4bit(
                module.weight.data, module.weight.quant_state
            ).float()
    assert len(expected) == 14
    tuned = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32), adapter)
    for name, module in tuned.named_modules():
        if hasattr(module, "get_delta_weight"):
            expected[name.removeprefix("base_model.model.") + ".weight"] += module.get_delta_weight("default").detach()
    after, before = written(tmp_path / "out"), written(base)
    for name, tensor in after.items():
        assert torch.equal(bits(tensor), bits(expected.get(name, before[name]).to(torch.bfloat16))), name
    assert certificate.onto == "nf4" and certificate.expected == certificate.changed == 14
    assert (certificate.tensors[0].cosine is None) or 0.9 < certificate.tensors[0].cosine <= 1


def test_saved_modules_are_not_quantised(tmp_path: Path) -> None:
    base = save_base(llama(), tmp_path / "base")
    adapter = save_adapter(base, tmp_path / "adapter", modules_to_save=["lm_head"])
    merge.fold(base, adapter, tmp_path / "out", onto="nf4")
    assert torch.equal(
        written(tmp_path / "out")["lm_head.weight"], reference(base, [adapter])["lm_head.weight"].bfloat16()
    )


def test_unknown_family_is_refused(tmp_path: Path) -> None:
    base = save_base(gpt2(), tmp_path / "base")
    adapter = save_adapter(base, tmp_path / "adapter", target_modules=["c_attn"], fan_in_fan_out=True)
    with pytest.raises(merge.MergeError, match="model_type 'gpt2'"):
        merge.fold(base, adapter, tmp_path / "out", onto="nf4")
