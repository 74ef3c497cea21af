"""How far each way of merging a QLoRA adapter is from the policy that was trained, measured on sample prompts.

QLoRA trains an adapter on dequant(NF4(W)). Folded into W it meets weights that differ by the quantisation error; folded
into dequant(NF4(W)) it meets its own, but keeps that error. `choose_base` measures both against the trained policy:
dequant(NF4(W)) plus the adapter in fp32, not rounded, which is what the unmerged model computes. The model runs a layer
at a time, so a 7B needs about 2 GB; everything is computed in fp32, so that only weights differ.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from merge.errors import MergeError
from merge.weights import OUTPUT_EMBEDDINGS, MergedWeights

FAMILIES = ("llama",)
EMBEDDINGS = "model.embed_tokens.weight"


def choose_base(
    base: str | Path,
    adapter: str | Path | Sequence[str | Path],
    prompts: Sequence[Sequence[int]],
    dtype: str | torch.dtype | None = None,
) -> tuple[str, dict[str, Any]]:
    """('full' or 'nf4', report): the way of merging with the smaller KL divergence from the trained policy over all
    positions of the prompts' token ids.

    The report gives for each way `kl`, the mean of KL(trained || merged) in nats a token, and `argmax_agreement`, the
    share of positions with the same most likely token; and the number of `tokens`. Raises MergeError for a model that
    is not of the Llama family or for no prompts.
    """
    lengths = [len(prompt) for prompt in prompts]
    if not lengths or min(lengths) == 0:
        raise MergeError(
            "no sample prompts to compare the two ways of merging on; give at least one, each with a token or more."
        )
    trained = log_probabilities(MergedWeights(base, adapter, "nf4", dtype), prompts, rounded=False)
    report: dict[str, Any] = {"tokens": sum(lengths)}
    for onto in ("full", "nf4"):
        merged = log_probabilities(MergedWeights(base, adapter, onto, dtype), prompts, rounded=True)
        report[onto] = compare(trained, merged)
    return min(("full", "nf4"), key=lambda onto: report[onto]["kl"]), report


def compare(trained: torch.Tensor, merged: torch.Tensor) -> dict[str, float]:
    """Mean KL(trained || merged) in nats and share of equal argmax, of two (tokens, vocabulary) tensors of
    log-probabilities."""
    kl = [
        (p.exp() * (p - q)).sum(-1).mean().item() * len(p)
        for p, q in zip(trained.split(64), merged.split(64), strict=True)
    ]
    agreement = (trained.argmax(-1) == merged.argmax(-1)).float().mean().item()
    return {"kl": sum(kl) / len(trained), "argmax_agreement": agreement}


@torch.no_grad()
def log_probabilities(weights: MergedWeights, prompts: Sequence[Sequence[int]], rounded: bool) -> torch.Tensor:
    """Log-probabilities of the next token at each position of each prompt, fp32, shape (all tokens, vocabulary);
    `rounded`: with the weights as they would be written, else as folded in fp32."""
    from transformers import AutoConfig, AutoModelForCausalLM

    kind = weights.config.get("model_type")
    if kind not in FAMILIES:
        raise MergeError(
            f"comparing the two ways of merging layer by layer is for the Llama family, this is {kind!r}; set merge.onto to full or nf4."
        )
    settings = AutoConfig.for_model(**weights.config)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(settings, attn_implementation="sdpa").eval()
    rotary = type(model.model.rotary_emb)(config=model.config)

    def tensor(name: str) -> torch.Tensor:
        """One whole tensor, fp32."""
        info = weights.tensors[name]
        with weights.open(name) as stream:
            rows = torch.cat([stream.rows(start, stop) for start, stop in stream.blocks()])
        return rows.to(info.dtype).float() if rounded else rows

    def load(module: torch.nn.Module, prefix: str) -> torch.nn.Module:
        module.load_state_dict({name: tensor(f"{prefix}.{name}") for name in module.state_dict()}, assign=True)
        return module

    def row(token: int) -> torch.Tensor:
        value = weights.rows(EMBEDDINGS, token, token + 1)
        return value.to(weights.tensors[EMBEDDINGS].dtype).float() if rounded else value

    try:
        vocabulary = weights.tensors[EMBEDDINGS].shape[0]
        outside = [token for prompt in prompts for token in prompt if not 0 <= token < vocabulary]
        if outside:
            raise MergeError(f"a sample prompt holds token {outside[0]}; the model has {vocabulary} tokens.")
        embedded = {token: row(token) for token in sorted({token for prompt in prompts for token in prompt})}
        states = [torch.cat([embedded[token] for token in prompt])[None] for prompt in prompts]
        for number in range(settings.num_hidden_layers):
            layer = load(model.model.layers[number], f"model.layers.{number}")
            for index, state in enumerate(states):
                positions = torch.arange(state.shape[1])[None]
                states[index] = layer(
                    state, attention_mask=None, position_ids=positions, position_embeddings=rotary(state, positions)
                )
            layer.to("meta")
        hidden = load(model.model.norm, "model.norm")(torch.cat(states, dim=1))[0]
        name = OUTPUT_EMBEDDINGS if OUTPUT_EMBEDDINGS in weights.tensors else EMBEDDINGS
        with weights.open(name) as stream:
            blocks = []
            for start, stop in stream.blocks():
                rows = stream.rows(start, stop)
                blocks.append(hidden @ (rows.to(weights.tensors[name].dtype).float() if rounded else rows).T)
        return torch.cat(blocks, dim=1).log_softmax(-1)
    finally:
        weights.close()
