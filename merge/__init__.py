"""Fold LoRA adapters into weights that any engine can serve, exactly and with proof.

`fold(base, adapter, out)` writes safetensors; `MergedWeights` streams folded rows to other writers. Every refusal is a MergeError.
Nothing here imports the finetune package or, at import, transformers.
"""

from merge.certificate import Certificate
from merge.errors import MergeError
from merge.fold import fold
from merge.weights import MergedWeights

__all__ = ["Certificate", "MergeError", "MergedWeights", "fold"]
