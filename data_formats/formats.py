"""FORMATS: the name of each format and its adapter."""

from __future__ import annotations

from . import chat, math, procedural
from .adapter import Adapter

FORMATS: dict[str, Adapter] = {
    "messages": chat.MESSAGES,
    "sharegpt": chat.SHAREGPT,
    "oasst_tree": chat.OASST_TREE,
    "gsm8k": math.GSM8K,
    "gsm8k_socratic": math.GSM8K_SOCRATIC,
    "math_boxed": math.MATH_BOXED,
    "metamath": math.METAMATH,
    "mathinstruct": math.MATHINSTRUCT,
    "openmathinstruct": math.OPENMATHINSTRUCT,
    "reasoning_gym": procedural.REASONING_GYM,
}
