"""The merged model as a stream: for each output tensor its name, shape and dtype, and its folded rows in fp32.

    weights = MergedWeights(base, adapter, onto="full")
    for name, tensor in weights.tensors.items():
        rows = weights.rows(name, 0, tensor.shape[0])      # fp32, not yet rounded to tensor.dtype

`fold` writes this stream as safetensors and `gguf` quantises it, so neither holds a model in memory nor writes the
other's intermediate. `base` may be any model folder, with `adapter=None` for a model that is merged already.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch

from merge.adapter import Adapter
from merge.checkpoint import FLOATS, Checkpoint, TensorInfo, read_json
from merge.combine import Combination
from merge.errors import MergeError
from merge.nf4 import Nf4Tensor, quantised_names
from merge.updates import Replace, Update, same_effect

BLOCK_ELEMENTS = 1 << 17
"""Elements in a block of rows: its fp32 working copies stay in a core's second-level cache."""
MIN_ROWS = 32
"""No block is smaller (but for a smaller tensor): tiny products may go to another BLAS kernel, which rounds
differently."""

DTYPE_NAMES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
INPUT_EMBEDDINGS = ("model.embed_tokens.weight", "transformer.wte.weight", "gpt_neox.embed_in.weight")
OUTPUT_EMBEDDINGS = "lm_head.weight"

AdapterLike = str | Path | Combination
Read = Callable[[TensorInfo, int, int], torch.Tensor]


@dataclass(frozen=True)
class MergedTensor:
    """One tensor of the output: where its base rows are, and what happens to them."""

    name: str
    source: TensorInfo
    shape: tuple[int, ...]
    dtype: torch.dtype
    updates: list[Update] = field(default_factory=list)
    nf4: bool = False

    @property
    def is_copy(self) -> bool:
        return not self.updates and not self.nf4

    @property
    def nbytes(self) -> int:
        return torch.Size(self.shape).numel() * self.dtype.itemsize


class MergedWeights:
    """A base model folder with adapter folders folded in, in order. Raises MergeError for whatever cannot be folded
    exactly."""

    def __init__(
        self,
        base: str | Path,
        adapter: AdapterLike | Sequence[AdapterLike] | None = None,
        onto: str = "full",
        dtype: str | torch.dtype | None = None,
    ):
        if onto not in ("full", "nf4"):
            raise MergeError(
                f"onto = {onto!r}; expected 'full' (the original weights) or 'nf4' (the 4-bit weights that QLoRA trained on)."
            )
        if isinstance(dtype, str) and dtype not in DTYPE_NAMES:
            raise MergeError(f"dtype = {dtype!r}; expected one of {', '.join(DTYPE_NAMES)}.")
        self.onto = onto
        self.dtype = DTYPE_NAMES[dtype] if isinstance(dtype, str) else dtype
        self.base = Checkpoint(base)
        self.base_config = read_json(self.base.folder / "config.json")
        if "quantization_config" in self.base_config:
            raise MergeError(
                f"{base}: config.json has a quantization_config, so these weights are quantised already; fold onto the original checkpoint."
            )
        given = [] if adapter is None else [adapter] if isinstance(adapter, str | Path | Combination) else list(adapter)
        self.adapters = [one if isinstance(one, Combination) else Adapter(one) for one in given]
        changed = [one.folder for one in self.adapters if isinstance(one, Adapter) and one.initial is not None]
        if onto == "nf4" and changed:
            raise MergeError(
                f"{changed[0]}: its initialisation changed the base weights before they were quantised, so what it trained on is "
                "not dequant(NF4(W)); use onto='full'."
            )
        self.config = dict(self.base_config)
        self.tensors = self._plan()
        if self.dtype is not None:
            self.config["dtype" if "dtype" in self.config else "torch_dtype"] = str(self.dtype).removeprefix("torch.")
        self._open: tuple[str, Stream] | None = None

    def _plan(self) -> dict[str, MergedTensor]:
        base, head, tied = self.base, None, bool(self.config.get("tie_word_embeddings"))
        embeddings = next((name for name in INPUT_EMBEDDINGS if name in base), None)
        if tied and OUTPUT_EMBEDDINGS not in base and embeddings is not None:
            head = replace(base[embeddings], name=OUTPUT_EMBEDDINGS)
        updates: dict[str, list[Update]] = {}
        for adapter in self.adapters:
            plan = adapter.plan(base, head)
            if tied and embeddings is not None:
                self._tie(adapter, plan, embeddings)
            for name, more in plan.items():
                updates.setdefault(name, []).extend(more)
        sources = dict(base.tensors)
        if tied and embeddings is not None and updates.get(embeddings, []) != updates.get(OUTPUT_EMBEDDINGS, []):
            # The two matrices were trained apart: tied again, one of them would be overwritten at the next load.
            self.config["tie_word_embeddings"] = False
            if head is not None:
                sources[OUTPUT_EMBEDDINGS] = head
        elif head is not None:
            updates.pop(OUTPUT_EMBEDDINGS, None)
        quantised = quantised_names(base, self.base_config) if self.onto == "nf4" else frozenset()
        tensors = {}
        for name, source in sources.items():
            tensors[name] = self._tensor(name, source, updates.get(name, []), name in quantised)
        self._check_vocabulary(tensors, embeddings)
        return tensors

    def _tie(self, adapter: Adapter | Combination, plan: dict[str, list[Update]], embeddings: str) -> None:
        """Make the two plans of a tied pair one and the same list where peft trained them as one."""
        indices = adapter.config.get("trainable_token_indices")
        shared_rows = indices and (not isinstance(indices, dict) or len(indices) == 1) and OUTPUT_EMBEDDINGS not in plan
        if (
            shared_rows
            and embeddings in plan
            or (
                OUTPUT_EMBEDDINGS in plan
                and embeddings in plan
                and same_effect(plan[embeddings], plan[OUTPUT_EMBEDDINGS])
            )
        ):
            plan[OUTPUT_EMBEDDINGS] = plan[embeddings]

    def _tensor(self, name: str, source: TensorInfo, updates: list[Update], quantised: bool) -> MergedTensor:
        if updates and source.dtype not in FLOATS:
            raise MergeError(
                f"{source.file}: {name} has dtype {source.dtype}; expected float32, float16 or bfloat16 in a base that is folded onto."
            )
        shape = source.shape
        for update in updates:
            shape = update.shape(shape)
        if quantised and any(isinstance(update, Replace) for update in updates):
            quantised = False
        dtype = self.dtype if self.dtype is not None and source.dtype in FLOATS else source.dtype
        return MergedTensor(name, source, shape, dtype, updates, quantised)

    def _check_vocabulary(self, tensors: dict[str, MergedTensor], embeddings: str | None) -> None:
        changed = [tensor for tensor in tensors.values() if tensor.shape != tensor.source.shape]
        for tensor in changed:
            if tensor.name not in (embeddings, OUTPUT_EMBEDDINGS, "lm_head.bias"):
                raise MergeError(
                    f"the adapter holds {tensor.name} with shape {tensor.shape}, the base has {tensor.source.shape}; only a vocabulary may change its size."
                )
        if not changed:
            return
        sizes = {tensors[name].shape[0] for name in (embeddings, OUTPUT_EMBEDDINGS) if name in tensors}
        if len(sizes) > 1:
            raise MergeError(
                f"the input and output embeddings would have {' and '.join(map(str, sorted(sizes)))} rows; the adapter must save both after a resize."
            )
        self.config["vocab_size"] = sizes.pop()

    @contextmanager
    def open(self, name: str, read: Read | None = None) -> Iterator["Stream"]:
        """A tensor ready to be folded block by block; its matrices are dropped at the end. `read` replaces the reader
        of base rows."""
        stream = Stream(self.tensors[name], read or self._read)
        try:
            yield stream
        finally:
            stream.close()

    def rows(self, name: str, start: int, stop: int) -> torch.Tensor:
        """Folded rows start..stop in fp32, shape (stop - start, ...). Rows of one tensor after another; not for several
        threads at once."""
        if self._open is None or self._open[0] != name:
            self.close()
            self._open = (name, Stream(self.tensors[name], self._read))
        return self._open[1].rows(start, stop)

    def _read(self, info: TensorInfo, start: int, stop: int) -> torch.Tensor:
        return self.base.read(info, start, stop)

    def close(self) -> None:
        """Drop what the last `rows` loaded and close all files."""
        if self._open is not None:
            self._open[1].close()
            self._open = None
        self.base.close()
        for adapter in self.adapters:
            adapter.close()


