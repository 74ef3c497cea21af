"""GRPO beside a plain TRL script: seconds per step by part, tokens per second, peak memory, reward after equal wall time.

    python bench/grpo.py [--adapter SFT_ADAPTER] [--seconds 240] [--steps N] [--seeds 1] [--work DIR]

Same NF4 base (SmolLM2-135M), LoRA, problems, objective (TRL's defaults), group and lengths: 16 completions of up to 64 tokens a
step, in groups of 8. The two run in alternation, each in a process of its own, for as many seconds (or --steps). Without --adapter
both start from a fresh adapter, and the reward stays near zero. Peak memory is the process's own (VmHWM).
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

# A script's own folder comes first on the path, where the files beside this one would hide packages of the same name.
sys.path[0] = str(Path(__file__).resolve().parents[1])

GROUP, BATCH, LENGTH, RATE = 8, 16, 64, 1e-4
PROBLEMS = {"size": 3000, "seed": 0, "params": {"min_terms": 3, "max_terms": 5, "min_digits": 1, "max_digits": 2}}
PARTS = {"_generate_single_turn": "rollout", "_calculate_rewards": "reward", "_compute_loss": "forward"}


class Clock:
    """Seconds spent in a trainer's parts, outermost call only, without the first step."""

    def __init__(self) -> None:
        self.seconds = dict.fromkeys((*PARTS.values(), "backward"), 0.0)

    def wrap(self, owner: Any, method: str, part: str) -> None:
        inner = getattr(owner, method)

        def timed(*args: Any, **kwargs: Any) -> Any:
            start = time.perf_counter()
            try:
                return inner(*args, **kwargs)
            finally:
                self.seconds[part] += time.perf_counter() - start

        setattr(owner, method, timed)


def run_one(which: str, work: Path, model: str, adapter: str | None, seconds: float, steps: int, seed: int) -> dict[str, Any]:
    """Train in this process and return the figures."""
    from transformers import TrainerCallback

    from finetune import grpo
    from finetune.config import Config, DataConfig, GrpoConfig
    from finetune.grpo_trainer import Trainer
    from finetune.run import Run, peak_memory

    clock, marks, tokens = Clock(), [], []

    class Stop(TrainerCallback):
        """Marks each step's end and stops when the time is over."""

        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if not marks:  # the first step warms up
                clock.seconds = dict.fromkeys(clock.seconds, 0.0)
            marks.append(time.perf_counter())
            tokens.append(state.num_input_tokens_seen)
            control.should_training_stop = marks[-1] - started > seconds

    def watch(trainer: Any) -> None:
        for method, part in PARTS.items():
            clock.wrap(trainer, method, part)
        clock.wrap(trainer.accelerator, "backward", "backward")
        trainer.add_callback(Stop())

    config = Config(
        data=DataConfig(path="reasoning_gym:chain_sum", format="reasoning_gym", options=PROBLEMS), seed=seed,
        grpo=GrpoConfig(
            preset="dapo", max_steps=steps, learning_rate=RATE, group_size=GROUP, batch_size=BATCH, micro_batch_size=BATCH,
            max_completion_length=LENGTH, probe_prompts=0, diagnosis="warn", save_steps=100_000,
            extra={"mask_truncated_completions": False, "epsilon_high": 0.2},
        ),
    )
    config.model.path, config.model.adapter = model, adapter
    run = Run.create(work / f"{which}-{seed}", "")
    started = time.perf_counter()
    if which == "ours":
        original = Trainer.__init__

        def patched(self: Any, *args: Any, **kwargs: Any) -> None:
            nonlocal started
            original(self, *args, **kwargs)
            watch(self)
            started = time.perf_counter()

        Trainer.__init__ = patched  # type: ignore[method-assign]
        grpo.train(config, run)
        rewards = [row["reward"] for row in run.metrics("grpo")]
    else:
        trainer = plain(config, run, adapter, seed)
        watch(trainer)
        started = time.perf_counter()
        trainer.train()
        rewards = [row["reward"] for row in trainer.state.log_history if "reward" in row]
    counted = len(marks) - 1
    last = [reward for reward, mark in zip(rewards, marks, strict=False) if mark - started > 0.75 * (marks[-1] - started)]
    elapsed = marks[-1] - marks[0]
    return {
        "which": which, "seed": seed, "steps": len(marks), "seconds_per_step": elapsed / counted,
        **{part: value / counted for part, value in clock.seconds.items()},
        "tokens_per_second": (tokens[-1] - tokens[0]) / elapsed, "peak_bytes": peak_memory(),
        "reward_first": rewards[0], "reward_last_quarter": statistics.mean(last), "seconds": marks[-1] - started,
    }


