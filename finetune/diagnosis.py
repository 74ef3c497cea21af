"""Why GRPO does not learn, said in words: a look before training, a watch during it, and what is kept when it must stop.

Every finding names what was seen, the likely cause and the remedy; it is logged, kept in grpo/diagnosis.json and shown in the report.
"""

import json
import logging
import statistics
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from rich.console import Console
from rich.table import Table
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from finetune import generation, models
from finetune.config import Config, GrpoConfig
from finetune.errors import UserError
from finetune.rewards.guard import RewardError
from finetune.run import Run, write_atomic

if TYPE_CHECKING:
    from datasets import Dataset
    from peft import PeftModel
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

log = logging.getLogger("finetune")

Row = dict[str, Any]
"""A row of metrics.jsonl: what TRL logs for one optimizer step."""


# -- before training ----------------------------------------------------------------------------------------------------


@dataclass
class Probe:
    """What the policy earns before it is trained."""

    pass_rates: list[float]
    """Share of right completions of each prompt; without the reward `correct`, the mean share of the highest reward."""
    samples: int
    """Completions sampled for each prompt."""
    zero_variance: float
    """Predicted share of groups whose completions all earn the same."""
    cut_off: float
    """Share of completions that reached grpo.max_completion_length."""


def probe(
    sampler: "PreTrainedModel | PeftModel", tokenizer: "PreTrainedTokenizerBase", dataset: "Dataset",
    rewards: list[Callable[..., list[float]]], config: Config, run: Run,
) -> None:
    """Sample a group for each of grpo.probe_prompts prompts; print their pass rates and the share of groups that would teach nothing.

    Leaves the random state as it was. A resumed run keeps what its first attempt found.
    """
    settings = config.grpo
    if settings.probe_prompts == 0 or (run.dir / "grpo" / "diagnosis.json").exists():
        return
    rows = evenly(dataset, settings.probe_prompts)
    prompts = [models.encode_chat(tokenizer, row["prompt"], add_generation_prompt=True) for row in rows]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)
        completions = generation.generate(
            sampler, tokenizer, [prompt for prompt in prompts for _ in range(settings.group_size)],
            settings.max_completion_length, settings.batch_size, settings.temperature,
        )
    batch = [row for row in rows for _ in range(settings.group_size)]
    earned = score(rewards, batch, [completion.text for completion in completions])
    weights = list(settings.rewards.values())
    totals = groups([sum(weight * value for weight, value in zip(weights, values, strict=True)) for values in earned], settings.group_size)
    if "correct" in settings.rewards:
        place = list(settings.rewards).index("correct")
        passed = groups([values[place] for values in earned], settings.group_size)
    else:
        highest = sum(weight for weight in weights if weight > 0) or 1.0
        passed = [[total / highest for total in group] for group in totals]
    found = Probe(
        [statistics.mean(group) for group in passed], settings.group_size,
        statistics.mean(chance_of_no_variance(group, settings.group_size) for group in totals),
        statistics.mean(not completion.finished for completion in completions),
    )
    save(run, found, [])
    Console(stderr=True).print(histogram(found))
    log.info("before training: %s", in_words(found, settings))


