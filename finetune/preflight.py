"""Memory, disk and data checks before any weight loads: what every stage will need against what the machine has.

`stages=[preflight]` alone asks for the account, with a timed probe of two steps where the machine is this one; in front of a run's
first training stage it ends a run that cannot fit, with the cheapest change that makes it. `hardware=t4` and its like account for
a GPU that is not here.
"""

import dataclasses
import gc
import json
import logging
import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import yaml
from rich.console import Console
from rich.table import Table
from transformers import AutoConfig

from finetune import data, hardware, memory, models, nf4_cache, packing
from finetune.config import Config
from finetune.errors import UserError
from finetune.hardware import Choices, Machine
from finetune.run import Result, Run, peak_memory, reset_peak_memory, write_atomic
from merge.checkpoint import Checkpoint

log = logging.getLogger("finetune")

RECIPES = Path(__file__).resolve().parents[1] / "recipes" / "recipe"
"""The packaged recipes."""

GPU_OVERHEAD = 800_000_000
"""CUDA context, cuBLAS workspace and what the caching allocator cannot use, bytes: what nvidia-smi shows above torch's figure."""

LIBRARIES = {"cpu": 900_000_000, "cuda": 3_000_000_000}
"""Resident memory of Python with torch, transformers, trl and peft before a model loads, bytes; with CUDA's libraries on a GPU."""

MERGE_BLOCKS = 1_500_000_000
"""Blocks of rows in flight while merging and exporting, which stream, bytes."""

CHECKPOINTS = 3
"""Checkpoints on the disk at a time: two kept, and the next before the older one goes."""

GGUF_BITS = {"F32": 32.0, "F16": 16.0, "BF16": 16.0, "Q8_0": 8.5, "Q5_1": 6.0, "Q5_0": 5.5, "Q4_1": 5.0, "Q4_0": 4.5}
"""Bits a weight of GGUF's types (34 bytes for 32 weights in Q8_0, and so on); others count as F16."""


@dataclasses.dataclass(frozen=True)
class Need:
    """What a stage takes at its peak, bytes, by cause; on a CPU the device's memory is the RAM."""

    stage: str
    device: dict[str, int]
    ram: dict[str, int]
    disk: dict[str, int]


@dataclasses.dataclass(frozen=True)
class Shape:
    """What the account must know of the data: training lengths, tokens."""

    lengths: tuple[int, ...]
    """Of each training row, longest first."""
    prompt: int
    """The longest prompt for sampling."""

    def worst(self, count: int) -> tuple[int, ...]:
        """The `count` longest rows, which may meet in one micro-batch."""
        return self.lengths[:count]


def check(config: Config, run: Run) -> Result:
    """The preflight stage: writes `preflight.json`; raises UserError where a stage does not fit the machine, or is to train on a GPU
    that is only described."""
    here = hardware.detect()
    machine = hardware.target(config.hardware, here)
    if machine is not here and config.stages != ["preflight"] and here.sm != machine.sm:
        raise UserError(
            f"hardware.target={machine.name}: describes a GPU that this machine ({here.name}) does not have. Ask whether the run would fit "
            "it by stages=[preflight]; to train here, use hardware=auto."
        )
    choices = hardware.choose(config if machine is here else with_key(config, "hardware.device", "auto"), machine)
    for reason in choices.reasons:
        log.info(reason)
    if config.lora.variant == "dora":
        log.warning("preflight: accounts for plain LoRA; DoRA keeps a further activation the size of each layer's output")
    base = models.resolve(config.model.path)
    stages = accounted_stages(config)
    costs, shape, rows = data_costs(config, run, base, stages)
    if "grpo" in stages and config.grpo.engine == "auto" and choices.device == "cuda":
        # As rollout.choose does: a dense copy only where it takes no more than half of what is free.
        free = usable(machine, choices) - memory.weight_bytes(base, choices.dtype, choices.quantization)
        config = with_key(config, "grpo.engine", "dense" if 2 * dense_copy(base, choices.dtype) <= free else "policy")
    needs = [NEEDS[stage](config, base, choices, shape) for stage in stages]
    free_disk = config.hardware.disk_gb * 10**9 if config.hardware.disk_gb else shutil.disk_usage(run.dir).free
    capacity = {"device": usable(machine, choices), "ram": machine.ram, "disk": int(free_disk)}
    report: dict[str, Any] = {
        "machine": machine.name, "choices": choices.reasons, "capacity_bytes": capacity,
        "needs_bytes": [dataclasses.asdict(need) for need in needs], "data": costs,
    }
    show(needs, capacity, costs, machine)
    write_atomic(run.path("preflight.json"), json.dumps(report, indent=1))
    problems = list(misfits(needs, capacity, config, base, choices, shape, machine))
    if problems:
        raise UserError("This run does not fit the machine.\n" + "\n".join(problems))
    if machine is here and rows is not None and config.stages == ["preflight"]:
        report["probe"] = probe(config, base, choices, rows, costs)
        write_atomic(run.path("preflight.json"), json.dumps(report, indent=1))
    return Result({}, ["preflight.json"])


