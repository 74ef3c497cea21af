"""Reward functions that cannot fail silently: each error, hang and bad value ends in a message that names reward and sample."""

import json
import os
import select
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any

from finetune.errors import UserError
from finetune.rewards import REWARDS
from finetune.rewards.worker import BadReward, scores

START_SECONDS = 300.0
"""Longest start of a user's reward: importing its module, loading a reward model."""
ALONE_SECONDS = 5.0
"""A sample that takes longer when given alone is the one that hangs."""
SHOWN = 200
"""Characters of a prompt or completion in a message."""


class RewardError(UserError):
    """A reward function failed on a sample, both named."""


class Hung(Exception):
    """No reply within the time limit."""


class Guard:
    """A reward as TRL calls it, under the name it has in the configuration.

    The rewards of this package run in this process. One of the user's runs in a process of its own: whatever it does (an endless
    loop, a regular expression that explodes, C code that crashes) it can be killed, and it has a main thread, which libraries
    that keep time by signals need. It gets the data's columns, not TRL's trainer_state, log_extra and log_metric.
    """

    def __init__(self, name: str, seconds: float) -> None:
        self.name = self.__name__ = name
        self.seconds = seconds
        self.worker = None if name in REWARDS else Worker(name)

    def __call__(self, prompts: list[Any], completions: list[Any], **columns: Any) -> list[float]:
        """One finite number for each completion. Raises RewardError."""
        batch = {"prompts": prompts, "completions": completions} | {
            name: values for name, values in columns.items() if isinstance(values, list)
        }
        try:
            return self.ask(batch, self.seconds)
        except Hung:
            sample, problem = self.find_sample(batch, f"did not return within {self.seconds:g} s (grpo.reward_seconds)")
        except BadReward as bad:
            sample, problem = (bad.sample, str(bad)) if bad.sample is not None else self.find_sample(batch, str(bad))
        raise RewardError(f"grpo.rewards: '{self.name}' {problem}{describe(batch, sample)}. Mend the function.")

    def ask(self, batch: dict[str, list[Any]], seconds: float) -> list[float]:
        """The batch's rewards. Raises BadReward or Hung, after which the worker must be replaced."""
        return scores(REWARDS[self.name], batch) if self.worker is None else self.worker.ask(batch, seconds)

    def find_sample(self, batch: dict[str, list[Any]], problem: str) -> tuple[int | None, str]:
        """The first sample that fails when it is given alone, and how; (None, problem) where none does.

        All of them are given the time of a batch once more.
        """
        if self.worker is not None and self.worker.process.poll() is not None:
            self.worker = Worker(self.name)
        deadline = time.monotonic() + self.seconds
        for index in range(len(batch["completions"])):
            left = deadline - time.monotonic()
            if left < 0:
                break
            alone = {name: values[index : index + 1] for name, values in batch.items()}
            try:
                self.ask(alone, max(left, min(ALONE_SECONDS, self.seconds)))
            except Hung:
                return index, problem
            except BadReward as bad:
                return index, str(bad)
        return None, problem


class Worker:
    """A process that runs one reward function. Raises UserError where the function cannot be found."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.process = subprocess.Popen(
            [sys.executable, "-m", "finetune.rewards.worker", name],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env={**os.environ, "PYTHONPATH": os.pathsep.join(path or os.getcwd() for path in sys.path)},
            start_new_session=True,
        )
        try:
            problem = self.read(START_SECONDS)["problem"]
        except (Hung, BadReward) as error:
            what = f"did not start within {START_SECONDS:g} s" if isinstance(error, Hung) else str(error)
            raise UserError(f"grpo.rewards: '{name}' {what} while its module was imported. See what it printed above.") from error
        if problem:
            self.stop()
            raise UserError(problem)

    def ask(self, batch: dict[str, list[Any]], seconds: float) -> list[float]:
        """The batch's rewards. Raises BadReward, or Hung after killing the process."""
        assert self.process.stdin is not None
        try:
            self.process.stdin.write(json.dumps(batch).encode() + b"\n")
            self.process.stdin.flush()
        except BrokenPipeError:
            pass  # it ended: `read` says so
        reply = self.read(seconds)
        if "problem" in reply:
            raise BadReward(reply["problem"], reply["sample"])
        return reply["rewards"]

    def read(self, seconds: float) -> dict[str, Any]:
        """The next reply."""
        assert self.process.stdout is not None
        readable, _, _ = select.select([self.process.stdout], [], [], seconds)
        if not readable:
            self.stop()
            raise Hung
        line = self.process.stdout.readline()
        if not line:
            raise BadReward(f"ended its process (exit code {self.stop()})")
        return json.loads(line)

    def stop(self) -> int:
        """End the process if it still runs; its exit code."""
        try:
            return self.process.wait(0.5)
        except subprocess.TimeoutExpired:
            self.process.kill()
            return self.process.wait()


def describe(batch: dict[str, list[Any]], sample: int | None) -> str:
    """' on sample ID, prompt ..., completion ...'; nothing where no single sample is at fault."""
    if sample is None:
        first = batch["id"][0] if "id" in batch else "0"
        return f" (in a batch of {len(batch['completions'])} samples that begins with {first})"
    name = batch["id"][sample] if "id" in batch else str(sample)
    prompt, completion = (text(batch[column][sample])[-SHOWN:] for column in ("prompts", "completions"))
    return f" on sample {name} (prompt ...{prompt!r}, completion {completion!r})"


def text(messages: Any) -> str:
    """The last message's content of a conversation, or a plain text as it is."""
    return messages if isinstance(messages, str) else messages[-1]["content"]


def guarded(rewards: dict[str, float], seconds: float) -> list[Callable[..., list[float]]]:
    """The functions of a configuration's rewards, in order, each guarded with a time limit in seconds a batch."""
    return [Guard(name, seconds) for name in rewards]
