"""Write a Llama-family model as GGUF for llama.cpp and Ollama, without a compiler, straight from safetensors.

    to_gguf("merged", "model-q8_0.gguf", "Q8_0")                     # a model folder
    to_gguf("base", "model-q8_0.gguf", "Q8_0", adapter="adapter")    # base + adapter, no merged folder in between

Tensor names, tensor types, the order of q and k rows and the metadata follow llama.cpp's convert_hf_to_gguf.py, and the
header is written by the `gguf` package. The weights go block by block from the base's shards to their place in the
file, a tensor to a core, so memory does not grow with the model.
"""

from __future__ import annotations

import ctypes
import errno
import math
import os
import shutil
import tempfile
import threading
import warnings
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch

from merge.checkpoint import TensorInfo
from merge.errors import MergeError
from merge.gguf_llama import (
    IN_LAYER,
    OUTSIDE_LAYERS,
    add_metadata,
    check_model,
    gguf_name,
    head_dim,
    heads_of,
    rope_factors,
    row_order,
)
from merge.gguf_quant import BLOCK, BLOCK_BYTES, BLOCK_QUANTIZERS, FLOATS, LARGEST, quantize
from merge.gguf_tokenizer import GgufTokenizer, read_tokenizer
from merge.weights import MergedWeights

K_QUANTS = ("Q2_K", "Q3_K_S", "Q3_K_M", "Q3_K_L", "Q4_K_S", "Q4_K_M", "Q5_K_S", "Q5_K_M", "Q6_K")
"""Types that llama.cpp's own quantiser makes, if llama-cpp-python is installed."""

TYPES = (*FLOATS, *BLOCK_QUANTIZERS, *K_QUANTS)