def accounted_stages(config: Config) -> list[str]:
    """The run's stages that are accounted for; where only a preflight is asked for, those of the recipe."""
    named = config.stages
    if named == ["preflight"]:
        recipe = RECIPES / f"{config.recipe}.yaml"
        named = yaml.safe_load(recipe.read_text(encoding="utf-8")).get("stages", []) if recipe.exists() else []
    return [stage for stage in named if stage in NEEDS] or ["sft"]


# -- the data --------------------------------------------------------------------------------------------------------


def data_costs(config: Config, run: Run, base: Path, stages: list[str]) -> tuple[dict[str, float], Shape, Any]:
    """What the data will cost: padding, what is left out, supervised tokens, epochs; the lengths; and the rows themselves."""
    tokenizer = models.load_tokenizer(base, config.model)
    examples = data.load(config, run).train
    prompt = max(len(models.encode_chat(tokenizer, data.prompt_messages(example, config.data.prompt), True)) for example in examples)
    if "sft" not in stages:
        return {"examples": len(examples)}, Shape((), prompt), None
    rows = data.sft_dataset(examples, tokenizer, config)
    lengths = sorted(rows["length"], reverse=True)
    tokens, settings = sum(lengths), config.sft
    batches = [lengths[first : first + settings.micro_batch_size] for first in range(0, len(lengths), settings.micro_batch_size)]
    computed = sum(batch[0] * len(batch) for batch in batches) if settings.packing == "none" else tokens
    costs = {
        "examples": len(examples),
        "rows": len(lengths),
        "tokens": tokens,
        "longest": lengths[0],
        "supervised_share": sum(label != -100 for labels in rows["labels"] for label in labels) / tokens,
        "padding_share": 1 - tokens / computed,
        "left_out_share": max(1 - sum(map(len, rows["lengths"])) / len(examples), 0.0),  # split_turns makes more of them
        "steps_per_epoch": len(lengths) / settings.batch_size,
        "epochs": settings.max_steps * settings.batch_size / len(lengths),
    }
    return costs, Shape(tuple(lengths), prompt), rows


# -- what each stage takes -------------------------------------------------------------------------------------------


def sft_need(config: Config, base: Path, choices: Choices, shape: Shape) -> Need:
    """Base, adapter, optimizer and the activations of the longest micro-batch that can come."""
    settings = config.sft
    step = memory.Step(
        shape.worst(settings.micro_batch_size), choices.dtype, choices.quantization,
        packed=settings.packing != "none", checkpointing=settings.gradient_checkpointing,
    )
    account = memory.training_step(base, config.lora, step)
    device = {"base weights": account.weights, "adapter and AdamW": account.trainable, "activations and logits": account.activations}
    return Need("sft", device, loading_ram(base, choices), training_disk(base, choices, account))


def grpo_need(config: Config, base: Path, choices: Choices, shape: Shape) -> Need:
    """As sft, with every completion's logits, the reference adapter, the dense copy that is sampled from and its KV cache."""
    settings = config.grpo
    lengths = (shape.prompt + settings.max_completion_length,) * settings.micro_batch_size
    step = memory.Step(
        lengths, choices.dtype, choices.quantization, packed=False, checkpointing=settings.gradient_checkpointing,
        completion=settings.max_completion_length,
    )
    account = memory.training_step(base, config.lora, step)
    dense = dense_copy(base, choices.dtype)
    cache = kv_cache(base, choices.dtype, settings.batch_size * lengths[0])
    # Sampling and the training step take turns: the larger of the two counts.
    device = {
        "base weights": account.weights,
        "adapter and AdamW": account.trainable + account.trainable // 4,  # and the frozen reference
        "dense copy for sampling": dense if settings.engine != "policy" else 0,
        "KV cache or activations and logits": max(cache, account.activations),
    }
    return Need("grpo", device, loading_ram(base, choices), training_disk(base, choices, account))


