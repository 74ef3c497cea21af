"""Why GRPO does not learn, said in words: checks before training, watching during it, and what is kept when it must stop."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from transformers import Trainer

from finetune.rewards.guard import RewardError


@contextmanager
def checkpoint_on_failure(trainer: Trainer) -> Iterator[None]:
    """Save what was trained so far when a reward function fails; the error goes on and says where."""
    try:
        yield
    except RewardError as error:
        checkpoint = Path(trainer.args.output_dir) / f"checkpoint-{trainer.state.global_step}"
        if not checkpoint.exists():
            trainer._save_checkpoint(trainer.model, trial=None)
            trainer.control = trainer.callback_handler.on_save(trainer.args, trainer.state, trainer.control)
        raise RewardError(f"{error} The state after step {trainer.state.global_step} is saved in {checkpoint}; go on with resume=DIR.") from error