class Stream:
    """One merged tensor with its updates loaded."""

    def __init__(self, tensor: MergedTensor, read: Read):
        self.tensor, self._read = tensor, read
        self.nf4 = Nf4Tensor(tensor.source, read, tensor.dtype) if tensor.nf4 else None
        self.updates = [update for update in tensor.updates if update.load()]
        self._whole: torch.Tensor | None = None

    @property
    def changes(self) -> bool:
        """False if the output is the base's tensor, rounded to the output's dtype: no update, or only deltas of exactly
        zero."""
        return bool(self.updates) or self.nf4 is not None

    @property
    def resized(self) -> bool:
        return self.tensor.shape != self.tensor.source.shape

    def blocks(self) -> list[tuple[int, int]]:
        """(start, stop) of the blocks of rows in which to ask for this tensor."""
        rows = self.tensor.shape[0] if self.tensor.shape else 1
        width = max(torch.Size(self.tensor.shape[1:]).numel(), 1)
        step = max(BLOCK_ELEMENTS // width // MIN_ROWS, 1) * MIN_ROWS
        if self.nf4 is not None:
            step = self.nf4.align(step)
        if any(update.whole for update in self.updates) or rows < 2 * step:
            return [(0, rows)]
        starts = list(range(0, rows - step + 1, step))
        return list(zip(starts, [*starts[1:], rows], strict=True))

    def base_rows(self, start: int, stop: int) -> torch.Tensor:
        """Rows that the updates are folded onto, fp32, a new tensor; zeros past the base's last row if the vocabulary
        has grown."""
        if self.nf4 is not None:
            return self.nf4.rows(start, stop)
        if self.resized:
            return torch.zeros((stop - start, *self.tensor.shape[1:]))
        return self._read(self.tensor.source, start, stop).to(torch.float32, copy=True)

    def apply(self, weight: torch.Tensor, start: int) -> torch.Tensor:
        """The updates applied to rows of the base from `start` on: a new fp32 tensor."""
        for update in self.updates:
            weight = update.apply(weight, start)
        return weight

    def rows(self, start: int, stop: int) -> torch.Tensor:
        """Folded rows start..stop, fp32; the same bits whatever the range, since the work is done in the blocks of
        `blocks`."""
        if any(update.whole for update in self.updates):
            if self._whole is None:
                self._whole = self.apply(self.base_rows(0, self.tensor.shape[0]), 0)
            return self._whole[start:stop]
        touched = [(low, high) for low, high in self.blocks() if low < stop and high > start]
        parts = [self.apply(self.base_rows(low, high), low)[max(start - low, 0) : stop - low] for low, high in touched]
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def close(self) -> None:
        for update in self.updates:
            update.unload()
        self.nf4 = self._whole = None
