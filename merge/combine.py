"""Combine several LoRA adapters of one base into one: linear, TIES, DARE or SLERP, for the same or different ranks.

    combination = Combination(["maths", "tutor"], method="ties", weights=[0.6, 0.4])
    combination.save("both", rank=32)          # an adapter again: the best approximation of that rank
    fold("base", combination, "merged")        # or folded, with nothing lost to a rank

Each method is a pure function of dense deltas (scale * B @ A, fp32) of one tensor. A tensor's deltas are in memory at
once: on a 7B model about 1 GB.
"""

import json
import zlib
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from safetensors.torch import save_file

from merge.adapter import PREFIX, Adapter
from merge.checkpoint import Checkpoint, TensorInfo
from merge.errors import MergeError
from merge.updates import LowRank, Undo, Update

Deltas = list[torch.Tensor]


def linear(deltas: Deltas, weights: list[float], density: float, generator: torch.Generator) -> torch.Tensor:
    """sum_i w_i d_i (model soups, arXiv 2203.05482; task arithmetic, arXiv 2212.04089)."""
    return torch.stack([weight * delta for weight, delta in zip(weights, deltas, strict=True)]).sum(0)


def ties(deltas: Deltas, weights: list[float], density: float, generator: torch.Generator) -> torch.Tensor:
    """Keep each delta's largest `density` of values, elect a sign for each position by weight, average those that agree
    (TIES, arXiv 2306.01708)."""
    trimmed = []
    for weight, delta in zip(weights, deltas, strict=True):
        keep = max(round(density * delta.numel()), 1)
        threshold = delta.abs().flatten().kthvalue(delta.numel() - keep + 1).values
        trimmed.append(weight * torch.where(delta.abs() >= threshold, delta, 0.0))
    values = torch.stack(trimmed)
    agree = torch.sign(values) == torch.sign(values.sum(0))
    agree &= values != 0
    mass = (agree * torch.tensor(weights).abs().view(-1, *[1] * (values.dim() - 1))).sum(0)
    return (values * agree).sum(0) / mass.clamp(min=1e-12) * sum(map(abs, weights))


def dare(deltas: Deltas, weights: list[float], density: float, generator: torch.Generator) -> torch.Tensor:
    """Drop values at random, keeping `density` of them scaled by 1 / density, then add up (DARE, arXiv 2311.03099)."""
    kept = [torch.rand(delta.shape, generator=generator) < density for delta in deltas]
    return linear(
        [delta * mask / density for delta, mask in zip(deltas, kept, strict=True)], weights, density, generator
    )


def slerp(deltas: Deltas, weights: list[float], density: float, generator: torch.Generator) -> torch.Tensor:
    """Between two deltas along the arc that joins them, at w_2 / (w_1 + w_2) of the way (Shoemake 1985); along the
    chord where they are parallel."""
    first, second = deltas
    way = weights[1] / sum(weights)
    cosine = torch.nn.functional.cosine_similarity(first.flatten().double(), second.flatten().double(), dim=0).clamp(
        -1, 1
    )
    angle = torch.arccos(cosine).item()
    sine = torch.sin(torch.tensor(angle)).item()
    if sine < 1e-4:
        return (1 - way) * first + way * second
    parts = [torch.sin(torch.tensor(angle * share)).item() / sine for share in (1 - way, way)]
    return parts[0] * first + parts[1] * second


METHODS: dict[str, Callable[[Deltas, list[float], float, torch.Generator], torch.Tensor]] = {
    "linear": linear,
    "ties": ties,
    "dare": dare,
    "slerp": slerp,
}


