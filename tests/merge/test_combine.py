"""Combining adapters: each method against its definition, and the two ways out (an adapter of a rank, or a fold)."""

import json
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

import merge
from merge.combine import METHODS, dare, linear, slerp, ties
from tests.merge.merge_models import bits, llama, save_adapter, save_base, written


def generator() -> torch.Generator:
    return torch.Generator().manual_seed(0)


@pytest.fixture
def deltas() -> list[torch.Tensor]:
    return [torch.randn(20, 30, generator=torch.Generator().manual_seed(seed)) for seed in (1, 2)]


def test_linear(deltas: list[torch.Tensor]) -> None:
    assert torch.allclose(linear(deltas, [0.25, 2.0], 1.0, generator()), 0.25 * deltas[0] + 2 * deltas[1])


def test_ties_by_hand() -> None:
    """The paper's three steps on five positions: trim 2 of 5, elect the heavier sign, average those that agree."""
    first, second = torch.tensor([5.0, -4.0, 3.0, 0.1, 0.2]), torch.tensor([-1.0, -6.0, 7.0, 4.0, 0.1])
    merged = ties([first, second], [0.5, 0.5], 0.6, generator())
    assert torch.allclose(merged, torch.tensor([5.0, -5.0, 5.0, 4.0, 0.0]))


def test_dare_keeps_the_mean_and_the_seed(deltas: list[torch.Tensor]) -> None:
    ones = [torch.ones(500, 400)] * 2
    merged = dare(ones, [0.5, 0.5], 0.3, generator())
    assert merged.mean().item() == pytest.approx(1.0, abs=0.02)
    assert torch.equal(merged, dare(ones, [0.5, 0.5], 0.3, generator()))
    assert set((dare(deltas, [1.0, 0.0], 0.5, generator()) / deltas[0]).round(decimals=3).unique().tolist()) == {
        0.0,
        2.0,
    }


def test_slerp_keeps_the_norm_and_meets_the_ends(deltas: list[torch.Tensor]) -> None:
    first, second = (delta / delta.norm() for delta in deltas)
    for way in (0.0, 0.3, 1.0):
        assert slerp([first, second], [1 - way, way], 1.0, generator()).norm().item() == pytest.approx(1.0, abs=1e-5)
    assert torch.allclose(slerp([first, second], [1.0, 0.0], 1.0, generator()), first, atol=1e-6)
    assert torch.allclose(slerp([first, first], [0.5, 0.5], 1.0, generator()), first)


@pytest.fixture
def pair(tmp_path: Path) -> tuple[Path, list[Path]]:
    """A base and two adapters of different ranks, scales and targets."""
    base = save_base(llama(), tmp_path / "base", torch.float32)
    first = save_adapter(base, tmp_path / "first", r=4)
    return base, [
        first,
        save_adapter(base, tmp_path / "second", r=7, use_rslora=True, target_modules=["q_proj", "v_proj"], seed=4),
    ]


def peft_deltas(base: Path, adapter: Path) -> dict[str, torch.Tensor]:
    tuned = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32), adapter)
    modules = {name.removeprefix("base_model.model.") + ".weight": module for name, module in tuned.named_modules()}
    return {
        name: module.get_delta_weight("default").detach()
        for name, module in modules.items()
        if hasattr(module, "get_delta_weight")
    }


@pytest.mark.parametrize("method", METHODS)
def test_fold_of_a_combination(method: str, pair: tuple[Path, list[Path]], tmp_path: Path) -> None:
    base, adapters = pair
    certificate = merge.fold(base, merge.Combination(adapters, method, [0.7, 0.3]), tmp_path / "out")
    assert certificate.changed == certificate.expected == 6 and len(certificate.adapters) == 2
    assert any(method in note for note in certificate.notes)
    first, second = (peft_deltas(base, adapter) for adapter in adapters)
    before, after = written(base), written(tmp_path / "out")
    for name, tensor in after.items():
        some = first.get(name, second.get(name))
        if some is None:
            assert torch.equal(bits(tensor), bits(before[name]))
        elif method == "linear":
            zero = torch.zeros_like(some)
            assert torch.allclose(
                tensor, before[name] + 0.7 * first.get(name, zero) + 0.3 * second.get(name, zero), atol=1e-7
            )


def test_saved_at_full_rank_it_is_the_fold(pair: tuple[Path, list[Path]], tmp_path: Path) -> None:
    """Ranks 4 and 7: an adapter of rank 11 holds their sum; the same folded directly agrees, and peft loads it."""
    base, adapters = pair
    kept = merge.Combination(adapters).save(tmp_path / "both", 11, base)
    assert min(kept.values()) == pytest.approx(1.0, abs=1e-5)
    merge.fold(base, tmp_path / "both", tmp_path / "by_adapter")
    merge.fold(base, merge.Combination(adapters), tmp_path / "directly")
    one, other = written(tmp_path / "by_adapter"), written(tmp_path / "directly")
    assert all(torch.allclose(one[name], other[name], atol=1e-6) for name in one)
    loaded, direct = peft_deltas(base, tmp_path / "both"), peft_deltas(base, adapters[0])
    name = "model.layers.0.mlp.down_proj.weight"
    assert torch.allclose(loaded[name], 0.5 * direct[name], atol=1e-6)


def test_a_smaller_rank_is_the_best_one(pair: tuple[Path, list[Path]], tmp_path: Path) -> None:
    base, adapters = pair
    kept = merge.Combination(adapters).save(tmp_path / "small", 3, base)
    for name, delta in peft_deltas(base, tmp_path / "small").items():
        some = [peft_deltas(base, adapter).get(name) for adapter in adapters]
        dense = sum(0.5 * one for one in some if one is not None)
        values = torch.linalg.svdvals(dense)
        assert (delta - dense).norm() == pytest.approx(values[3:].norm().item(), rel=1e-3)
        assert kept[name] == pytest.approx((values[:3].square().sum() / values.square().sum()).item(), rel=1e-3)


def test_refusals(pair: tuple[Path, list[Path]], tmp_path: Path) -> None:
    base, adapters = pair
    for words, arguments in {
        "expected one of linear": {"method": "mean"},
        "exactly 2": {"method": "slerp", "adapters": [*adapters, adapters[0]]},
        "at least 2": {"adapters": adapters[:1]},
        "expected one for each": {"weights": [1.0]},
        "density = 0": {"density": 0},
    }.items():
        with pytest.raises(merge.MergeError, match=words):
            merge.Combination(**{"adapters": adapters, **arguments})
    dora = save_adapter(base, tmp_path / "dora", use_dora=True)
    with pytest.raises(merge.MergeError, match="only plain LoRA can be combined"):
        merge.fold(base, merge.Combination([adapters[0], dora]), tmp_path / "out")
    assert json.loads((adapters[0] / "adapter_config.json").read_text())["r"] == 4
