"""`python -m finetune recipe=sft` beside `trl sft`: same model in NF4, same examples, LoRA, batch, steps and learning rate.

    python bench/sft.py ../shared/data/gsm8k/train.jsonl [--steps 4] [--batch 8] [--seeds 0 1 2] [--trl="--dtype bfloat16"]

Both run through their command lines, one after the other, on steps x batch examples of GSM8K (after one warm-up step, which no
rate counts); TRL keeps its other defaults (padded batches, gradient checkpointing). Printed: supervised and total tokens per
second over the same number of steps, peak memory of the process (private plus file-backed), and the loss per supervised token on
held-out examples of the two adapters, both measured by plain transformers on the NF4 base.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parents[1])

from finetune import models  # noqa: E402
from finetune.config import ModelConfig  # noqa: E402

LORA = {"r": 16, "alpha": 32}
LEARNING_RATE = 5e-4

HELD_OUT = """
import json, sys, torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig
base, held_out, *adapters = sys.argv[1:]
tokenizer = AutoTokenizer.from_pretrained(base)
nf4 = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True, bnb_4bit_compute_dtype=torch.bfloat16)
model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.bfloat16, quantization_config=nf4)
losses = []
for adapter in [None, *adapters]:
    if adapter is not None:
        model = PeftModel.from_pretrained(model, adapter)
    total = count = 0
    for line in open(held_out):
        messages = json.loads(line)["messages"]
        prompt = tokenizer.apply_chat_template(messages[:1], add_generation_prompt=True, tokenize=False)
        answer = messages[1]["content"] + tokenizer.eos_token
        start = len(tokenizer(prompt, add_special_tokens=False)["input_ids"])
        ids = torch.tensor([tokenizer(prompt + answer, add_special_tokens=False)["input_ids"]])
        with torch.no_grad():
            logits = model(input_ids=ids).logits[0, start - 1 : -1].float()
        total += torch.nn.functional.cross_entropy(logits, ids[0, start:], reduction="sum").item()
        count += ids.shape[1] - start
    losses.append(total / count)
    if adapter is not None:
        model = model.unload()