BLOCKS_AT_ONCE = 4
"""Blocks of `Stream.blocks` handled together: fewer steps in Python, and still in a core's second-level cache."""

Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class _Plan:
    """One tensor of the file."""

    name: str
    source: str
    shape: tuple[int, ...]
    kind: str
    heads: int
    """Heads whose rows change their order (q and k), or 0."""

    @property
    def columns(self) -> int:
        """Weights in a row; a bias or a norm has as many rows as values."""
        return self.shape[1] if len(self.shape) == 2 else 1

    @property
    def row_bytes(self) -> int:
        if self.kind in FLOATS:
            return self.columns * FLOATS[self.kind].itemsize
        return BLOCK_BYTES[self.kind] * (self.columns // BLOCK)

    @property
    def nbytes(self) -> int:
        return self.shape[0] * self.row_bytes


def to_gguf(
    model_dir: str | Path,
    out_file: str | Path,
    type: str,
    *,
    adapter: str | Path | Sequence[str | Path] | None = None,
    onto: str = "full",
    pretokenizer: str | None = None,
    progress: Progress | None = None,
) -> Path:
    """Write a model folder, with adapters folded in if any are given, as one GGUF file; returns its path.

    type: one of TYPES, in either case. With `adapter` the fold is quantised straight from fp32, never rounded to the
    base's dtype in between; `onto` as for `fold`. pretokenizer: llama.cpp's name, for a tokenizer that is not
    recognised. progress(done, total) is called in bytes, from any thread but one at a time. A K-quant is made by
    llama-cpp-python from a GGUF in the base's own precision, which needs room on the disk beside out_file meanwhile.
    Raises MergeError before any weight is read for a model, tokenizer, adapter or type that cannot be exported, an
    existing out_file or a full disk; later for a truncated shard or a weight that is not finite or too large for the
    type. Nothing is left under the name out_file then.
    """
    out_file, kind = Path(out_file), type.upper()
    if kind not in TYPES:
        raise MergeError(f"type = {type!r}; expected one of {', '.join(TYPES)}.")
    requantize = _llama_cpp_quantizer(kind) if kind in K_QUANTS else None
    weights = MergedWeights(model_dir, adapter, onto)
    try:
        check_model(weights.base.folder, weights.config)
        embedding = weights.tensors.get("model.embed_tokens.weight")
        if embedding is None:
            raise MergeError(f"{weights.base.folder} lacks model.embed_tokens.weight; the checkpoint is incomplete.")
        if requantize is not None:
            kind = {dtype: name for name, dtype in FLOATS.items()}.get(embedding.dtype, "F32")
        plans = _plan(weights, kind)
        folders = [each.folder for each in reversed(weights.adapters)] + [weights.base.folder]
        tokenizer = read_tokenizer(folders, embedding.shape[0], pretokenizer)
        total = sum(plan.nbytes for plan in plans)
        with new_file(out_file, total if requantize is None else 2 * total) as temporary:
            plain = temporary if requantize is None else temporary.with_name("plain.gguf")
            offsets = _write_header(plain, weights, plans, kind, tokenizer, out_file.stem)
            _write_tensors(plain, weights, plans, offsets, _Counter(progress, total))
            if requantize is not None:
                requantize(plain, temporary)
    finally:
        weights.close()
    return out_file


def _llama_cpp_quantizer(kind: str) -> Callable[[Path, Path], None]:
    """llama.cpp's own quantiser for a K-quant, or MergeError if llama-cpp-python is not installed."""
    try:
        import llama_cpp
    except ImportError:
        raise MergeError(
            f"type = {kind}: K-quants are made by llama.cpp's quantiser; pip install llama-cpp-python (it compiles "
            f"C++), or take {', '.join(BLOCK_QUANTIZERS)}, which need nothing more."
        ) from None
    import gguf

    def requantize(plain: Path, out: Path) -> None:
        params = llama_cpp.llama_model_quantize_default_params()
        params.ftype = gguf.LlamaFileType[f"MOSTLY_{kind}"].value
        code = llama_cpp.llama_model_quantize(os.fsencode(plain), os.fsencode(out), ctypes.byref(params))
        if code != 0:
            raise MergeError(f"llama.cpp could not quantise to {kind} (code {code}); its own message is above.")

    return requantize


def _plan(weights: MergedWeights, kind: str) -> list[_Plan]:
    """The file's tensors in the base's order, each with its type; checks that all are there and no others."""
    config, folder = weights.config, weights.base.folder
    tied = bool(config.get("tie_word_embeddings"))
    plans, fallen_back = [], []
    for source, tensor in weights.tensors.items():
        if source.endswith(".rotary_emb.inv_freq") or (tied and source == "lm_head.weight"):
            continue  # a buffer that config.json determines; a second copy of the embedding
        name = gguf_name(source, config["num_hidden_layers"], str(folder))
        own = _tensor_kind(name, len(tensor.shape), kind, tied)
        if own in BLOCK_QUANTIZERS and tensor.shape[1] % BLOCK:
            own = "F16"
            fallen_back.append(source)
        heads = heads_of(name, config)
        if heads and tensor.shape[0] != heads * head_dim(config):
            raise MergeError(
                f"{folder}: {source} has {tensor.shape[0]} rows; config.json says {heads} heads of {head_dim(config)}."
            )
        plans.append(_Plan(name, source, tensor.shape, own, heads))
    expected = {f"{name}.weight" for name in OUTSIDE_LAYERS.values() if not (tied and name == "output")}
    expected |= {f"blk.{n}.{name}.weight" for n in range(config["num_hidden_layers"]) for name in IN_LAYER.values()}
    missing = sorted(expected - {plan.name for plan in plans})
    if missing:
        raise MergeError(
            f"{folder} lacks {len(missing)} tensor(s) of a {config['num_hidden_layers']}-layer Llama, first "
            f"{missing[0]} (llama.cpp's name); the checkpoint is incomplete."
        )
    if fallen_back:
        warnings.warn(
            f"{len(fallen_back)} tensor(s) are written as F16: their rows are no multiple of {BLOCK}, as {kind} needs "
            f"({', '.join(fallen_back[:3])}{', ...' if len(fallen_back) > 3 else ''}).",
            stacklevel=3,
        )
    return plans


def _tensor_kind(name: str, dimensions: int, kind: str, tied: bool) -> str:
    """A tensor's type: norms and biases F32, and the output matrix of a 4 or 5-bit file Q8_0 (llama.cpp: 6 bits)."""
    if dimensions == 1:
        return "F32"
    if name == ("token_embd.weight" if tied else "output.weight") and kind in BLOCK_QUANTIZERS:
        return "Q8_0"
    return kind


@contextmanager
def new_file(out_file: Path, nbytes: int) -> Iterator[Path]:
    """A temporary file beside out_file that takes its name when the block ends well, and goes away when it does not."""
    if out_file.exists():
        raise MergeError(f"{out_file} exists already; give another name or remove it.")
    if not out_file.parent.is_dir():
        raise MergeError(f"{out_file.parent} is not a folder; create it first.")
    free = shutil.disk_usage(out_file.parent).free
    if free < nbytes + (64 << 20):
        raise MergeError(
            f"{out_file.parent} has {free / 1e9:.2f} GB free, {out_file.name} needs {nbytes / 1e9:.2f} GB; free some "
            "or choose another disk."
        )
    folder = Path(tempfile.mkdtemp(prefix=f".{out_file.name}.", suffix=".unfinished", dir=out_file.parent))
    try:
        yield folder / out_file.name
        os.rename(folder / out_file.name, out_file)
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise MergeError(
                f"the disk of {out_file.parent} filled up during the export; free {nbytes / 1e9:.2f} GB or choose "
                "another place. Nothing is left of it."
            ) from error
        raise
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _write_header(
    file: Path, weights: MergedWeights, plans: list[_Plan], kind: str, tokenizer: GgufTokenizer, name: str
) -> list[int]:
    """Write metadata and the tensor table (and rope factors, which come first); returns each tensor's offset in
    bytes."""
    import gguf

    config, writer = weights.config, gguf.GGUFWriter(file, "llama")
    factors = rope_factors(config)
    if factors is not None:
        writer.add_tensor_info("rope_freqs.weight", factors.shape, factors.numpy().dtype, factors.nbytes)
    for plan in plans:
        dtype = gguf.GGMLQuantizationType[plan.kind]
        writer.add_tensor_info(plan.name, plan.shape, torch.zeros(0).numpy().dtype, plan.nbytes, raw_dtype=dtype)

    add_metadata(writer, config, weights.base.folder, name if weights.adapters else None)
    writer.add_file_type(gguf.LlamaFileType["ALL_F32" if kind == "F32" else f"MOSTLY_{kind}"])
    writer.add_vocab_size(len(tokenizer.vocabulary.tokens))
    tokenizer.write(writer)
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)

    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    writer.close()
    align = writer.data_alignment
    start = gguf.GGUFWriter.ggml_pad(file.stat().st_size, align)
    if factors is not None:
        with file.open("r+b") as stream:
            stream.seek(start)
            stream.write(factors.numpy().tobytes())
        start += gguf.GGUFWriter.ggml_pad(factors.nbytes, align)
    offsets = []
    for plan in plans:
        offsets.append(start)
        start += gguf.GGUFWriter.ggml_pad(plan.nbytes, align)
    os.truncate(file, start)
    return offsets


