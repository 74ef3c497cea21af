"""Where the real files stand, and small helpers."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

SHARED = Path(os.environ.get("FINETUNE_SHARED", Path(__file__).resolve().parents[3] / "shared")) / "data"

needs_shared = pytest.mark.skipif(not SHARED.is_dir(), reason="../shared/data is absent")


def is_canonical(messages: list[dict], *, prompt_only: bool = False) -> bool:
    """At most one system turn, first.

    Then user first, strict alternation (tool turns aside), nothing empty, assistant last.
    """
    roles = [message["role"] for message in messages]
    if roles[:1] == ["system"]:
        roles = roles[1:]
    talk = [role for place, role in enumerate(roles) if not (role == "tool" or (place and roles[place - 1] == "tool"))]
    alternates = talk == [("user", "assistant")[place % 2] for place in range(len(talk))]
    ends = roles[-1] == ("user" if prompt_only else "assistant")
    return alternates and ends and all(message["content"].strip() for message in messages)
