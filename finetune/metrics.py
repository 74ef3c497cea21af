"""The figures of an evaluation: intervals, paired tests, pass@K and maj@K. Plain functions of numbers and texts."""

import math
from collections.abc import Sequence

import numpy as np

from finetune import answers

RESAMPLES = 2000
"""Bootstrap samples behind an interval."""


def wilson(successes: int, total: int) -> tuple[float, float]:
    """95% confidence interval of a share (Wilson's score interval).

    >>> [round(bound, 3) for bound in wilson(50, 100)]
    [0.404, 0.596]
    """
    if total == 0:
        return 0.0, 1.0
    z, share = 1.959964, successes / total
    centre = (share + z * z / (2 * total)) / (1 + z * z / total)
    half = z * math.sqrt(share * (1 - share) / total + z * z / (4 * total * total)) / (1 + z * z / total)
    return max(0.0, centre - half), min(1.0, centre + half)


def mcnemar(gained: int, lost: int) -> float:
    """Two-sided exact p-value that two models are equally good, from the problems that only one of them solved (McNemar).

    >>> mcnemar(0, 0), mcnemar(10, 0)
    (1.0, 0.001953125)
    """
    discordant = gained + lost
    tail = sum(math.comb(discordant, k) for k in range(min(gained, lost) + 1)) / 2**discordant
    return min(1.0, 2 * tail)


def bootstrap(values: Sequence[float], seed: int = 0) -> tuple[float, float]:
    """95% interval of the mean of `values` (one a problem): percentiles of the means of RESAMPLES resampled problems.

    Give the differences of two models, problem by problem, for the paired interval of their difference.

    >>> bootstrap([0.5, 0.5, 0.5])
    (0.5, 0.5)
    """
    column = np.asarray(values, dtype=float)
    random = np.random.default_rng(seed)
    means = [column[random.integers(0, len(column), len(column))].mean() for _ in range(RESAMPLES)]
    low, high = np.percentile(means, [2.5, 97.5])
    return float(low), float(high)


def pass_at_k(samples: int, correct: int, k: int) -> float:
    """Unbiased estimate of the chance that one of `k` samples is right, from `samples` of which `correct` are:
    1 - C(n - c, k) / C(n, k) (arXiv 2107.03374, equation 1).

    >>> pass_at_k(4, 1, 2), pass_at_k(4, 0, 2), pass_at_k(4, 3, 2)
    (0.5, 0.0, 1.0)
    """
    if not 1 <= k <= samples or not 0 <= correct <= samples:
        raise ValueError(f"pass@{k} of {samples} samples with {correct} right: expected 1 <= k <= samples and 0 <= correct <= samples")
    return 1 - math.comb(samples - correct, k) / math.comb(samples, k)


def powers_up_to(k: int) -> list[int]:
    """The k at which pass@k is shown: 1, 2, 4, ... and `k` itself.

    >>> powers_up_to(6)
    [1, 2, 4, 6]
    """
    return [1 << power for power in range(k.bit_length()) if 1 << power < k] + [k]


def majority(found: Sequence[str | None], answer_type: str | None = None) -> int | None:
    r"""Index of the first completion with the answer that most completions have, equal answers counted together (maj@K).

    No answer is no vote; a tie goes to the answer that came first. None where there is no answer at all.

    >>> majority(["3", "0.5", None, "1/2"]), majority([None]), majority(["7", "8"])
    (1, None, 0)
    """
    groups: list[list[int]] = []
    for index, text in enumerate(found):
        if text is None:
            continue
        same = answers.verify([(found[group[0]], text) for group in groups], answer_types=[answer_type] * len(groups))
        if any(same):
            groups[same.index(True)].append(index)
        else:
            groups.append([index])
    return max(groups, key=len)[0] if groups else None