def evenly(dataset: "Dataset", count: int) -> list[dict[str, Any]]:
    """At most `count` rows, spread evenly over the data."""
    step = max(1, len(dataset) // count)
    return [dataset[index] for index in range(0, len(dataset), step)][:count]


def score(rewards: list[Callable[..., list[float]]], rows: list[dict[str, Any]], completions: list[str]) -> list[list[float]]:
    """What each completion earns from each reward: (completions, rewards)."""
    columns = {name: [row[name] for row in rows] for name in rows[0] if name != "prompt"}
    messages = [[{"role": "assistant", "content": text}] for text in completions]
    by_reward = [reward(prompts=[row["prompt"] for row in rows], completions=messages, **columns) for reward in rewards]
    return [list(values) for values in zip(*by_reward, strict=True)]


def groups(values: list[float], size: int) -> list[list[float]]:
    """The values cut into groups of `size`."""
    return [values[start : start + size] for start in range(0, len(values), size)]


def chance_of_no_variance(rewards: list[float], size: int) -> float:
    """Probability that `size` completions all earn the same, where they earn what these samples did.

    >>> chance_of_no_variance([1, 1, 0, 0], 4), chance_of_no_variance([0, 0, 0, 0], 4)
    (0.125, 1.0)
    """
    return sum((count / len(rewards)) ** size for count in Counter(round(reward, 6) for reward in rewards).values())


def histogram(found: Probe) -> Table:
    """The pass rates as bars."""
    table = Table(title=f"before training: {len(found.pass_rates)} prompts x {found.samples} samples")
    for column in ("pass rate", "prompts", ""):
        table.add_column(column, justify="left" if column == "" else "right")
    bins = Counter(0 if rate <= 0 else 5 if rate >= 1 else 1 + min(3, int(rate * 4)) for rate in found.pass_rates)
    for index, label in enumerate(("0%", "to 25%", "to 50%", "to 75%", "to 100%", "100%")):
        table.add_row(label, str(bins[index]), "█" * round(30 * bins[index] / len(found.pass_rates)))
    return table


def in_words(found: Probe, settings: GrpoConfig) -> str:
    """The probe's figures, and a cause and remedy where most groups would teach nothing."""
    mean = statistics.mean(found.pass_rates)
    text = (
        f"mean pass rate {100 * mean:.0f}%, {100 * found.zero_variance:.0f}% of groups predicted to have no variance (they teach nothing), "
        f"{100 * found.cut_off:.0f}% of completions cut off at grpo.max_completion_length={settings.max_completion_length}"
    )
    if found.zero_variance <= 0.5:
        return text
    return f"{text}. {EASY if mean > 0.5 else CAPPED.format(cap=settings.max_completion_length) if found.cut_off > 0.5 else HARD}"


# -- during training ----------------------------------------------------------------------------------------------------

EASY = "The problems are too easy for this model: take harder ones, or raise grpo.temperature."
HARD = (
    "The problems are too hard, or the answers not stated as they are looked for (see grpo/samples.jsonl): start from an SFT adapter "
    "(stages=[sft,grpo] or model.adapter), take easier problems, or raise grpo.group_size."
)
CAPPED = "Most completions are cut off at grpo.max_completion_length={cap} before they state an answer: raise it."


@dataclass
class Finding:
    """Something that keeps the run from learning, in words."""

    name: str
    step: int
    text: str
    hopeless: bool
    """Whether the run cannot learn as it is."""


def mean(rows: list[Row], key: str) -> float:
    """Mean of what was logged under `key`; 0 where nothing was."""
    values = [row[key] for row in rows if row.get(key) is not None]
    return statistics.mean(values) if values else 0.0


def never_rewarded(rows: list[Row], settings: GrpoConfig) -> tuple[str, bool] | None:
    """No completion of the window earned anything."""
    window = rows[-patience(settings) :]
    if len(window) < patience(settings) or any(row["reward"] != 0 or row["reward_std"] != 0 for row in window):
        return None
    cause = CAPPED.format(cap=settings.max_completion_length) if mean(window, "completions/clipped_ratio") > 0.5 else HARD
    return f"all rewards are zero: no completion of the last {len(window)} steps earned anything. {cause}", True


def all_alike(rows: list[Row], settings: GrpoConfig) -> tuple[str, bool] | None:
    """In every group of the window all completions earned the same."""
    window = rows[-patience(settings) :]
    if len(window) < patience(settings) or any(row["frac_reward_zero_std"] < 1 for row in window) or mean(window, "reward") == 0:
        return None
    level = mean(window, "reward") / (sum(weight for weight in settings.rewards.values() if weight > 0) or 1.0)
    return (
        f"the rewards have no variance: in every group of the last {len(window)} steps all completions earned the same "
        f"(mean reward {mean(window, 'reward'):.3f}), so every advantage is zero. {EASY if level > 0.5 else HARD}", True,
    )


def few_groups_teach(rows: list[Row], settings: GrpoConfig) -> tuple[str, bool] | None:
    """Most groups of the window had no variance."""
    window = rows[-patience(settings) :]
    share = mean(window, "frac_reward_zero_std")
    if len(window) < patience(settings) or not 0.7 < share < 1:
        return None
    level = mean(window, "reward") / (sum(weight for weight in settings.rewards.values() if weight > 0) or 1.0)
    return f"{100 * share:.0f}% of the groups of the last {len(window)} steps had no variance and taught nothing. {EASY if level > 0.5 else HARD}", False


def cut_off(rows: list[Row], settings: GrpoConfig) -> tuple[str, bool] | None:
    """Many completions do not end by themselves."""
    window = rows[-patience(settings) :]
    share, cap = mean(window, "completions/clipped_ratio"), settings.max_completion_length
    if len(window) < patience(settings) or share < 0.3:
        return None
    if max(row["completions/max_length"] for row in window) >= cap:
        which = f"at grpo.max_completion_length={cap} (they earn as if they were wrong): raise it, or prefer shorter answers in the data"
    else:
        which = f"before grpo.max_completion_length={cap}, by the sampling engine's own limit on prompt and completion: shorten the prompts"
    return f"{100 * share:.0f}% of the completions of the last {len(window)} steps are cut off {which}.", False


def entropy_collapse(rows: list[Row], settings: GrpoConfig) -> tuple[str, bool] | None:
    """The policy has become nearly deterministic."""
    first, last = rows[: patience(settings)], rows[-patience(settings) :]
    if len(rows) < 2 * len(last) or mean(last, "entropy") > 0.1 * mean(first, "entropy"):
        return None
    return (
        f"the entropy collapsed from {mean(first, 'entropy'):.3f} to {mean(last, 'entropy'):.3f} nats a token: the completions of a "
        "group are nearly alike. Lower grpo.learning_rate, raise grpo.temperature, or take grpo.preset=dapo (clip-higher).", False,
    )


def length_blow_up(rows: list[Row], settings: GrpoConfig) -> tuple[str, bool] | None:
    """Completions grow, the reward does not."""
    first, last = rows[: patience(settings)], rows[-patience(settings) :]
    before, now = mean(first, "completions/mean_length"), mean(last, "completions/mean_length")
    if len(rows) < 2 * len(last) or now < 2 * before or mean(last, "reward") > mean(first, "reward") + 0.05:
        return None
    return (
        f"the completions grew from {before:.0f} to {now:.0f} tokens without more reward: length itself may be what is learnt. "
        "Take grpo.preset=dr_grpo (no division by the length), or look at grpo/samples.jsonl for a reward that length earns.", False,
    )


def kl_spike(rows: list[Row], settings: GrpoConfig) -> tuple[str, bool] | None:
    """The policy left its reference within a step."""
    before = [row["kl"] for row in rows[-patience(settings) - 1 : -1] if row.get("kl") is not None]
    now = rows[-1].get("kl")
    if now is None or len(before) < patience(settings) or now <= max(0.1, 10 * statistics.median(before)):
        return None
    return (
        f"the KL to the reference jumped to {now:.2f} from {statistics.median(before):.3f}: a step was too large. Lower "
        "grpo.learning_rate, or raise the weight of the KL term (grpo.extra.beta).", False,
    )


CHECKS = (never_rewarded, all_alike, few_groups_teach, cut_off, entropy_collapse, length_blow_up, kl_spike)
"""Each looks at the rows so far and says what is wrong and whether it is hopeless, or None."""


def patience(settings: GrpoConfig) -> int:
    """Steps that a finding must last; a run that is shorter must learn within its length."""
    return min(settings.patience, settings.max_steps)


class Watch(TrainerCallback):
    """Runs CHECKS after each step; warns once for each, and ends the run when it cannot learn (grpo.diagnosis=stop)."""

    def __init__(self, run: Run, settings: GrpoConfig) -> None:
        self.run, self.settings = run, settings
        self.rows: list[Row] = []
        self.findings: dict[str, Finding] = {}
        self.verdict: Finding | None = None

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        self.rows = [row for row in self.run.metrics("grpo") if row["step"] <= state.global_step]

    def on_log(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, logs: dict[str, Any] | None = None, **kwargs: Any
    ) -> None:
        if not logs or "reward" not in logs:
            return
        self.rows.append(logs)
        for check in CHECKS:
            said = check(self.rows, self.settings)
            if said is None or check.__name__ in self.findings:
                continue
            finding = Finding(check.__name__, state.global_step, *said)
            self.findings[finding.name] = finding
            log.warning("grpo, step %d: %s", finding.step, finding.text)
            save(self.run, None, list(self.findings.values()))
            if finding.hopeless and self.settings.diagnosis == "stop":
                self.verdict = finding
                control.should_save = control.should_training_stop = True

    def conclude(self) -> None:
        """Raise UserError where the run was ended because it could not learn."""
        if self.verdict is not None:
            raise UserError(
                f"grpo: stopped after step {self.verdict.step}, {self.verdict.text} The checkpoint is kept; set grpo.diagnosis=warn "
                "in a new run to go on regardless."
            )


def save(run: Run, found: Probe | None, findings: list[Finding]) -> None:
    """Write grpo/diagnosis.json; without a probe, the one that is there stays."""
    path = run.path("grpo/diagnosis.json")
    kept = json.loads(path.read_text(encoding="utf-8"))["probe"] if path.exists() else None
    record = {"probe": asdict(found) if found else kept, "findings": [asdict(finding) for finding in findings]}
    write_atomic(path, json.dumps(record, indent=1))


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
