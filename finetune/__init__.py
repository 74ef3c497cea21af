"""Fine-tune a causal language model on tutoring or mathematics data with one GPU, and prove each hand-over."""

__version__ = "0.1.0"
