"""The guards around a trainer: spikes, gradients that are not finite, broken checkpoints."""

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from finetune import training
from finetune.errors import UserError
from finetune.run import Run


@pytest.fixture
def metrics(tmp_path: Path) -> training.Metrics:
    """Metrics of a run that is under way."""
    metrics = training.Metrics(Run.create(tmp_path / "run", "recipe: sft\n"), "sft", spike_factor=4.0)
    metrics.on_train_begin(*state(tmp_path, 0))
    metrics.progress.stop()
    return metrics


def state(folder: Path, step: int, fp16: bool = False) -> tuple:
    """Arguments of a callback at a step."""
    return SimpleNamespace(output_dir=str(folder / "checkpoints"), fp16=fp16), SimpleNamespace(global_step=step, max_steps=99), SimpleNamespace()


def log(metrics: training.Metrics, folder: Path, step: int, loss: float, fp16: bool = False, grad_norm: float = 1.0) -> None:
    metrics.watch([f"data.jsonl:{step}"], torch.tensor(loss))
    metrics.watch([f"data.jsonl:{step + 1000}"], torch.tensor(loss * 2))
    metrics.on_log(*state(folder, step, fp16), logs={"loss": loss, "grad_norm": grad_norm})


def test_a_spike_stops_with_step_rows_and_checkpoint(metrics: training.Metrics, tmp_path: Path) -> None:
    for step in range(1, 21):
        log(metrics, tmp_path, step, 0.5)
    log(metrics, tmp_path, 21, 1.4)  # noisy, but less than 1 above the median
    with pytest.raises(UserError) as error:
        log(metrics, tmp_path, 22, 2.1)
    message = str(error.value)
    assert "jumped to 2.100 from 0.500" in message and "at step 22" in message
    assert "Rows of the worst micro-batch: data.jsonl:1022" in message
    assert "Last good checkpoint: none yet" in message and "sft.spike_factor" in message


def test_a_spike_is_not_called_before_the_window_is_full(metrics: training.Metrics, tmp_path: Path) -> None:
    for step in range(1, 20):
        log(metrics, tmp_path, step, 0.5)
    log(metrics, tmp_path, 20, 9.0)


@pytest.mark.parametrize(("loss", "grad_norm"), [(float("nan"), 1.0), (float("inf"), 1.0), (0.5, float("nan"))])
def test_what_is_not_finite_stops(metrics: training.Metrics, tmp_path: Path, loss: float, grad_norm: float) -> None:
    with pytest.raises(UserError, match=f"loss is {loss} and the gradient's norm {grad_norm} at step 1"):
        log(metrics, tmp_path, 1, loss, grad_norm=grad_norm)


def test_a_gradient_overflow_under_fp16_is_the_scaler_s_business(metrics: training.Metrics, tmp_path: Path) -> None:
    log(metrics, tmp_path, 1, 0.5, fp16=True, grad_norm=float("inf"))


def test_the_worst_micro_batch_is_the_one_that_is_not_a_number(metrics: training.Metrics, tmp_path: Path) -> None:
    metrics.watch(["good"], torch.tensor(5.0))
    metrics.watch(["bad", "worse"], torch.tensor(float("nan")))
    with pytest.raises(UserError, match="worst micro-batch: bad, worse"):
        metrics.on_log(*state(tmp_path, 3), logs={"loss": float("nan")})


def test_a_resumed_run_remembers_the_losses(tmp_path: Path) -> None:
    run = Run.create(tmp_path / "run", "recipe: sft\n")
    for step in range(1, 31):
        run.log_metrics({"stage": "sft", "step": step, "seconds": step, "tokens": step, "supervised_tokens": step, "loss": 0.5})
    metrics = training.Metrics(run, "sft", spike_factor=4.0)
    metrics.on_train_begin(*state(tmp_path, 25))
    metrics.progress.stop()
    assert metrics.tokens == 25 and len(metrics.losses) == training.SPIKE_WINDOW
    with pytest.raises(UserError, match="at step 26"):
        log(metrics, tmp_path, 26, 2.1)
