"""The measured divergence equals that of the whole models in transformers, and the choice follows it."""

import math
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

import merge
from merge.divergence import compare, log_probabilities
from tests.merge.merge_models import gpt2, llama, save_adapter, save_base, written

PROMPTS = [[1, 5, 9, 33, 7], [2], list(range(40, 70))]


def whole(model) -> torch.Tensor:
    with torch.no_grad():
        return torch.cat([model(torch.tensor([prompt])).logits[0].float().log_softmax(-1) for prompt in PROMPTS])


@pytest.mark.parametrize("tied", [False, True])
def test_layer_at_a_time_equals_the_whole_model(tied: bool, tmp_path: Path) -> None:
    base = save_base(llama(tie_word_embeddings=tied), tmp_path / "base")
    adapter = save_adapter(base, tmp_path / "adapter", use_dora=True)
    merge.fold(base, adapter, tmp_path / "out")
    layered = log_probabilities(merge.MergedWeights(base, adapter, "full"), PROMPTS, rounded=True)
    assert torch.allclose(
        layered, whole(AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)), atol=1e-5
    )


def test_choice_and_report(tmp_path: Path) -> None:
    """The trained policy is peft's unmerged adapter over the dequantised weights: rebuilt here with peft, and the
    numbers agree."""
    base = save_base(llama(initializer_range=0.2), tmp_path / "base")
    adapter = save_adapter(base, tmp_path / "adapter")
    chosen, report = merge.choose_base(base, adapter, PROMPTS)
    assert chosen == "nf4" and report["nf4"]["kl"] < report["full"]["kl"] / 10 and report["tokens"] == 36

    plain = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    zero = save_adapter(base, tmp_path / "zero")
    from safetensors.torch import load_file, save_file

    tensors = {
        name: tensor * ("lora_A" in name) for name, tensor in load_file(zero / "adapter_model.safetensors").items()
    }
    save_file(tensors, zero / "adapter_model.safetensors")
    merge.fold(base, zero, tmp_path / "dequantised", onto="nf4")
    plain.load_state_dict({name: tensor.float() for name, tensor in written(tmp_path / "dequantised").items()})
    trained = whole(PeftModel.from_pretrained(plain, adapter))
    for onto in ("full", "nf4"):
        merge.fold(base, adapter, tmp_path / onto, onto=onto)
        expected = compare(trained, whole(AutoModelForCausalLM.from_pretrained(tmp_path / onto, dtype=torch.float32)))
        assert math.isclose(report[onto]["kl"], expected["kl"], rel_tol=0.02, abs_tol=1e-6)
        assert report[onto]["argmax_agreement"] == pytest.approx(expected["argmax_agreement"], abs=0.03)


def test_kl_by_hand() -> None:
    p, q = torch.tensor([[0.5, 0.5], [0.9, 0.1]]).log(), torch.tensor([[0.25, 0.75], [0.9, 0.1]]).log()
    result = compare(p, q)
    assert result["kl"] == pytest.approx((0.5 * math.log(2) + 0.5 * math.log(0.5 / 0.75)) / 2)
    assert result["argmax_agreement"] == 0.5


def test_refusals(tmp_path: Path) -> None:
    base = save_base(llama(), tmp_path / "base")
    adapter = save_adapter(base, tmp_path / "adapter")
    with pytest.raises(merge.MergeError, match="no sample prompts"):
        merge.choose_base(base, adapter, [])
    with pytest.raises(merge.MergeError, match="token 500; the model has 101"):
        merge.choose_base(base, adapter, [[500]])
    other = save_base(gpt2(), tmp_path / "other")
    with pytest.raises(merge.MergeError, match="gpt2"):
        merge.choose_base(
            other, save_adapter(other, tmp_path / "a2", target_modules=["c_attn"], fan_in_fan_out=True), [[1]]
        )
