"""Read a model or adapter folder tensor by tensor, in blocks of rows, without ever holding a shard in memory.

`Checkpoint(folder)` lists every tensor (`tensors`: name -> `TensorInfo`) of `*.safetensors` shards or, failing that, of
`pytorch_model*.bin` shards (opened with weights_only=True), and reads rows with `pread`, so the process's memory does
not grow with the file.

The safetensors layout is 8 bytes (little-endian length of the header), a JSON header, then the tensors' bytes without
holes: https://github.com/huggingface/safetensors#format.
"""

import json
import os
import pickle
import threading
from dataclasses import dataclass
from pathlib import Path

import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from merge.errors import MergeError

DTYPES: dict[str, torch.dtype] = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2, "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8,
    "BOOL": torch.bool,
}  # fmt: skip
DTYPE_CODES = {dtype: code for code, dtype in DTYPES.items()}
FLOATS = (torch.float32, torch.float16, torch.bfloat16)
"""The dtypes of weights that can be folded and rounded."""


@dataclass(frozen=True)
class TensorInfo:
    """Where one tensor lies: `file`, byte `offset` in that file, shape and dtype."""

    name: str
    file: Path
    offset: int
    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def rows(self) -> int:
        """Length of the first dimension (1 for a scalar)."""
        return self.shape[0] if self.shape else 1

    @property
    def row_bytes(self) -> int:
        return self.nbytes // self.rows if self.rows else 0

    @property
    def nbytes(self) -> int:
        return torch.Size(self.shape).numel() * self.dtype.itemsize


@dataclass(frozen=True)
class Shard:
    """One file of a checkpoint: its tensors in the order of their bytes, and for safetensors the header's own bytes and
    metadata."""

    file: Path
    tensors: list[TensorInfo]
    head: bytes = b""
    metadata: dict[str, str] | None = None


class Checkpoint:
    """A folder's tensors. Raises MergeError for a missing, truncated or inconsistent file."""

    def __init__(self, folder: str | Path, stem: str = "model", bin_stem: str = "pytorch_model"):
        self.folder = Path(folder)
        if not self.folder.is_dir():
            raise MergeError(
                f"{self.folder} is not a folder; expected a local folder with {stem}.safetensors or {bin_stem}.bin (download a hub model first)."
            )
        self.shards = [_open_safetensors(file) for file in _files(self.folder, stem, ".safetensors")]
        self.is_safetensors = bool(self.shards)
        if not self.shards:
            self.shards = [_open_bin(file) for file in _files(self.folder, bin_stem, ".bin")]
        if not self.shards:
            raise MergeError(f"{self.folder} has no weights: expected {stem}*.safetensors or {bin_stem}*.bin.")
        self.tensors: dict[str, TensorInfo] = {}
        for shard in self.shards:
            for info in shard.tensors:
                if info.name in self.tensors:
                    raise MergeError(
                        f"{self.folder}: tensor {info.name} is in {self.tensors[info.name].file.name} and in {shard.file.name}; expected once."
                    )
                self.tensors[info.name] = info
        self._descriptors: dict[Path, int] = {}
        self._lock = threading.Lock()

    def __contains__(self, name: str) -> bool:
        return name in self.tensors

    def __getitem__(self, name: str) -> TensorInfo:
        return self.tensors[name]

    def read_rows(self, name: str, start: int = 0, stop: int | None = None) -> torch.Tensor:
        """Rows start..stop of a tensor, shape (stop - start, ...), in the dtype that the file has. A scalar has one row
        and shape ()."""
        info = self.tensors[name]
        return self.read(info, start, info.rows if stop is None else stop)

    def read(self, info: TensorInfo, start: int, stop: int) -> torch.Tensor:
        """As `read_rows`, for a tensor given by its place in one of the files."""
        count = stop - start
        shape = (count, *info.shape[1:]) if info.shape else ()
        if count <= 0 or not info.row_bytes:
            return torch.empty((max(count, 0), *info.shape[1:]), dtype=info.dtype)
        buffer = bytearray(count * info.row_bytes)
        self.read_into(info, start * info.row_bytes, memoryview(buffer))
        return torch.frombuffer(buffer, dtype=info.dtype).reshape(shape)

    def read_into(self, info: TensorInfo, offset: int, buffer: memoryview) -> None:
        """Fill `buffer` with a tensor's raw bytes from byte `offset` of the tensor on."""
        with self._lock:
            if info.file not in self._descriptors:
                self._descriptors[info.file] = os.open(info.file, os.O_RDONLY)
        pread_exactly(self._descriptors[info.file], buffer, info.offset + offset, info.file)

    def close(self) -> None:
        """Close the files. A closed checkpoint opens them again at the next read."""
        with self._lock:
            while self._descriptors:
                os.close(self._descriptors.popitem()[1])


