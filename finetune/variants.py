"""How an adapter starts: LoRA's variants, and the embedding rows of tokens that are trained.

| variant | start | NF4 base | saved as |
|---|---|---|---|
| lora, rslora, dora | B = 0 | yes | as it is |
| pissa (arXiv 2404.02948) | the weights' first singular vectors, taken out of the base | no: it changes the weights | plain LoRA of twice the rank |
| loftq (arXiv 2310.08659) | what NF4 lost of the weights, at low rank | only | plain LoRA of twice the rank |
| eva (arXiv 2410.07170) | the inputs' first singular vectors, B = 0, ranks by explained variance | yes | as it is, with rank_pattern |

pissa and loftq start from a product s * B0 @ A0 that is not zero, so the trained adapter belongs to a base that nobody else has.
It is therefore saved as the difference s * (B @ A - B0 @ A0) to the original base: that merges, serves and goes on like any LoRA.
"""

import logging
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from peft import PeftModel, get_peft_model, initialize_lora_eva_weights
from peft.tuners.lora import Linear4bit
from safetensors.torch import load_file

from finetune import models, packing
from finetune.config import Config, LoraConfig
from finetune.errors import UserError
from finetune.run import Run
from merge.checkpoint import Checkpoint

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

log = logging.getLogger("finetune")

EVA_EXAMPLES = 256
"""Examples whose activations EVA looks at, at most."""

CONVERTED = ("pissa", "loftq")
"""Variants that are saved as the difference to their start."""


def train_tokens(config: LoraConfig, tokenizer: "PreTrainedTokenizerBase") -> list[int]:
    """Ids of `lora.train_tokens`; those that the tokenizer lacks are added to it."""
    added = tokenizer.add_tokens([token for token in config.train_tokens if token not in tokenizer.get_vocab()], special_tokens=True)
    if added:
        log.info("%d tokens added to the tokenizer", added)
    return sorted(tokenizer.convert_tokens_to_ids(config.train_tokens))


def start(
    model: "PreTrainedModel", base: Path, config: Config, dataset: "Dataset", token_rows: list[int], pad_token_id: int
) -> PeftModel:
    """The base, loaded from `base`, with a fresh adapter on it as `lora.variant` says; `dataset` is what EVA looks at.

    Raises UserError where a trained token has no row in the embedding, or peft cannot do the variant on these layers.
    """
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    rows = embedding.weight.shape[0]
    if token_rows and token_rows[-1] >= rows:
        raise UserError(
            f"lora.train_tokens: {token_rows[-1] - rows + 1} more tokens than the embedding's {rows} rows. Take tokens that the model has "
            "but does not use (see its tokenizer's special tokens), or resize the base model first."
        )
    if embedding.padding_idx in token_rows:
        raise UserError("lora.train_tokens: one of them is the model's padding token, whose embedding gets no gradient. Take another token.")
    # Where the LM head has weights of its own, the model can only learn to say a token by that token's row there; peft follows a tie.
    trained = [embedding] if head.weight is embedding.weight else [embedding, head]
    indices = {name.rpartition(".")[2]: token_rows for name, module in model.named_modules() if token_rows and module in trained}
    try:
        policy = get_peft_model(model, models.peft_config(config.lora, indices))
    except (TypeError, ValueError, NotImplementedError) as error:
        raise UserError(f"lora.variant={config.lora.variant}: peft cannot put it on this base ({error}). Choose another variant.") from error
    if config.lora.variant == "loftq":
        start_loftq(policy, base)
    elif config.lora.variant == "eva":
        start_eva(policy, dataset, config.sft.micro_batch_size, pad_token_id)
    return policy


@torch.no_grad()
def start_loftq(policy: PeftModel, base: Path) -> None:
    """B0 @ A0 = the best rank-r approximation of (W - dequant(NF4(W))) / scaling, one LoftQ iteration from the zero adapter.

    peft's replace_lora_weights_loftq does so on a GPU only, and leaves out the scaling (peft.utils.loftq_utils._loftq_init_new).
    """
    from bitsandbytes.functional import dequantize_4bit

    weights = Checkpoint(base)
    for name, module in policy.named_modules():
        if not isinstance(module, Linear4bit):
            continue
        stored = name.removeprefix("base_model.model.") + ".weight"
        if stored not in weights:
            raise UserError(f"{base}: has no tensor {stored}, so LoftQ cannot start from it. Choose another lora.variant.")
        packed = module.get_base_layer().weight
        lost = weights.read_rows(stored).float().to(packed.device) - dequantize_4bit(packed.data, packed.quant_state).float()
        rank = module.r["default"]
        # The randomised SVD of twice the rank; a full one of a 7B's layers takes minutes each.
        left, values, right = torch.svd_lowrank(lost, q=min(2 * rank, *lost.shape), niter=4)
        root = (values[:rank] / module.scaling["default"]).sqrt()
        module.lora_B["default"].weight.copy_(left[:, :rank] * root)
        module.lora_A["default"].weight.copy_((right[:, :rank] * root).T)
    weights.close()


def start_eva(policy: PeftModel, dataset: "Dataset", batch_size: int, pad_token_id: int) -> None:
    """peft's EVA over the supervised tokens of the first examples."""
    count = min(EVA_EXAMPLES, len(dataset))
    rows = [
        {"input_ids": ids, "labels": labels, "length": len(ids), "ids": []}
        for ids, labels in packing.examples([dataset[index] for index in range(count)])
    ]
    batches = [packing.pad(rows[first : first + batch_size], pad_token_id) for first in range(0, len(rows), batch_size)]
    tensors = [{key: value for key, value in batch.items() if isinstance(value, torch.Tensor)} for batch in batches]
    decoder = policy.get_base_model().get_decoder()

    def forward(model: PeftModel, batch: dict[str, Any]) -> Any:
        return decoder(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], use_cache=False)

    log.info("eva: looks at the activations of up to %d examples", count)
    initialize_lora_eva_weights(policy, tensors, forward_fn=forward, show_progress_bar=False)


def keep_initial(policy: PeftModel, config: LoraConfig, run: Run) -> Path | None:
    """Save the start of a variant in CONVERTED to `sft/initial_adapter`, for `models.save_adapter`; None for the others.

    Raises UserError where a resumed run does not come to the same start, for then its base would not be the same either.
    """
    if config.variant not in CONVERTED:
        return None
    folder = run.path("sft/initial_adapter")
    if not folder.is_dir():
        with run.output("sft/initial_adapter") as temporary:
            policy.save_pretrained(temporary)
        return folder
    kept = load_file(folder / "adapter_model.safetensors")
    now = policy.state_dict()
    for name, tensor in kept.items():
        module, _, kind = name.rpartition(".")
        if not torch.equal(tensor, now[f"{module}.default.{kind}"].cpu()):
            raise UserError(f"{folder}: lora.variant={config.variant} starts elsewhere on this machine ({name}). Start a new run.")
    return folder