class _Counter:
    """Adds up bytes from several threads and reports them; refuses to go on once `stop` is set."""

    def __init__(self, progress: Progress | None, total: int):
        self.progress, self.total, self.done = progress, total, 0
        self.lock, self.stop = threading.Lock(), threading.Event()

    def advance(self, count: int) -> None:
        if self.stop.is_set():
            raise _Stopped
        if self.progress is not None:
            with self.lock:
                self.done += count
                self.progress(self.done, self.total)


class _Stopped(Exception):
    """Another thread has failed."""


def _write_tensors(
    file: Path, weights: MergedWeights, plans: list[_Plan], offsets: list[int], counter: _Counter
) -> None:
    """All tensors, one to a core, the largest first; the first error stops them all."""
    threads, precision = torch.get_num_threads(), torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    descriptor = os.open(file, os.O_WRONLY)
    try:
        with ThreadPoolExecutor(os.cpu_count() or 1, initializer=torch.set_num_threads, initargs=(1,)) as pool:
            ordered = sorted(zip(plans, offsets, strict=True), key=lambda item: -item[0].nbytes)
            jobs = [pool.submit(_write_tensor, descriptor, weights, plan, at, counter) for plan, at in ordered]
            try:
                done, _ = wait(jobs, return_when=FIRST_EXCEPTION)
            finally:  # also when the user interrupts
                counter.stop.set()
                pool.shutdown(cancel_futures=True)
    finally:
        os.close(descriptor)
        torch.set_num_threads(threads)
        torch.set_float32_matmul_precision(precision)
    for job in done:
        if not isinstance(job.exception(), _Stopped):
            job.result()