def pread_exactly(descriptor: int, buffer: memoryview, offset: int, file: Path) -> None:
    """Fill `buffer` from a file at `offset`; MergeError if the file ends before."""
    done = 0
    while done < len(buffer):
        count = os.preadv(descriptor, [buffer[done:]], offset + done)
        if count == 0:
            raise MergeError(
                f"{file} ends at byte {offset + done}, {len(buffer) - done} bytes too early: the file is truncated; download or copy it again."
            )
        done += count


def read_json(file: Path) -> dict:
    """A JSON object from a file, or MergeError."""
    try:
        value = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise MergeError(f"{file} is missing.") from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise MergeError(f"{file} is not valid JSON ({error}); write it again.") from None
    if not isinstance(value, dict):
        raise MergeError(f"{file} holds a JSON {type(value).__name__}; expected an object.")
    return value


def _files(folder: Path, stem: str, suffix: str) -> list[Path]:
    """The shards that the index names, or else the single file, or none."""
    index = folder / f"{stem}{suffix}.index.json"
    if index.exists():
        weight_map = read_json(index).get("weight_map", {})
        files = [folder / name for name in sorted(set(weight_map.values()))]
        missing = [file.name for file in files if not file.exists()]
        if missing:
            raise MergeError(
                f"{index} names {len(missing)} file(s) that are absent, first {missing[0]}; download them again."
            )
        return files
    single = folder / f"{stem}{suffix}"
    return [single] if single.exists() else []


def _open_safetensors(file: Path) -> Shard:
    size = file.stat().st_size
    with file.open("rb") as stream:
        prefix = stream.read(8)
        length = int.from_bytes(prefix, "little")
        if len(prefix) < 8 or 8 + length > size:
            raise MergeError(
                f"{file} ({size} bytes) ends inside its header: the file is truncated or is not safetensors; download or copy it again."
            )
        head = prefix + stream.read(length)
    try:
        header = json.loads(head[8:])
        metadata = header.pop("__metadata__", None)
        entries = sorted(header.items(), key=lambda item: item[1]["data_offsets"])
        tensors = [
            TensorInfo(name, file, 8 + length + entry["data_offsets"][0], tuple(entry["shape"]), DTYPES[entry["dtype"]])
            for name, entry in entries
        ]
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise MergeError(
            f"{file}: the safetensors header cannot be read ({type(error).__name__}: {error}); download or copy the file again."
        ) from None
    end = 8 + length
    for info in tensors:
        if info.offset != end:
            raise MergeError(
                f"{file}: tensor {info.name} starts at byte {info.offset}, expected {end}; the header is corrupt."
            )
        end += info.nbytes
    if end != size:
        raise MergeError(
            f"{file} has {size} bytes, its header promises {end}: the file is truncated or damaged; download or copy it again."
        )
    return Shard(file, tensors, head, metadata)


def _open_bin(file: Path) -> Shard:
    """The tensors of a torch zip file and where their bytes lie, without reading them (FakeTensorMode records each
    storage's offset)."""
    try:
        with FakeTensorMode():
            state = torch.load(file, weights_only=True, map_location="cpu")
    except (pickle.UnpicklingError, RuntimeError, EOFError, ValueError) as error:
        raise MergeError(
            f"{file} cannot be opened with weights_only=True ({error}); convert it to safetensors."
        ) from None
    tensors = []
    for name, tensor in state.items():
        offset = tensor.untyped_storage()._checkpoint_offset
        if offset is None or not tensor.is_contiguous():
            raise MergeError(
                f"{file}: tensor {name} is not stored as plain contiguous bytes; convert the checkpoint to safetensors."
            )
        tensors.append(
            TensorInfo(
                name, file, offset + tensor.storage_offset() * tensor.dtype.itemsize, tuple(tensor.shape), tensor.dtype
            )
        )
    return Shard(file, sorted(tensors, key=lambda info: info.offset))
