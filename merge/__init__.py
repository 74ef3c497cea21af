"""Fold LoRA adapters into weights that any engine can serve, exactly and with proof.

`fold(base, adapter, out)` writes safetensors and a certificate, `to_gguf` writes GGUF; both read the stream of folded
rows that `MergedWeights` gives. `choose_base` measures which base a QLoRA adapter should be folded onto, `Combination`
makes one adapter of several. Every refusal is a MergeError. Nothing here imports the finetune package or, at import,
transformers.
"""

from typing import TYPE_CHECKING, Any

from merge.certificate import Certificate
from merge.combine import Combination
from merge.divergence import choose_base
from merge.errors import MergeError
from merge.fold import fold
from merge.weights import MergedWeights

if TYPE_CHECKING:
    from merge.gguf import to_gguf

__all__ = ["Certificate", "Combination", "MergeError", "MergedWeights", "choose_base", "fold", "to_gguf"]


def __getattr__(name: str) -> Any:
    """`to_gguf` on first use: it needs the gguf package, which folding does not."""
    if name != "to_gguf":
        raise AttributeError(f"module 'merge' has no attribute {name!r}")
    from merge.gguf import to_gguf

    return to_gguf
