"""Worked solutions for generated problems whose generator gives only the answer."""

from __future__ import annotations

import re
from typing import Any

_TERM = re.compile(r"([+-]?)\s*(\d+)")


def chain_sum(metadata: dict[str, Any]) -> str:
    """One line for each addition or subtraction, from left to right.

    >>> print(chain_sum({"expression": "40 - 12 + 7"}))
    40 - 12 = 28
    28 + 7 = 35
    """
    terms = [(sign or "+", int(digits)) for sign, digits in _TERM.findall(metadata["expression"])]
    total = terms[0][1] if terms[0][0] == "+" else -terms[0][1]
    lines = []
    for sign, value in terms[1:]:
        after = total + value if sign == "+" else total - value
        lines.append(f"{total} {sign} {value} = {after}")
        total = after
    return "\n".join(lines)


WORKED_SOLUTIONS = {"chain_sum": chain_sum}
"""reasoning-gym data set -> a function from an item's metadata to its worked solution."""
