"""Batches of examples: end to end in one row without padding, none seeing another; or padded.

Under flash_attention_2 the varlen kernel takes the examples' boundaries. sdpa has no such kernel on a CPU or a T4: there
`attend` runs it on each example by itself, which costs what the examples cost; transformers' own way, a block-diagonal mask
over the whole row, costs the square of the row.
"""

import random
from collections.abc import Iterator
from typing import Any

import torch
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface, PreTrainedModel

from finetune.errors import UserError

Batch = dict[str, Any]
"""input_ids, labels and position_ids or attention_mask, each (rows, tokens); `ids` and `lengths`, a list entry an example."""

PACKED_SDPA = "packed_sdpa"
"""Name under which `attend` is registered with transformers."""


def attend(
    module: torch.nn.Module, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, attention_mask: None, *,
    lengths: list[int], dropout: float = 0.0, scaling: float | None = None, sliding_window: int | None = None, **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """Causal attention inside each example of a packed row; query, key, value (1, heads, tokens, width), sum(lengths) = tokens.

    Returns (1, tokens, heads, width). Raises UserError where an example is longer than the model's attention window.
    """
    if sliding_window is not None and max(lengths) > sliding_window:
        raise UserError(
            f"sft.packing: an example has {max(lengths)} tokens and the model attends over a window of {sliding_window}, "
            "which packed sdpa does not do. Set sft.packing=none, or lower sft.max_length."
        )
    pieces = [
        scaled_dot_product_attention(*parts, dropout_p=dropout, is_causal=True, scale=scaling, enable_gqa=True)
        for parts in zip(query.split(lengths, 2), key.split(lengths, 2), value.split(lengths, 2), strict=True)
    ]
    return torch.cat(pieces, 2).transpose(1, 2), None


AttentionInterface.register(PACKED_SDPA, attend)


def prepare(model: PreTrainedModel, packing: str) -> None:
    """Switch a model that attends by sdpa to `attend` where examples are packed.

    Raises UserError for an attention that cannot keep packed examples apart.
    """
    attention = model.config._attn_implementation
    if packing == "none" or attention == "flash_attention_2":
        return
    if attention != "sdpa":
        raise UserError(f"sft.packing={packing}: needs flash_attention_2 or sdpa, and model.attention is {attention}. Set sft.packing=none.")
    model.set_attn_implementation(PACKED_SDPA)


def boundaries(lengths: list[int], attention: str, device: torch.device) -> dict[str, Any]:
    """What the attention must know to keep the examples of a packed row apart (transformers' FlashAttentionKwargs for FA2)."""
    if attention == PACKED_SDPA:
        return {"lengths": lengths}
    ends = torch.tensor([0, *lengths], device=device).cumsum(0).to(torch.int32)
    longest = max(lengths)
    return {"cu_seq_lens_q": ends, "cu_seq_lens_k": ends, "max_length_q": longest, "max_length_k": longest}


def concatenate(rows: list[dict[str, Any]], max_length: int, seed: int) -> list[dict[str, Any]]:
    """Rows of up to `max_length` tokens out of examples in random order, as DeepSeekMath trained (section 3.1); none is cut."""
    order = list(rows)
    random.Random(seed).shuffle(order)
    packed: list[dict[str, Any]] = []
    for row in order:
        if packed and packed[-1]["length"] + row["length"] <= max_length:
            last = packed[-1]
            packed[-1] = {key: last[key] + row[key] for key in last}
        else:
            packed.append(row)
    return packed


def examples(rows: list[dict[str, Any]]) -> Iterator[tuple[list[int], list[int]]]:
    """input_ids and labels of each example in the rows."""
    for row in rows:
        start = 0
        for length in row["lengths"]:
            yield row["input_ids"][start : start + length], row["labels"][start : start + length]
            start += length


def flatten(rows: list[dict[str, Any]]) -> Batch:
    """Collator: every example of every row end to end in one row of tokens; the first token of an example is never a target."""
    lengths = [length for row in rows for length in row["lengths"]]
    labels = torch.tensor([label for row in rows for label in row["labels"]])
    starts = torch.tensor([0, *lengths[:-1]]).cumsum(0)
    labels[starts] = -100
    return {
        "input_ids": torch.tensor([[token for row in rows for token in row["input_ids"]]]),
        "labels": labels[None],
        "position_ids": torch.cat([torch.arange(length) for length in lengths])[None],
        "lengths": lengths,
        "ids": [name for row in rows for name in row["ids"]],
    }


def pad(rows: list[dict[str, Any]], pad_token_id: int) -> Batch:
    """Collator: a row an example, padded on the right to the longest."""

    def stack(key: str, fill: int) -> torch.Tensor:
        return torch.nn.utils.rnn.pad_sequence([torch.tensor(row[key]) for row in rows], batch_first=True, padding_value=fill)

    lengths = [row["length"] for row in rows]
    return {
        "input_ids": stack("input_ids", pad_token_id),
        "labels": stack("labels", -100),
        "attention_mask": (torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]).long(),
        "lengths": lengths,
        "ids": [name for row in rows for name in row["ids"]],
    }


def halves(batch: Batch) -> list[Batch]:
    """The batch as two, for a device that has no memory for the whole; as it is where it holds one example only."""
    examples = len(batch["lengths"])
    if examples == 1:
        return [batch]
    middle = examples // 2
    packed = "position_ids" in batch
    cut = sum(batch["lengths"][:middle]) if packed else middle

    def part(start: slice, tokens: slice) -> Batch:
        index = (slice(None), tokens) if packed else tokens
        return {key: value[start] if isinstance(value, list) else value[index] for key, value in batch.items()}

    return [part(slice(0, middle), slice(0, cut)), part(slice(middle, None), slice(cut, None))]