def plain(config: Any, run: Any, adapter: str | None, seed: int) -> Any:
    """What a user of TRL writes: GRPOTrainer on an NF4 base with LoRA, everything else at its default."""
    import torch
    from peft import LoraConfig, PeftModel, get_peft_model
    from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig
    from trl import GRPOConfig, GRPOTrainer

    from finetune import data, models
    from finetune.rewards.math import correct

    base = models.resolve(config.model.path)
    quantization = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True, bnb_4bit_compute_dtype=torch.bfloat16
    )
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.bfloat16, quantization_config=quantization)
    lora = LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM")
    policy = PeftModel.from_pretrained(model, adapter, is_trainable=True) if adapter else get_peft_model(model, lora)
    arguments = GRPOConfig(
        output_dir=str(run.path("trl")), max_steps=config.grpo.max_steps, learning_rate=RATE, per_device_train_batch_size=BATCH,
        num_generations=GROUP, max_completion_length=LENGTH, lr_scheduler_type="constant", logging_steps=1, seed=seed, report_to="none",
        save_strategy="no", use_cpu=True, bf16=False, gradient_checkpointing=False, disable_tqdm=True,
    )
    return GRPOTrainer(
        model=policy, args=arguments, reward_funcs=[correct], train_dataset=data.grpo_dataset(data.load(config, run).train, config),
        processing_class=AutoTokenizer.from_pretrained(base),
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--adapter", help="folder of an SFT adapter that both start from")
    parser.add_argument("--seconds", type=float, default=240, help="training time of each run")
    parser.add_argument("--steps", type=int, default=1000, help="most steps of each run")
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--model", default="embedded:smollm2", help="folder of another base model")
    parser.add_argument("--work", type=Path, default=None, help="folder for run directories")
    parser.add_argument("--one", choices=("trl", "ours"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        print(json.dumps(run_one(options.one, options.work, options.model, options.adapter, options.seconds, options.steps, options.seeds)))
        return
    with tempfile.TemporaryDirectory() as temporary:
        work = options.work or Path(temporary)
        found: dict[str, list[dict[str, Any]]] = {"trl": [], "ours": []}
        for seed in range(1, options.seeds + 1):
            for which, rows in found.items():
                command = [sys.executable, __file__, "--one", which, "--work", str(work), "--seconds", str(options.seconds),
                           "--steps", str(options.steps), "--seeds", str(seed), "--model", options.model]
                done = subprocess.run(command + (["--adapter", options.adapter] if options.adapter else []),
                                      stdout=subprocess.PIPE, text=True, check=True)
                rows.append(json.loads(done.stdout.splitlines()[-1]))
                print(json.dumps(rows[-1]), flush=True)
    names = ("seconds_per_step", *PARTS.values(), "backward", "tokens_per_second", "reward_first", "reward_last_quarter")
    print(f"{'median over seeds':22}{'plain TRL':>12}{'ours':>12}{'ratio':>8}")
    for name in (*names, "peak_bytes"):
        trl, ours = (statistics.median(row[name] for row in found[which]) for which in ("trl", "ours"))
        print(f"{name:22}{trl:12.4g}{ours:12.4g}{ours / trl if trl else float('nan'):8.2f}")
    trl, ours = (statistics.median(row["seconds_per_step"] for row in found[which]) for which in ("trl", "ours"))
    print(f"ours makes {trl / ours:.1f} times plain TRL's steps per hour")


if __name__ == "__main__":
    main()
