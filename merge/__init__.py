"""Fold LoRA adapters into weights that any engine can serve, exactly and with proof.

`fold(base, adapter, out)` writes safetensors and a certificate, `to_gguf` writes GGUF; both read the stream of folded
rows that `MergedWeights` gives. `choose_base` measures which base a QLoRA adapter should be folded onto, `Combination`
makes one adapter of several; `modelfile`, `vllm_adapter` and `serving_commands` prepare a server. Every refusal is a
MergeError. Nothing here imports the finetune package or, at import, transformers.
"""

from merge.certificate import Certificate
from merge.combine import Combination
from merge.divergence import choose_base
from merge.errors import MergeError
from merge.fold import fold
from merge.gguf import to_gguf
from merge.gguf_lora import to_gguf_lora
from merge.ollama import modelfile
from merge.serving import VllmAdapter, serving_commands, vllm_adapter
from merge.weights import MergedWeights

__all__ = [
    "Certificate",
    "Combination",
    "MergeError",
    "MergedWeights",
    "VllmAdapter",
    "choose_base",
    "fold",
    "modelfile",
    "serving_commands",
    "to_gguf",
    "to_gguf_lora",
    "vllm_adapter",
]