def _write_tensor(descriptor: int, weights: MergedWeights, plan: _Plan, offset: int, counter: _Counter) -> None:
    order = row_order(plan.shape[0], plan.heads) if plan.heads else None
    # Rows that change places are gathered first: one q or k matrix at a time, in the file's type.
    whole = torch.empty(plan.shape[0], plan.row_bytes, dtype=torch.uint8) if order is not None else None
    buffer = bytearray()

    def read(info: TensorInfo, start: int, stop: int) -> torch.Tensor:
        nonlocal buffer
        count = (stop - start) * info.row_bytes
        if len(buffer) < count:
            buffer = bytearray(count)
        weights.base.read_into(info, start * info.row_bytes, memoryview(buffer)[:count])
        return torch.frombuffer(buffer, dtype=info.dtype, count=count // info.dtype.itemsize).view(-1, *info.shape[1:])

    with weights.open(plan.source, read) as stream:
        blocks = stream.blocks()
        for first in range(0, len(blocks), BLOCKS_AT_ONCE):
            start, stop = blocks[first][0], blocks[min(first + BLOCKS_AT_ONCE, len(blocks)) - 1][1]
            rows = stream.rows(start, stop).view(-1, plan.columns)
            _check_values(rows, weights, plan, start)
            coded = quantize(rows, plan.kind)
            if whole is not None and order is not None:
                whole[order[start:stop]] = coded
            else:
                _pwrite(descriptor, coded, offset + start * plan.row_bytes)
            counter.advance(coded.nbytes)
    if whole is not None:
        _pwrite(descriptor, whole, offset)


def _check_values(rows: torch.Tensor, weights: MergedWeights, plan: _Plan, start: int) -> None:
    """Raise MergeError for a value that is not finite or that the type cannot hold."""
    low, high = (bound.item() for bound in torch.aminmax(rows))
    largest = LARGEST[plan.kind]
    if math.isfinite(low) and math.isfinite(high) and -largest <= low and high <= largest:
        return
    wrong = ~torch.isfinite(rows) | (rows.abs() > largest)
    row, column = wrong.nonzero()[0].tolist()
    what = f"{weights.base.folder}: {plan.source} has {rows[row, column].item()} in row {start + row}, column {column}"
    if not (math.isfinite(low) and math.isfinite(high)):
        raise MergeError(f"{what}; expected finite weights. The checkpoint is damaged or its training diverged.")
    raise MergeError(f"{what}; {plan.kind} holds at most {largest:g}. Export as BF16 or F32 instead.")


def _pwrite(descriptor: int, coded: torch.Tensor, offset: int) -> None:
    view = memoryview(coded.view(-1).numpy())  # type: ignore[arg-type]  # an ndarray is a buffer
    while view:
        written = os.pwrite(descriptor, view, offset)
        view, offset = view[written:], offset + written