def evaluate_need(config: Config, base: Path, choices: Choices, shape: Shape) -> Need:
    """The dense model, one at a time, and the KV cache of a batch of completions."""
    settings = config.evaluate
    dtype = choices.dtype if settings.dtype == "auto" else settings.dtype
    tokens = settings.batch_size * (shape.prompt + settings.max_new_tokens)
    device = {"weights": memory.weight_bytes(base, dtype, "none"), "KV cache": kv_cache(base, dtype, tokens)}
    return Need("evaluate", device, {"libraries": LIBRARIES[choices.device]}, {})


def merge_need(config: Config, base: Path, choices: Choices, shape: Shape) -> Need:
    """Streams: a few blocks of rows; the merged folder is as large as the base."""
    return Need("merge", {}, {"libraries": LIBRARIES["cpu"], "blocks": MERGE_BLOCKS}, {"merged/": stored_bytes(base)})


def export_need(config: Config, base: Path, choices: Choices, shape: Shape) -> Need:
    """Streams; a GGUF file of the type asked for, and none for the merged folder itself."""
    weights = sum(torch.Size(info.shape).numel() for info in Checkpoint(base).tensors.values())
    gguf = int(weights * GGUF_BITS.get(config.export.gguf_type.upper(), 16.0) / 8)
    disk = {"export/": gguf} if {"gguf", "ollama"} & set(config.export.targets) else {}
    return Need("export", {}, {"libraries": LIBRARIES["cpu"], "blocks": MERGE_BLOCKS}, disk)


NEEDS: dict[str, Callable[[Config, Path, Choices, Shape], Need]] = {
    "sft": sft_need, "grpo": grpo_need, "merge": merge_need, "export": export_need, "evaluate": evaluate_need,
}
"""The stages that are accounted for."""


def loading_ram(base: Path, choices: Choices) -> dict[str, int]:
    """RAM while the base loads and trains on a GPU: libraries, and the shard and the largest tensor that pass through."""
    largest = max(info.nbytes for info in Checkpoint(base).tensors.values())
    return {"libraries": LIBRARIES[choices.device], "loading": nf4_cache.SHARD_BYTES + 2 * largest}


def training_disk(base: Path, choices: Choices, account: memory.Account) -> dict[str, int]:
    """The adapter (a quarter of the trainable account), its checkpoints with two moments, and the NF4 cache."""
    adapter = account.trainable // 4
    cached = account.weights if choices.quantization == "nf4" and stored_bytes(base) >= nf4_cache.SMALLEST else 0
    return {"checkpoints": CHECKPOINTS * 3 * adapter, "adapter": adapter, "NF4 cache": cached}


def stored_bytes(base: Path) -> int:
    """Bytes of the base's weights in its files."""
    return sum(info.nbytes for info in Checkpoint(base).tensors.values())


def dense_copy(base: Path, dtype: str) -> int:
    """Bytes of the dense copy that GRPO samples from: the linear layers; everything else is shared with the policy."""
    shared = sum(p.nbytes for p in memory.skeleton(base, dtype, "nf4").parameters() if p.dtype != torch.uint8)
    return memory.weight_bytes(base, dtype, "none") - shared


def kv_cache(base: Path, dtype: str, tokens: int) -> int:
    """Keys and values of every layer for so many tokens, bytes."""
    config = AutoConfig.from_pretrained(base).get_text_config()
    heads = config.num_key_value_heads or config.num_attention_heads
    width = config.to_dict().get("head_dim") or config.hidden_size // config.num_attention_heads
    return 2 * config.num_hidden_layers * heads * width * tokens * getattr(torch, dtype).itemsize


# -- does it fit -----------------------------------------------------------------------------------------------------


def usable(machine: Machine, choices: Choices) -> int:
    """Bytes of the device's memory that a stage may take."""
    return machine.gpu_memory - GPU_OVERHEAD if choices.device == "cuda" else machine.ram - LIBRARIES["cpu"]


