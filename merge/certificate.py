"""What `fold` proves about its output: which bytes went in and came out, which tensors changed, and how much rounding
took from each change."""

import hashlib
import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

FILE = "certificate.json"


@dataclass
class TensorReport:
    """One tensor of the output that the adapters aim at."""

    name: str
    changed: bool
    """False only where the adapter's delta is exactly zero. With onto='nf4' a quantised tensor always counts as
    changed."""
    cosine: float | None
    """Between the realised change (output - what was folded onto) and the intended one (before rounding to the output
    dtype); 1 is no loss. None for no change. Measured on a quarter of the rows, spread evenly."""
    intended_rms: float
    """Root mean square of the intended change."""
    realised_rms: float


@dataclass
class Certificate:
    """The proof that comes with a merged folder; `certificate.json` there holds the same."""

    onto: str
    dtype: str
    """The weights' dtypes in the output, e.g. 'bfloat16' or 'bfloat16, float32'."""
    base: dict[str, str] = field(default_factory=dict)
    """SHA-256 of each weight file and of config.json of the base."""
    adapters: list[dict[str, str]] = field(default_factory=list)
    """The same of each adapter, in the order in which they were folded."""
    output: dict[str, str] = field(default_factory=dict)
    """SHA-256 of each file of the output but the certificate."""
    lineage: list[str] = field(default_factory=list)
    """SHA-256 of the adapter files already folded into the base when it came, oldest first."""
    expected: int = 0
    """Tensors that the adapters (and onto='nf4') aim at."""
    changed: int = 0
    """Tensors whose values differ from the base's."""
    unexpected: list[str] = field(default_factory=list)
    """Tensors that changed although nothing aims at them (only by a change of dtype)."""
    zero_delta: list[str] = field(default_factory=list)
    """Tensors whose delta is exactly zero, so that they equal what was folded onto."""
    total: int = 0
    """Tensors in the output; every one was checked to be finite."""
    tensors: list[TensorReport] = field(default_factory=list)
    tokenizer: dict[str, str] = field(default_factory=dict)
    """Tokenizer and chat template file -> where it came from and whether it equals the base's."""
    divergence: dict[str, Any] | None = None
    """KL and argmax agreement of onto=full and onto=nf4 with the trained policy, where sample prompts were given."""
    notes: list[str] = field(default_factory=list)
    """Whatever a reader should know."""
    seconds: float = 0.0

    def to_json(self) -> str:
        return json.dumps(asdict(self), indent=1, allow_nan=False) + "\n"

    @classmethod
    def from_json(cls, text: str) -> "Certificate":
        values = json.loads(text)
        values["tensors"] = [TensorReport(**report) for report in values["tensors"]]
        return cls(**values)

    def save(self, folder: Path) -> None:
        (folder / FILE).write_text(self.to_json(), encoding="utf-8")

    @classmethod
    def load(cls, folder: str | Path) -> "Certificate":
        return cls.from_json((Path(folder) / FILE).read_text(encoding="utf-8"))

    def table(self) -> str:
        """The certificate for a terminal: what went in, what changed, the worst cosines, what to know."""
        cosines = sorted((report.cosine, report.name) for report in self.tensors if report.cosine is not None)
        lines = [
            f"folded onto     {self.onto}, written in {self.dtype}, {self.seconds:.1f} s",
            f"tensors         {self.changed} changed, {self.expected} expected, {len(self.unexpected)} unexpected, {len(self.zero_delta)} with a zero delta, {self.total} in all, all finite",
        ]
        if cosines:
            lines.append(
                f"rounding        cosine of realised and intended change: lowest {cosines[0][0]:.6f}, median {cosines[len(cosines) // 2][0]:.6f}"
            )
            lines += [f"  {cosine:.6f}      {name}" for cosine, name in cosines[:3]]
        for name, source in self.tokenizer.items():
            lines.append(f"tokenizer       {name}: {source}")
        for label, files in [
            ("base", self.base),
            *((f"adapter {number + 1}", files) for number, files in enumerate(self.adapters)),
            ("output", self.output),
        ]:
            lines += [f"{label:<15} {digest[:16]}  {name}" for name, digest in files.items()]
        if self.divergence:
            lines += [f"divergence      {onto}: {values}" for onto, values in self.divergence.items()]
        return "\n".join([*lines, *(f"note            {note}" for note in self.notes)])


def sha256(file: Path) -> str:
    """Hex SHA-256 of a file."""
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
