"""Packed batches equal unpacked ones, token by token and in their gradients."""

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM, DataCollatorWithFlattening

from finetune import packing, sft
from finetune.errors import UserError


def load(folder: Path, attention: str = "sdpa", packed: str = "none", **overrides: object) -> PeftModel:
    """The tiny model in fp32 with an adapter that is not zero, the same at each call."""
    torch.manual_seed(0)
    base = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation=attention, **overrides)
    model = get_peft_model(base, LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM"))
    generator = torch.Generator().manual_seed(1)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.data = torch.randn(parameter.shape, generator=generator) * 0.05
    packing.prepare(model.get_base_model(), packed)
    return model


def make_rows(lengths: list[int], seed: int = 0) -> list[dict[str, Any]]:
    generator = torch.Generator().manual_seed(seed)
    rows = []
    for number, length in enumerate(lengths):
        ids = torch.randint(3, 300, (length,), generator=generator).tolist()
        labels = [-100] * (length // 2) + ids[length // 2 :]
        rows.append({"input_ids": ids, "labels": labels, "ids": [f"row {number}"], "lengths": [length], "length": length})
    return rows


def gradients(model: PeftModel) -> dict[str, torch.Tensor]:
    return {name: parameter.grad.clone() for name, parameter in model.named_parameters() if parameter.grad is not None}


def assert_same_gradients(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> None:
    assert first.keys() == second.keys() and first
    for name in first:
        torch.testing.assert_close(first[name], second[name], rtol=1e-4, atol=1e-5, msg=name)


LENGTHS = [17, 5, 40, 2, 23]


def test_packed_logits_equal_those_of_each_example_alone(tiny_model: Path) -> None:
    rows = make_rows(LENGTHS)
    plain, packed = load(tiny_model), load(tiny_model, packed="batch")
    batch = packing.flatten(rows)
    with torch.no_grad():
        found = packed(input_ids=batch["input_ids"], position_ids=batch["position_ids"], lengths=batch["lengths"]).logits[0]
        alone = torch.cat([plain(input_ids=torch.tensor([row["input_ids"]])).logits[0] for row in rows])
    torch.testing.assert_close(found, alone, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_packed_loss_and_gradients_equal_padded(tiny_model: Path, checkpointing: bool) -> None:
    rows = make_rows(LENGTHS)
    plain, packed = load(tiny_model), load(tiny_model, packed="batch")
    if checkpointing:
        packed.get_base_model().gradient_checkpointing_enable({"use_reentrant": False})
        packed.train()
    padded_loss, padded_count = sft.nll(plain, packing.pad(rows, pad_token_id=0))
    packed_loss, packed_count = sft.nll(packed, packing.flatten(rows))
    padded_loss.backward()
    packed_loss.backward()
    assert padded_count == packed_count == sum(length - length // 2 for length in LENGTHS)
    torch.testing.assert_close(packed_loss, padded_loss, rtol=1e-5, atol=1e-4)
    assert_same_gradients(gradients(packed), gradients(plain))


def test_flash_attention_gets_the_boundaries_that_transformers_gives_it() -> None:
    """No GPU here: the arguments are those of transformers' own collator for FA2's varlen kernel."""
    rows = make_rows(LENGTHS)
    expected = DataCollatorWithFlattening(return_flash_attn_kwargs=True)([{"input_ids": row["input_ids"], "labels": row["labels"]} for row in rows])
    batch = packing.flatten(rows)
    found = packing.boundaries(batch["lengths"], "flash_attention_2", torch.device("cpu"))
    for key in ("cu_seq_lens_q", "cu_seq_lens_k"):
        assert found[key].tolist() == expected[key].tolist() and found[key].dtype == expected[key].dtype
    assert found["max_length_q"] == expected["max_length_q"] == max(LENGTHS)
    assert batch["position_ids"].tolist() == expected["position_ids"].tolist()
    assert batch["input_ids"].tolist() == expected["input_ids"].tolist()


@pytest.mark.parametrize("packed", [False, True])
def test_halves_add_up(tiny_model: Path, packed: bool) -> None:
    rows = make_rows(LENGTHS)
    batch = packing.flatten(rows) if packed else packing.pad(rows, pad_token_id=0)
    model = load(tiny_model, packed="batch" if packed else "none")
    whole, count = sft.nll(model, batch)
    whole.backward()
    expected = gradients(model)
    model.zero_grad()
    parts = [half for part in packing.halves(batch) for half in packing.halves(part)]
    assert [part["ids"] for part in parts] == [["row 0"], ["row 1"], ["row 2"], ["row 3", "row 4"]]
    losses = [sft.nll(model, part) for part in parts]
    total = sum((loss for loss, _ in losses), torch.zeros(()))
    total.backward()
    assert sum(number for _, number in losses) == count
    torch.testing.assert_close(total, whole, rtol=1e-5, atol=1e-4)
    assert_same_gradients(gradients(model), expected)
    assert packing.halves(parts[0]) == [parts[0]]


def test_rows_hold_every_example_whole_and_in_random_order() -> None:
    rows = make_rows([30, 10, 20, 5, 25, 40, 8, 12, 33, 7] * 3)
    packed = packing.concatenate(rows, 50, seed=1)
    assert all(row["length"] == sum(row["lengths"]) == len(row["input_ids"]) <= 50 for row in packed)
    found = sorted(tuple(ids) for ids, _ in packing.examples(packed))
    assert found == sorted(tuple(row["input_ids"]) for row in rows)
    assert len(packed) < len(rows)
    assert packing.concatenate(rows, 50, seed=1) == packed != packing.concatenate(rows, 50, seed=2)


def test_what_cannot_keep_examples_apart_is_refused(tiny_model: Path) -> None:
    with pytest.raises(UserError, match="model.attention is eager. Set sft.packing=none"):
        load(tiny_model, attention="eager", packed="batch")
    query = torch.zeros(1, 2, 9, 8)
    with pytest.raises(UserError, match="window of 4"):
        packing.attend(torch.nn.Identity(), query, query, query, None, lengths=[5, 4], sliding_window=4)