def misfits(
    needs: list[Need], capacity: dict[str, int], config: Config, base: Path, choices: Choices, shape: Shape, machine: Machine
) -> Iterator[str]:
    """A sentence for each stage and kind of memory that does not suffice, with the cheapest change that makes it fit."""
    for need in needs:
        wanted = sum(need.device.values())
        if wanted > capacity["device"]:
            kind = "GPU memory" if choices.device == "cuda" else "RAM"
            change = cheapest_change(need.stage, capacity["device"], config, base, choices, shape)
            yield (
                f"{need.stage} takes {gb(wanted)} of {kind}, and {machine.name} has {gb(capacity['device'])} for it. "
                + (f"It fits with {change}." if change else "No smaller batch or length makes it fit: take a smaller model or a larger GPU.")
            )
        if sum(need.ram.values()) > capacity["ram"]:
            yield f"{need.stage} takes {gb(sum(need.ram.values()))} of RAM, and there are {gb(capacity['ram'])}."
    # sft and grpo share the NF4 cache.
    cache = max((need.disk.get("NF4 cache", 0) for need in needs), default=0)
    total = cache + sum(size for need in needs for what, size in need.disk.items() if what != "NF4 cache")
    if total > capacity["disk"]:
        yield (
            f"The run writes {gb(total)}, and {gb(capacity['disk'])} are free on the disk. Free some space, "
            "name a run_dir on another disk, or run the stages one after the other and move what is done."
        )


def cheapest_change(stage: str, capacity: int, config: Config, base: Path, choices: Choices, shape: Shape) -> str | None:
    """The first of `changes` that makes the stage fit, as the user writes it on the command line, with what it then takes."""
    for change in changes(stage, config):
        changed = config
        for key, value in change.items():
            changed = with_key(changed, key, value)
        limit = int(change.get("sft.max_length", max(shape.lengths, default=0)))
        cut = Shape(tuple(min(length, limit) for length in shape.lengths), shape.prompt)
        quantization = str(change.get("model.quantization", choices.quantization))
        wanted = sum(NEEDS[stage](changed, base, dataclasses.replace(choices, quantization=quantization), cut).device.values())
        if wanted <= capacity:
            return " ".join(f"{key}={str(value).lower()}" for key, value in change.items()) + f" ({gb(wanted)})"
    return None


def changes(stage: str, config: Config) -> Iterator[dict[str, Any]]:
    """Changes that save memory, the cheapest first: NF4, a smaller micro-batch (same effective batch), recomputed activations (a
    third slower), sampling from the policy itself (slower) and fewer completions at a time, and last a shorter length, which costs data."""
    if stage == "evaluate":
        for power in range(1, config.evaluate.batch_size.bit_length()):
            yield {"evaluate.batch_size": config.evaluate.batch_size >> power}
        return
    settings = config.sft if stage == "sft" else config.grpo
    nf4 = {} if config.model.quantization == "nf4" else {"model.quantization": "nf4"}
    sizes = [size for size in range(settings.micro_batch_size, 0, -1) if settings.batch_size % size == 0]
    sizes = [size for place, size in enumerate(sizes) if place == 0 or size <= settings.micro_batch_size / 2]
    recompute = {} if settings.gradient_checkpointing else {f"{stage}.gradient_checkpointing": True}
    for extra in ({}, recompute) if recompute else ({},):
        for size in sizes:
            smaller = {} if size == settings.micro_batch_size else {f"{stage}.micro_batch_size": size}
            if nf4 | smaller | extra:
                yield nf4 | smaller | extra
    least = nf4 | {f"{stage}.micro_batch_size": 1} | recompute
    if stage == "grpo" and config.grpo.engine != "policy":
        yield least | {"grpo.engine": "policy"}
        least |= {"grpo.engine": "policy"}
    if stage == "grpo":
        size = config.grpo.batch_size // 2
        while size >= config.grpo.group_size and size % config.grpo.group_size == 0:
            yield least | {"grpo.batch_size": size}
            size //= 2
    key, length = ("max_length", config.sft.max_length) if stage == "sft" else ("max_completion_length", config.grpo.max_completion_length)
    shortest = max(64, 0 if stage == "sft" else config.grpo.overlong_buffer)
    while length // 2 > shortest:
        length //= 2
        yield least | {f"{stage}.{key}": length}


def with_key(config: Config, key: str, value: Any) -> Config:
    """The configuration with one key set, say `sft.micro_batch_size`."""
    section, _, name = key.partition(".")
    changed = dataclasses.replace(config.__dict__[section], **{name: value})
    return dataclasses.replace(config, **{section: changed})