print(json.dumps(losses))
"""


def run(command: list[str], log: Path) -> tuple[list[tuple[float, str]], int]:
    """Run a command, stamp the lines of its output with the time, return them and the peak resident memory in bytes."""
    environment = os.environ | {"PYTHONUNBUFFERED": "1", "HF_HUB_OFFLINE": "1", "PYTHONPATH": sys.path[0], "COLUMNS": "200"}
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment)
    lines = []
    assert process.stdout is not None
    for line in process.stdout:
        lines.append((time.perf_counter(), line))
    # The usage of a process counts that of the processes it waited for: trl starts its trainer through accelerate.
    _, status, usage = os.wait4(process.pid, 0)
    log.write_text("".join(line for _, line in lines))
    if status != 0:
        raise SystemExit(f"{command[:4]} failed, see {log}:\n{''.join(line for _, line in lines[-15:])}")
    return lines, usage.ru_maxrss * 1024


def lengths(tokenizer, examples: list[list[dict]], tail: str) -> tuple[int, int]:
    """(tokens, supervised tokens) of chats; `tail` is what is supervised after the answer."""
    tokens = supervised = 0
    for messages in examples:
        prompt = tokenizer.apply_chat_template(messages[:1], add_generation_prompt=True, tokenize=False)
        before = len(tokenizer(prompt, add_special_tokens=False)["input_ids"])
        whole = len(tokenizer(prompt + messages[1]["content"] + tail, add_special_tokens=False)["input_ids"])
        tokens, supervised = tokens + whole, supervised + whole - before
    return tokens, supervised


def ours(base: Path, work: Path, steps: int, batch: int, seed: int) -> dict:
    folder = work / f"ours-{seed}"
    _, peak = run(
        [
            sys.executable, "-m", "finetune", "recipe=sft", f"run_dir={folder}", f"model.path={base}", f"data.path={work}/train.jsonl",
            f"data.eval_path={work}/held_out.jsonl", "data.format=auto", "data.options={}", f"sft.max_steps={steps}", f"sft.batch_size={batch}",
            f"sft.micro_batch_size={batch}", f"sft.learning_rate={LEARNING_RATE}", "sft.scheduler=constant", "sft.warmup_steps=0",
            f"lora.r={LORA['r']}", f"lora.alpha={LORA['alpha']}", f"seed={seed}",
        ],
        work / f"ours-{seed}.log",
    )
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    seconds = rows[-1]["seconds"] - rows[0]["seconds"]
    return {
        "supervised": (rows[-1]["supervised_tokens"] - rows[0]["supervised_tokens"]) / seconds,
        "tokens": (rows[-1]["tokens"] - rows[0]["tokens"]) / seconds, "peak": peak, "adapter": folder / "sft/adapter",
    }


def trl(base: Path, work: Path, steps: int, batch: int, seed: int, tokenizer, examples: list, extra: list[str]) -> dict:
    folder = work / f"trl-{seed}"
    lines, peak = run(
        [
            str(Path(sys.executable).parent / "trl"), "sft", "--model_name_or_path", str(base), "--dataset_name", str(work / "trl_data"),
            "--output_dir", str(folder), "--max_steps", str(steps), "--per_device_train_batch_size", str(batch),
            "--learning_rate", str(LEARNING_RATE), "--lr_scheduler_type", "constant", "--logging_steps", "1", "--save_strategy", "no",
            "--report_to", "none", "--seed", str(seed), "--use_cpu", "--use_peft", "--lora_r", str(LORA["r"]),
            "--lora_alpha", str(LORA["alpha"]), "--lora_dropout", "0", "--lora_target_modules", "all-linear",
            "--load_in_4bit", "--bnb_4bit_quant_type", "nf4", "--use_bnb_nested_quant", *extra,
        ],
        work / f"trl-{seed}.log",
    )
    stamps = [stamp for stamp, line in lines if "'grad_norm'" in line]
    assert len(stamps) == steps, f"{len(stamps)} logged steps in {work}/trl-{seed}.log, expected {steps}"
    # Every example is seen once; the steps after the first have their share of the tokens.
    share = (steps - 1) / steps / (stamps[-1] - stamps[0])
    tokens, supervised = lengths(tokenizer, examples, tokenizer.eos_token + "\n")
    return {"supervised": supervised * share, "tokens": tokens * share, "peak": peak, "adapter": folder}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path, help="GSM8K's train.jsonl")
    parser.add_argument("--steps", type=int, default=4, help="optimizer steps that are measured, after one that is not")
    parser.add_argument("--batch", type=int, default=8, help="examples per step")
    parser.add_argument("--held-out", type=int, default=64, help="held-out examples")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--trl", default="", help="further arguments of trl sft, in one string")
    parser.add_argument("--work", type=Path, help="folder for the runs (default: a temporary one)")
    options = parser.parse_args()
    steps = options.steps + 1

    base = models.resolve("embedded:smollm2")
    tokenizer = models.load_tokenizer(base, ModelConfig())
    chats = [
        [{"role": "user", "content": row["question"]}, {"role": "assistant", "content": row["answer"]}]
        for row in map(json.loads, options.data.read_text(encoding="utf-8").splitlines())
    ]
    held_out, chats = chats[: options.held_out], chats[options.held_out :]
    results: dict[str, list[dict]] = {"finetune": [], "trl sft": []}
    with tempfile.TemporaryDirectory() as temporary:
        for seed in options.seeds:
            work = (options.work or Path(temporary)) / str(seed)
            (work / "trl_data").mkdir(parents=True)
            size = steps * options.batch
            chosen = chats[seed * size : (seed + 1) * size]
            for name, rows in (("train.jsonl", chosen), ("held_out.jsonl", held_out)):
                (work / name).write_text("".join(json.dumps({"messages": messages}) + "\n" for messages in rows))
            (work / "trl_data/train.jsonl").write_text(
                "".join(json.dumps({"prompt": messages[:1], "completion": messages[1:]}) + "\n" for messages in chosen)
            )
            pair = {
                "finetune": ours(base, work, steps, options.batch, seed),
                "trl sft": trl(base, work, steps, options.batch, seed, tokenizer, chosen, options.trl.split()),
            }
            command = [sys.executable, "-c", HELD_OUT, str(base), str(work / "held_out.jsonl"), *(str(side["adapter"]) for side in pair.values())]
            lines, _ = run(command, work / "held-out.log")
            untrained, *losses = json.loads(lines[-1][1])
            for loss, (name, side) in zip(losses, pair.items(), strict=True):
                results[name].append(side | {"loss": loss})
                print(
                    f"seed {seed}  {name:9} {side['supervised']:7.1f} supervised tokens/s  {side['tokens']:7.1f} tokens/s  "
                    f"{side['peak'] / 1e9:5.2f} GB  held-out loss {loss:.4f} (untrained {untrained:.4f})", flush=True,
                )

    def median(name: str, key: str) -> float:
        return statistics.median(side[key] for side in results[name])

    print(
        f"finetune / trl sft: supervised tokens/s x {median('finetune', 'supervised') / median('trl sft', 'supervised'):.2f}, "
        f"tokens/s x {median('finetune', 'tokens') / median('trl sft', 'tokens'):.2f}, "
        f"peak memory x {median('finetune', 'peak') / median('trl sft', 'peak'):.2f}, "
        f"held-out loss {statistics.mean(side['loss'] for side in results['finetune']):.4f} "
        f"and {statistics.mean(side['loss'] for side in results['trl sft']):.4f}"
    )


if __name__ == "__main__":
    main()
