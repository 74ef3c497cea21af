"""What SFT and GRPO share around their trainers: arguments, checkpoints that survive a kill, metrics and the progress bar."""

import json
import logging
import math
import shutil
import signal
import statistics
import time
import warnings
from collections import deque
from collections.abc import Sequence
from pathlib import Path
from types import FrameType
from typing import Any

import datasets
import torch
import transformers
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from transformers import PrinterCallback, Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from finetune.config import Config, GrpoConfig, SftConfig
from finetune.errors import UserError
from finetune.hardware import Choices
from finetune.run import Run, sha256, write_atomic

log = logging.getLogger("finetune")

MARKER = "complete.json"
"""File that makes a checkpoint count: the SHA-256 of its adapter, written after everything else."""


def prepare_machine(config: Config, choices: Choices) -> None:
    """Log the choices; on a CPU set the threads and use deterministic kernels, so that a resumed run repeats the first."""
    for reason in choices.reasons:
        log.info(reason)
    transformers.utils.logging.disable_progress_bar()
    datasets.disable_progress_bars()
    # Said about gradient_checkpointing, whose new name trl 1.16 does not take yet.
    warnings.filterwarnings("ignore", message=".*activation_checkpointing.*", category=FutureWarning)
    if config.hardware.threads is not None:
        torch.set_num_threads(config.hardware.threads)
    if choices.device == "cpu":
        torch.use_deterministic_algorithms(True, warn_only=True)
        torch.utils.deterministic.fill_uninitialized_memory = False  # a debugging aid that costs a tenth of a step


def trainer_arguments(config: Config, section: SftConfig | GrpoConfig, choices: Choices, output_dir: Path) -> dict[str, Any]:
    """Arguments that SFTConfig and GRPOConfig have in common, as transformers.TrainingArguments names them."""
    on_gpu = choices.device == "cuda"
    return {
        "output_dir": str(output_dir),
        "max_steps": section.max_steps,
        "learning_rate": section.learning_rate,
        "lr_scheduler_type": section.scheduler,
        "warmup_steps": section.warmup_steps,
        "per_device_train_batch_size": section.micro_batch_size,
        "gradient_accumulation_steps": section.batch_size // section.micro_batch_size,
        "gradient_checkpointing": section.gradient_checkpointing,
        # On a CPU the bf16 weights are computed with as they are: autocast would cast the fp32 adapters at every use.
        "bf16": on_gpu and choices.dtype == "bfloat16",
        "fp16": on_gpu and choices.dtype == "float16",
        "use_cpu": not on_gpu,
        "optim": "adamw_torch",
        "max_grad_norm": 1.0,
        "save_strategy": "steps",
        "save_steps": section.save_steps,
        # Two, since the older one goes before the newer one has its marker.
        "save_total_limit": 2,
        "logging_steps": 1,
        "disable_tqdm": True,
        "report_to": config.tracking.report_to or "none",
        "seed": config.seed,
        "data_seed": config.seed,
        "dataloader_pin_memory": on_gpu,
    }


def last_checkpoint(folder: Path) -> Path | None:
    """The newest checkpoint that is whole; those that a kill left unfinished are deleted."""
    whole: dict[int, Path] = {}
    for checkpoint in sorted(folder.glob("checkpoint-*")):
        marker = checkpoint / MARKER
        if marker.exists():
            whole[int(checkpoint.name.partition("-")[2])] = checkpoint
        else:
            log.warning("%s: unfinished, deleted", checkpoint)
            shutil.rmtree(checkpoint)
    if not whole:
        return None
    newest = whole[max(whole)]
    recorded = json.loads((newest / MARKER).read_text())["adapter_sha256"]
    if sha256(newest / "adapter_model.safetensors") != recorded:
        raise UserError(f"{newest}/adapter_model.safetensors: changed since it was written. Delete {newest} to go on from an earlier step.")
    return newest


class CheckpointMarker(TrainerCallback):
    """Writes MARKER when a checkpoint is whole, after the trainer wrote its last file."""

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        checkpoint = Path(args.output_dir) / f"checkpoint-{state.global_step}"
        write_atomic(checkpoint / MARKER, json.dumps({"adapter_sha256": sha256(checkpoint / "adapter_model.safetensors")}))


SPIKE_WINDOW = 20
"""Steps whose median loss a spike is measured against; the guard waits for as many."""