# -- the probe -------------------------------------------------------------------------------------------------------


def probe(config: Config, base: Path, choices: Choices, rows: Any, costs: dict[str, float]) -> dict[str, float]:
    """Two micro-batches forward and backward on this machine: seconds an epoch takes, and the peak beside the estimate, bytes.

    The longest micro-batch comes first and makes the peak; the second, of middling rows, is timed.
    """
    from peft import get_peft_model

    from finetune.sft import nll
    from finetune.training import peak_gpu_memory

    settings, order = config.sft, sorted(range(len(rows)), key=lambda index: -rows[index]["length"])
    tokenizer = models.load_tokenizer(base, config.model)
    middle = max((len(order) - settings.micro_batch_size) // 2, 0)
    reset_peak_memory()
    policy = get_peft_model(models.load_base(base, config.model, choices), models.peft_config(config.lora))
    packing.prepare(policy.get_base_model(), settings.packing)
    if settings.gradient_checkpointing:
        policy.gradient_checkpointing_enable({"use_reentrant": False})
        policy.enable_input_require_grads()
    policy.train()
    seconds = tokens = 0.0
    for chosen in (order[: settings.micro_batch_size], order[middle : middle + settings.micro_batch_size]):
        picked = [rows[index] for index in chosen]
        batch = packing.pad(picked, tokenizer.pad_token_id) if settings.packing == "none" else packing.flatten(picked)
        placed = {key: value.to(choices.device) if isinstance(value, torch.Tensor) else value for key, value in batch.items()}
        started = time.monotonic()
        total, _ = nll(policy, placed)
        total.backward()
        seconds, tokens = time.monotonic() - started, sum(batch["lengths"])
    found = {
        "tokens_per_second": tokens / seconds,
        "seconds_per_epoch": costs["tokens"] * seconds / tokens,
        "measured_peak_bytes": peak_gpu_memory() if choices.device == "cuda" else peak_memory(),
    }
    log.info(
        "probe: %.0f tokens a second, %.0f minutes an epoch, %.0f minutes for %d steps; peak measured %s",
        found["tokens_per_second"], found["seconds_per_epoch"] / 60, found["seconds_per_epoch"] * costs["epochs"] / 60,
        settings.max_steps, gb(found["measured_peak_bytes"]),
    )
    del policy, total
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    return found


# -- the table -------------------------------------------------------------------------------------------------------


def gb(count: float) -> str:
    """Bytes as gigabytes of 10**9."""
    return f"{count / 1e9:.1f} GB"


def show(needs: list[Need], capacity: dict[str, int], costs: dict[str, float], machine: Machine) -> None:
    """Print the table to the terminal and write it to the log file."""
    on_gpu = machine.device == "cuda"
    table = Table(title=f"preflight: {machine.name}")
    for column in ("stage", "what", "GPU memory" if on_gpu else "RAM", *(["RAM"] if on_gpu else []), "disk"):
        table.add_column(column, justify="left" if column in ("stage", "what") else "right")
    for need in needs:
        ram = need.ram if on_gpu else {}
        device = need.device or ({} if on_gpu else need.ram)
        for what in [*device, *(name for name in ram if name not in device), *need.disk]:
            cells = [gb(part[what]) if what in part else "" for part in ((device, ram, need.disk) if on_gpu else (device, need.disk))]
            table.add_row(need.stage, what, *cells)
        sums = [gb(sum(part.values())) for part in ((device, ram, need.disk) if on_gpu else (device, need.disk))]
        table.add_row(need.stage, "together", *sums, style="bold", end_section=True)
    has = [capacity["device"], capacity["ram"], capacity["disk"]] if on_gpu else [capacity["device"], capacity["disk"]]
    table.add_row("", "the machine has", *map(gb, has), style="bold")
    Console(stderr=True).print(table)
    plain = Console(width=120, record=True, quiet=True)
    plain.print(table)
    log.debug("\n%s", plain.export_text())
    if "tokens" in costs:
        log.info(
            "data: %d rows of up to %d tokens, %.0f%% supervised, %.0f%% padding, %.0f%% of the examples left out; %.1f steps an epoch, "
            "%.2f epochs in all", costs["rows"], costs["longest"], 100 * costs["supervised_share"], 100 * costs["padding_share"],
            100 * costs["left_out_share"], costs["steps_per_epoch"], costs["epochs"],
        )
