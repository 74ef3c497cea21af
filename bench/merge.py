"""Fold a 7B beside `cp` and beside peft's load + merge_and_unload + save: seconds and peak memory, in one run.

    python bench/merge.py --make DIR             # write a random checkpoint of DeepSeekMath-7B's shape and an adapter
    (14 GB), then measure
    python bench/merge.py BASE [ADAPTER]         # measure on a checkpoint that is there (ADAPTER defaults to
    BASE-adapter)

cp and fold take turns, three times each; medians count. Every fold and peft's way run in their own process, whose peak
is VmHWM of /proc/self/status (private plus file-backed pages). The fold's time includes its certificate, SHA-256 of
every byte read and written among it. Outputs are deleted at once.
"""

import argparse
import json
import shutil
import statistics
import subprocess
import sys
import time
from pathlib import Path

import torch
from safetensors.torch import save_file

ROOT = Path(__file__).resolve().parents[1]
HIDDEN, FFN, VOCAB, RANK, SHARD = 4096, 11008, 102400, 16, 2.4e9
LINEAR = {
    "self_attn.q_proj": (HIDDEN, HIDDEN), "self_attn.k_proj": (HIDDEN, HIDDEN), "self_attn.v_proj": (HIDDEN, HIDDEN),
    "self_attn.o_proj": (HIDDEN, HIDDEN), "mlp.gate_proj": (FFN, HIDDEN), "mlp.up_proj": (FFN, HIDDEN), "mlp.down_proj": (HIDDEN, FFN),
}  # fmt: skip

FOLD = """
import json, sys, time
import merge
start = time.perf_counter()
certificate = merge.fold(*sys.argv[1:4])
seconds = time.perf_counter() - start
assert certificate.changed == certificate.expected and len(certificate.base) > 1
"""
PEFT = """
import json, sys, time
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM
start = time.perf_counter()
model = AutoModelForCausalLM.from_pretrained(sys.argv[1], dtype=torch.bfloat16)
PeftModel.from_pretrained(model, sys.argv[2]).merge_and_unload().save_pretrained(sys.argv[3])
seconds = time.perf_counter() - start
"""
REPORT = """
peak = next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("VmHWM")) / 1e6
print(json.dumps({"seconds": seconds, "gigabytes": peak}))
"""


def make(folder: Path, layers: int) -> None:
    """A random bf16 Llama of DeepSeekMath-7B's sizes in shards, and a LoRA adapter of rank 16 on all linear layers, in
    `folder`-adapter."""
    folder.mkdir(parents=True)
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(VOCAB * HIDDEN, generator=generator).mul_(0.02).bfloat16()
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (VOCAB, HIDDEN)}
    for layer in range(layers):
        shapes |= {f"model.layers.{layer}.{name}.weight": shape for name, shape in LINEAR.items()}
        shapes |= {
            f"model.layers.{layer}.{name}.weight": (HIDDEN,) for name in ("input_layernorm", "post_attention_layernorm")
        }
    shapes |= {"model.norm.weight": (HIDDEN,), "lm_head.weight": (VOCAB, HIDDEN)}
    shard: dict[str, torch.Tensor] = {}
    places: dict[str, str] = {}
    for name, shape in shapes.items():
        shard[name] = noise[: torch.Size(shape).numel()].reshape(shape).clone()
        if sum(tensor.nbytes for tensor in shard.values()) > SHARD or name == "lm_head.weight":
            file = f"model-{len(set(places.values())) + 1:05d}.safetensors"
            save_file(shard, folder / file, metadata={"format": "pt"})
            places |= dict.fromkeys(shard, file)
            shard = {}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": places}))
    config = {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": HIDDEN, "intermediate_size": FFN, "num_hidden_layers": layers,
        "num_attention_heads": 32, "num_key_value_heads": 32, "vocab_size": VOCAB, "tie_word_embeddings": False, "torch_dtype": "bfloat16",
        "bos_token_id": 100000, "eos_token_id": 100001,
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(config))
    adapter: dict[str, torch.Tensor] = {}
    for layer in range(layers):
        for name, (rows, columns) in LINEAR.items():
            key = f"base_model.model.model.layers.{layer}.{name}"
            adapter[f"{key}.lora_A.weight"] = torch.randn(RANK, columns, generator=generator) * 0.01
            adapter[f"{key}.lora_B.weight"] = torch.randn(rows, RANK, generator=generator) * 0.01
    beside = Path(f"{folder}-adapter")
    beside.mkdir()
    save_file(adapter, beside / "adapter_model.safetensors", metadata={"format": "pt"})
    settings = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "r": RANK,
        "lora_alpha": 2 * RANK,
        "target_modules": [name.split(".")[1] for name in LINEAR],
    }
    (beside / "adapter_config.json").write_text(json.dumps(settings))


def run(code: str, base: Path, adapter: Path, out: Path) -> dict[str, float]:
    """Run one way in its own process; its seconds and peak gigabytes. The output is deleted."""
    command = [sys.executable, "-W", "ignore", "-c", code + REPORT, str(base), str(adapter), str(out)]
    done = subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, text=True, check=True)
    shutil.rmtree(out)
    return json.loads(done.stdout.splitlines()[-1])


def copy(base: Path, out: Path) -> float:
    start = time.perf_counter()
    subprocess.run(["cp", "-r", base, out], check=True)
    seconds = time.perf_counter() - start
    shutil.rmtree(out)
    return seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("base", type=Path, nargs="?")
    parser.add_argument("adapter", type=Path, nargs="?")
    parser.add_argument(
        "--make", type=Path, metavar="DIR", help="write the checkpoint to DIR/base first; it stays there"
    )
    parser.add_argument("--rounds", type=int, default=3)
    arguments = parser.parse_args()
    if (arguments.base is None) == (arguments.make is None):
        parser.error("give a checkpoint folder or --make DIR")
    base = (arguments.make / "base" if arguments.make else arguments.base).resolve()
    if arguments.make:
        make(base, 30)
    adapter = (arguments.adapter or Path(f"{base}-adapter")).resolve()
    size = sum(file.stat().st_size for file in base.iterdir())
    out, small = base.parent / "bench-merge-out", base.parent / "bench-merge-8-layers"

    copies, folds = [], []
    for number in range(arguments.rounds):
        copies.append(copy(base, out))
        folds.append(run(FOLD, base, adapter, out))
        print(
            f"round {number + 1}: cp {copies[-1]:.1f} s, fold {folds[-1]['seconds']:.1f} s, {folds[-1]['gigabytes']:.2f} GB",
            flush=True,
        )
    peft = run(PEFT, base, adapter, out)
    make(small, 8)
    try:
        few = run(FOLD, small, Path(f"{small}-adapter"), out)
    finally:
        shutil.rmtree(small)
        shutil.rmtree(f"{small}-adapter")
    cp, fold = statistics.median(copies), statistics.median(each["seconds"] for each in folds)
    memory = max(each["gigabytes"] for each in folds)
    print(f"\n{size / 1e9:.1f} GB, medians of {arguments.rounds}        seconds   peak GB")
    print(f"cp                               {cp:7.1f}")
    print(f"fold, certificate included       {fold:7.1f}   {memory:7.2f}    {fold / cp:.2f} x cp")
    print(
        f"peft load + merge + save (once)  {peft['seconds']:7.1f}   {peft['gigabytes']:7.2f}    {peft['seconds'] / fold:.2f} x fold"
    )
    print(f"fold of 8 layers (once)          {few['seconds']:7.1f}   {few['gigabytes']:7.2f}")


if __name__ == "__main__":
    main()