class Metrics(TrainerCallback):
    """A row of metrics.jsonl and a step of the progress bar for each optimizer step; stops at a loss that is not finite or spikes.

    Row: stage, step, seconds (since the stage's first step began, without the time between a kill and the resume), tokens and
    supervised_tokens so far, loss, learning_rate, grad_norm, and for GRPO reward and TRL's other figures.
    """

    def __init__(self, run: Run, stage: str, spike_factor: float | None = None) -> None:
        self.run, self.stage = run, stage
        self.spike_factor = spike_factor
        self.losses: deque[float] = deque(maxlen=SPIKE_WINDOW)
        self.micro_batches: list[tuple[Sequence[str], torch.Tensor]] = []
        self.tokens = self.supervised_tokens = 0
        self.seconds_before = 0.0
        self.progress = Progress(
            TextColumn(f"{stage}"), BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[figures]}"),
            TimeElapsedColumn(), TextColumn("left"), TimeRemainingColumn(), console=Console(stderr=True),
        )

    def count(self, tokens: int, supervised_tokens: int) -> None:
        """Add a micro-batch's tokens; the trainer calls it."""
        self.tokens += tokens
        self.supervised_tokens += supervised_tokens

    def watch(self, ids: Sequence[str], loss: torch.Tensor) -> None:
        """Remember a micro-batch's rows and its mean loss until the step ends, to name the rows if it goes wrong."""
        self.micro_batches.append((ids, loss.detach()))

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        kept = self.run.rewind_metrics(self.stage, state.global_step)
        if kept:
            self.tokens, self.supervised_tokens = kept[-1]["tokens"], kept[-1]["supervised_tokens"]
            self.seconds_before = kept[-1]["seconds"]
        self.losses.extend(row["loss"] for row in kept)
        self.started = time.monotonic()
        self.progress.start()
        self.task = self.progress.add_task(self.stage, total=state.max_steps, completed=state.global_step, figures="")

    def on_log(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, logs: dict[str, Any] | None = None, **kwargs: Any
    ) -> None:
        if not logs or "loss" not in logs:
            return
        loss = float(logs["loss"])
        row = {
            "stage": self.stage,
            "step": state.global_step,
            "seconds": round(self.seconds_before + time.monotonic() - self.started, 3),
            "tokens": self.tokens,
            "supervised_tokens": self.supervised_tokens,
        } | {key: value for key, value in logs.items() if isinstance(value, int | float) and key not in ("epoch", "num_tokens")}
        self.run.log_metrics(row)
        figures = f"loss {loss:.3f}" + (f"  reward {logs['reward']:.3f}" if "reward" in logs else "")
        self.progress.update(self.task, completed=state.global_step, figures=figures)
        # A GradScaler (fp16) skips steps whose gradients overflow, so there a gradient that is not finite is no accident.
        grad_norm = 0.0 if args.fp16 else float(logs.get("grad_norm", 0.0))
        if not math.isfinite(loss) or not math.isfinite(grad_norm):
            self.stop(args, state, f"the loss is {loss} and the gradient's norm {grad_norm}")
        if self.spike_factor is not None and len(self.losses) == SPIKE_WINDOW:
            usual = statistics.median(self.losses)
            if loss > max(self.spike_factor * usual, usual + 1):
                self.stop(args, state, f"the loss jumped to {loss:.3f} from {usual:.3f}, the median of the {SPIKE_WINDOW} steps before")
        self.losses.append(loss)
        self.micro_batches.clear()

    def stop(self, args: TrainingArguments, state: TrainerState, what: str) -> None:
        """Raise UserError with the step, the rows of its worst micro-batch and the last whole checkpoint."""
        rows = "not recorded"
        if self.micro_batches:
            # NaN compares as the largest: it is what we look for.
            ids, _ = max(self.micro_batches, key=lambda item: math.inf if item[1].isnan() else float(item[1]))
            rows = ", ".join(ids)
        checkpoint = last_checkpoint(Path(args.output_dir))
        key = f" or a higher {self.stage}.spike_factor" if self.spike_factor is not None else ""
        again = f"; resume={self.run.dir} goes on from the checkpoint with the same settings" if checkpoint else ""
        raise UserError(
            f"{self.stage}: {what} at step {state.global_step}. Rows of the worst micro-batch: {rows}. "
            f"Last good checkpoint: {checkpoint or 'none yet'}. Look at the rows, and start again with a lower "
            f"{self.stage}.learning_rate{key}{again}."
        )

    def on_train_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        self.progress.stop()


def peak_gpu_memory() -> int:
    """Largest memory that torch allocated on the GPU, bytes; 0 without one."""
    return torch.cuda.max_memory_allocated() if torch.cuda.is_available() else 0


class Interrupt(TrainerCallback):
    """On Ctrl-C: end the step, save a checkpoint and stop. A second Ctrl-C stops at once."""

    def __init__(self) -> None:
        self.asked = False

    def __call__(self, number: int, frame: FrameType | None) -> None:
        """The signal handler."""
        if self.asked:
            raise KeyboardInterrupt
        self.asked = True
        log.warning("Ctrl-C: stops after this step and saves it; once more stops at once")

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if self.asked:
            control.should_save = control.should_training_stop = True


def fit(trainer: Trainer, checkpoints: Path) -> None:
    """Train, from the last whole checkpoint when there is one. Raises KeyboardInterrupt after Ctrl-C, with the last step saved."""
    trainer.remove_callback(PrinterCallback)  # Metrics shows the figures
    checkpoint = last_checkpoint(checkpoints)
    if checkpoint:
        log.info("goes on from %s", checkpoint)
    interrupt = Interrupt()
    trainer.add_callback(interrupt)
    before = signal.signal(signal.SIGINT, interrupt)
    try:
        trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
    finally:
        signal.signal(signal.SIGINT, before)
    if interrupt.asked:
        log.warning(
            "stopped at step %d, which is saved; go on with: python -m finetune resume=%s",
            trainer.state.global_step, checkpoints.parents[1],
        )
        raise KeyboardInterrupt