class Combination:
    """Adapters of one base and how to combine them. `weights` default to equal shares of 1; `density` counts for ties
    and dare, `seed` for dare."""

    def __init__(
        self,
        adapters: Sequence[str | Path],
        method: str = "linear",
        weights: Sequence[float] | None = None,
        density: float = 0.5,
        seed: int = 0,
    ):
        if method not in METHODS:
            raise MergeError(f"method = {method!r}; expected one of {', '.join(METHODS)}.")
        if len(adapters) < 2 or (method == "slerp" and len(adapters) != 2):
            raise MergeError(
                f"{len(adapters)} adapter(s) given; {method} combines {'exactly 2' if method == 'slerp' else 'at least 2'}."
            )
        self.weights = list(weights) if weights is not None else [1 / len(adapters)] * len(adapters)
        if len(self.weights) != len(adapters) or sum(self.weights) == 0:
            raise MergeError(
                f"weights = {self.weights}; expected one for each of the {len(adapters)} adapters, with a sum other than 0."
            )
        if not 0 < density <= 1:
            raise MergeError(f"density = {density}; expected a share above 0 and at most 1.")
        self.method, self.density, self.seed = method, density, seed
        self.parts = [Adapter(folder) for folder in adapters]
        self.folder = self.parts[-1].folder
        self.config: dict[str, object] = {}

    def describe(self) -> str:
        parts = ", ".join(
            f"{weight:g} x {part.folder.name}" for weight, part in zip(self.weights, self.parts, strict=True)
        )
        return f"{self.method} of {parts} (density {self.density:g}, seed {self.seed})"

    def plan(self, base: Checkpoint, lm_head: TensorInfo | None = None) -> dict[str, list[Update]]:
        """As `Adapter.plan`; MergeError for an adapter that does more than add scale * B @ A."""
        plans = [part.plan(base, lm_head) for part in self.parts]
        return {
            name: [Combined(self, name, [(i, p[name]) for i, p in enumerate(plans) if name in p])]
            for name in dict.fromkeys(n for p in plans for n in p)
        }

    def delta(self, name: str, deltas: dict[int, torch.Tensor]) -> torch.Tensor:
        """The combined delta of one tensor from those that have one (number of the adapter -> delta); the others count
        as zero."""
        some = next(iter(deltas.values()))
        every = [deltas.get(number, torch.zeros_like(some)) for number in range(len(self.parts))]
        generator = torch.Generator().manual_seed(self.seed + zlib.crc32(name.encode()))
        return METHODS[self.method](every, self.weights, self.density, generator)

    def save(self, out: str | Path, rank: int, base: str | Path) -> dict[str, float]:
        """Write the combination as a LoRA adapter of one rank, by a truncated SVD; returns the share of each delta's
        square that the rank keeps."""
        out = Path(out)
        if out.exists():
            raise MergeError(f"{out} exists already; give another folder or remove it.")
        tensors, kept = {}, {}
        for name, (update,) in self.plan(Checkpoint(base)).items():
            assert isinstance(update, Combined)
            if update.transposed:
                raise MergeError(
                    f"{name}: a combined adapter is written for linear layers only; fold the combination instead."
                )
            update.load()
            delta = update.value
            update.unload()
            torch.manual_seed(self.seed)
            u, s, v = torch.svd_lowrank(delta, q=min(rank + 8, *delta.shape), niter=6)
            kept[name] = (s[:rank].square().sum() / delta.square().sum().clamp(min=1e-30)).item()
            root = s[:rank].sqrt()
            missing = rank - len(root)
            module = PREFIX + name.removesuffix(".weight")
            tensors[f"{module}.lora_A.weight"] = torch.nn.functional.pad(
                (root[:, None] * v.T[:rank]), (0, 0, 0, missing)
            ).contiguous()
            tensors[f"{module}.lora_B.weight"] = torch.nn.functional.pad(u[:, :rank] * root, (0, missing)).contiguous()
        first = self.parts[0].config
        config = {
            "peft_type": "LORA", "task_type": first.get("task_type"), "base_model_name_or_path": first.get("base_model_name_or_path"),
            "r": rank, "lora_alpha": rank, "lora_dropout": 0.0, "bias": "none", "inference_mode": True,
            "target_modules": sorted({name.removesuffix(".weight").rpartition(".")[2] for name in kept}),
        }  # fmt: skip
        out.mkdir()
        save_file(tensors, out / "adapter_model.safetensors", metadata={"format": "pt"})
        (out / "adapter_config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
        self.close()
        return kept

    def close(self) -> None:
        for part in self.parts:
            part.close()


class Combined:
    """W + the combined delta of one tensor."""

    whole = False

    def __init__(self, combination: Combination, name: str, updates: list[tuple[int, list[Update]]]):
        self.combination, self.name = combination, name
        self.updates: list[tuple[int, LowRank]] = []
        for number, plan in updates:
            if (
                len(plan) != 1
                or not isinstance(plan[0], LowRank)
                or isinstance(plan[0], Undo)
                or plan[0].infos[2] is not None
            ):
                raise MergeError(
                    f"{combination.parts[number].folder} does more to {name} than add scale * B @ A (DoRA, saved modules, trained biases, ...); only plain LoRA can be combined."
                )
            self.updates.append((number, plan[0]))
        self.transposed = self.updates[0][1].transposed
        self.value = torch.empty(0)

    def check(self, target: TensorInfo, folder: Path) -> None:
        """Each adapter's plan has checked its own."""

    def shape(self, target: tuple[int, ...]) -> tuple[int, ...]:
        return target

    def load(self) -> bool:
        deltas = {}
        for number, update in self.updates:
            update.load()
            rows = update.a.shape[1] if self.transposed else len(update.b)
            deltas[number] = update.delta(0, rows)
            update.unload()
        self.value = self.combination.delta(self.name, deltas)
        return bool(self.value.any())

    def apply(self, weight: torch.Tensor, start: int) -> torch.Tensor:
        return weight + self.value[start : start + len(weight)]

    def unload(self) -> None:
        self.value = torch.empty(0)
