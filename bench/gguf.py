"""GGUF export of base + adapter beside `cp` of the base: time, memory, file size.

    python bench/gguf.py BASE ADAPTER [--type Q8_0] [--repeats 3] [--work DIR]

BASE is a Llama-family folder (with 7B weights to see the numbers of the README; it needs no tokenizer, a small one is made).
The export and `cp` run in alternation; the median is printed. Memory is the export process's own peak (VmHWM, private plus
file-backed).
"""

import argparse
import json
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

# A script's own folder comes first on the path, where this file would hide the gguf package.
sys.path[0] = str(Path(__file__).resolve().parents[1])

EXPORT = """
import sys, time
from merge.gguf import to_gguf
base, adapter, out, kind = sys.argv[1:]
start = time.perf_counter()
to_gguf(base, out, kind, adapter=adapter)
seconds = time.perf_counter() - start
peak = next(line.split()[1] for line in open("/proc/self/status") if line.startswith("VmHWM"))
print(seconds, int(peak) * 1024)
"""


def adapter_with_tokenizer(adapter: Path, folder: Path) -> Path:
    """The adapter's files and a small ByteLevel tokenizer, which an export looks for there first."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    folder.mkdir()
    for file in adapter.iterdir():
        (folder / file.name).symlink_to(file.resolve())
    if not (folder / "tokenizer.json").exists():
        alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
        vocabulary = {text: index for index, text in enumerate([*alphabet, "<eos>"])}
        tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        tokenizer.decoder = decoders.ByteLevel()
        tokenizer.add_special_tokens(["<eos>"])
        tokenizer.save(str(folder / "tokenizer.json"))
        (folder / "tokenizer_config.json").write_text(json.dumps({"eos_token": "<eos>"}))
    return folder


def copy_seconds(base: Path, work: Path) -> float:
    start = time.perf_counter()
    subprocess.run(["cp", "-r", base, work / "copy"], check=True)
    seconds = time.perf_counter() - start
    shutil.rmtree(work / "copy")
    return seconds


def export(base: Path, adapter: Path, out: Path, kind: str) -> tuple[float, int, int]:
    """Seconds, peak memory in bytes, size of the file in bytes."""
    command = [sys.executable, "-c", EXPORT, base, adapter, out, kind]
    root = Path(__file__).resolve().parents[1]
    done = subprocess.run(command, check=True, capture_output=True, text=True, cwd=root)
    seconds, peak = done.stdout.split()
    size = out.stat().st_size
    out.unlink()
    return float(seconds), int(peak), size


def numpy_seconds(parameters: float) -> float:
    """Time of the gguf package's own Q8_0 quantiser for so many parameters, from a sample."""
    import numpy as np
    from gguf import GGMLQuantizationType, quants

    rows = np.random.default_rng(0).standard_normal((4096, 4096), dtype=np.float32)
    start = time.perf_counter()
    quants.quantize(rows, GGMLQuantizationType.Q8_0)
    return (time.perf_counter() - start) * parameters / rows.size


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("base", type=Path)
    parser.add_argument("adapter", type=Path)
    parser.add_argument("--type", default="Q8_0")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--work", type=Path, help="folder on the disk to measure (default: the base's parent)")
    args = parser.parse_args()
    base, nbytes = args.base.resolve(), sum(file.stat().st_size for file in args.base.iterdir())
    work = Path(tempfile.mkdtemp(prefix="bench-gguf-", dir=args.work or base.parent))
    try:
        adapter = adapter_with_tokenizer(args.adapter, work / "adapter")
        copies, exports = [], []
        for _ in range(args.repeats):
            copies.append(copy_seconds(base, work))
            exports.append(export(base, adapter, work / "out.gguf", args.type))
            print(f"cp {copies[-1]:.1f} s, export {exports[-1][0]:.1f} s", flush=True)
        copied, seconds = statistics.median(copies), statistics.median(each[0] for each in exports)
        peak, size = max(each[1] for each in exports), exports[0][2]
        print(f"cp of {nbytes / 1e9:.1f} GB: {copied:.1f} s (median of {args.repeats})")
        print(f"{args.type} of base + adapter: {seconds:.1f} s, {seconds / copied:.2f} x cp")
        print(f"peak memory {peak / 1e9:.2f} GB, file {size / 1e9:.2f} GB")
        print(f"gguf's NumPy quantiser alone, Q8_0: about {numpy_seconds(nbytes / 2):.0f} s")
    finally:
        shutil.rmtree(work)


if __name__ == "__main__":
    main()
