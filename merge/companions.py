"""The files beside the weights: config, index, tokenizer, chat template, generation config."""

import json
import shutil
import warnings
from pathlib import Path
from typing import Any

from merge.certificate import Certificate, sha256
from merge.checkpoint import read_json
from merge.weights import MergedWeights

TOKENIZER = (
    "tokenizer.json", "tokenizer_config.json", "tokenizer.model", "special_tokens_map.json", "added_tokens.json", "vocab.json", "merges.txt",
)  # fmt: skip
TEMPLATES = ("chat_template.jinja", "chat_template.json")
LICENCES = (
    "LICENSE",
    "LICENSE.txt",
    "LICENSE.md",
    "LICENSE-MODEL",
    "LICENSE-CODE",
    "NOTICE",
    "NOTICE.txt",
    "USE_POLICY.md",
)
SAMPLING = ("temperature", "top_p", "top_k", "min_p", "typical_p", "epsilon_cutoff", "eta_cutoff", "top_h")


def write_companions(
    weights: MergedWeights, folder: Path, shard_of: dict[str, str], certificate: Certificate
) -> dict[str, str]:
    """Write them all into `folder`; returns file name -> SHA-256 and fills the certificate's tokenizer entry and
    notes."""
    base = weights.base.folder
    certificate.base["config.json"] = sha256(base / "config.json")
    if weights.config == weights.base_config:
        shutil.copyfile(base / "config.json", folder / "config.json")
    else:
        _write_json(folder / "config.json", weights.config)
    if len(set(shard_of.values())) > 1 or (base / "model.safetensors.index.json").exists():
        _write_index(weights, folder, shard_of)
    _write_tokenizer(weights, folder, certificate)
    _write_generation_config(base, folder, certificate)
    for name in (*LICENCES, *(file.name for file in base.glob("*.py") if "auto_map" in weights.config)):
        if (base / name).is_file():
            shutil.copyfile(base / name, folder / name)
    return {file.name: sha256(file) for file in sorted(folder.iterdir()) if file.suffix != ".safetensors"}


def _write_index(weights: MergedWeights, folder: Path, shard_of: dict[str, str]) -> None:
    index = weights.base.folder / "model.safetensors.index.json"
    if index.exists():
        value = read_json(index)
        if value.get("weight_map") == shard_of and weights.dtype is None:
            shutil.copyfile(index, folder / index.name)
            return
    size = sum(tensor.nbytes for tensor in weights.tensors.values())
    _write_json(
        folder / "model.safetensors.index.json",
        {"metadata": {"total_size": size}, "weight_map": dict(sorted(shard_of.items()))},
    )


def _write_tokenizer(weights: MergedWeights, folder: Path, certificate: Certificate) -> None:
    """The last adapter that has a tokenizer (training saved it) wins over the base, as one set; so does a chat
    template."""
    places = [adapter.folder for adapter in reversed(weights.adapters)] + [weights.base.folder]
    has_tokenizer = ("tokenizer.json", "tokenizer.model", "vocab.json")
    home = next((place for place in places if any((place / name).is_file() for name in has_tokenizer)), None)
    if home is None:
        certificate.notes.append(
            "neither the adapter nor the base has a tokenizer (tokenizer.json or tokenizer.model): add one before serving."
        )
        warnings.warn(certificate.notes[-1], stacklevel=4)
    chosen = {name: home / name for name in (*TOKENIZER, *TEMPLATES) if home and (home / name).is_file()}
    if not any(name in chosen for name in TEMPLATES):
        bare = next((place / name for place in places for name in TEMPLATES if (place / name).is_file()), None)
        in_config = "tokenizer_config.json" in chosen and "chat_template" in read_json(chosen["tokenizer_config.json"])
        if bare is not None and not in_config:
            chosen[bare.name] = bare
        if bare is None and not in_config:
            certificate.notes.append("no chat template in the adapter or the base.")
    for name, file in chosen.items():
        shutil.copyfile(file, folder / name)
        original = weights.base.folder / name
        if file == original:
            certificate.tokenizer[name] = "the base's"
        else:
            same = original.is_file() and sha256(original) == sha256(file)
            certificate.tokenizer[name] = (
                f"the adapter's, {'identical to the base' if same else 'the base has none' if not original.is_file() else 'DIFFERS from the base'}"
            )


def _write_generation_config(base: Path, folder: Path, certificate: Certificate) -> None:
    """Copied; sampling settings without do_sample=true are dropped, since generation ignores them and transformers
    refuses to save such a file."""
    file = base / "generation_config.json"
    if not file.exists():
        return
    value = read_json(file)
    extra = [key for key in SAMPLING if value.get(key) is not None] if value.get("do_sample") is not True else []
    if not extra:
        shutil.copyfile(file, folder / file.name)
        return
    _write_json(folder / file.name, {key: item for key, item in value.items() if key not in extra})
    certificate.notes.append(
        f"generation_config.json: dropped {', '.join(extra)}, which have no meaning without do_sample=true and make the file invalid."
    )


def _write_json(file: Path, value: dict[str, Any]) -> None:
    file.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
