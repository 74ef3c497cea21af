"""What `fold` writes beside the weights, what it certifies, and what it refuses: one clear message each, nothing under
the final name."""

import hashlib
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import merge
from merge.certificate import Certificate
from tests.merge.merge_models import bits, llama, reference, save_adapter, save_base, written


@pytest.fixture
def base(tmp_path: Path) -> Path:
    folder = save_base(llama(), tmp_path / "base")
    (folder / "tokenizer.json").write_text('{"model": {"vocab": {}}}')
    (folder / "tokenizer_config.json").write_text('{"chat_template": "base"}')
    return folder


@pytest.fixture
def adapter(base: Path, tmp_path: Path) -> Path:
    return save_adapter(base, tmp_path / "adapter")


def refuse(words: str, base: Path, adapter, out: Path, **options) -> None:
    """The fold is refused with a message that holds `words`, and leaves neither `out` nor a temporary folder."""
    before = {path.name for path in out.parent.iterdir()}
    with pytest.raises(merge.MergeError, match=words):
        merge.fold(base, adapter, out, **options)
    assert {path.name for path in out.parent.iterdir()} == before


def edit_adapter(folder: Path, change) -> None:
    tensors = load_file(folder / "adapter_model.safetensors")
    change(tensors)
    save_file(tensors, folder / "adapter_model.safetensors")


def edit_config(folder: Path, **values) -> None:
    file = folder / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | values))


def test_files_and_certificate(base: Path, adapter: Path, tmp_path: Path) -> None:
    (base / "LICENSE").write_text("terms")
    out = tmp_path / "out"
    seen: list[tuple[int, int]] = []
    certificate = merge.fold(base, adapter, out, progress=lambda done, total: seen.append((done, total)))
    names = {
        "model.safetensors",
        "config.json",
        "generation_config.json",
        "tokenizer.json",
        "tokenizer_config.json",
        "LICENSE",
        "certificate.json",
    }
    assert {file.name for file in out.iterdir()} == names
    assert (out / "config.json").read_bytes() == (base / "config.json").read_bytes()
    assert Certificate.load(out) == certificate
    for folder, hashes in ((base, certificate.base), (adapter, certificate.adapters[0]), (out, certificate.output)):
        for name, digest in hashes.items():
            assert hashlib.sha256((folder / name).read_bytes()).hexdigest() == digest, name
    assert set(certificate.output) == names - {"certificate.json"}
    assert certificate.changed == certificate.expected == 4 and certificate.total == 21
    assert {report.name for report in certificate.tensors} == {
        f"model.layers.{n}.{m}.weight" for n in (0, 1) for m in ("self_attn.q_proj", "mlp.down_proj")
    }
    size = (out / "model.safetensors").stat().st_size
    assert seen == sorted(seen) and seen[-1] == (size, size)
    assert "4 changed, 4 expected, 0 unexpected" in certificate.table()


def test_cosine_is_the_rounding_loss(base: Path, tmp_path: Path) -> None:
    """The certificate's cosine is that of (output - base) with (fp32 fold - base); all rows of a tensor this small are
    measured."""
    adapter = save_adapter(base, tmp_path / "adapter", target_modules=["q_proj"])
    certificate = merge.fold(base, adapter, tmp_path / "out")
    before, after, exact = written(base), written(tmp_path / "out"), reference(base, [adapter])
    for report in certificate.tensors:
        realised, intended = (
            tensors[report.name].double() - before[report.name].double() for tensors in (after, exact)
        )
        cosine = torch.nn.functional.cosine_similarity(realised.flatten(), intended.flatten(), dim=0).item()
        assert report.cosine == pytest.approx(cosine, abs=1e-5)
        assert report.intended_rms == pytest.approx(intended.square().mean().sqrt().item(), rel=1e-4)


def test_zero_adapter_gives_the_bases_bytes(base: Path, adapter: Path, tmp_path: Path) -> None:
    state = load_file(base / "model.safetensors")
    state["model.layers.0.self_attn.q_proj.weight"][0, 0] = -0.0  # adding a zero would make it +0
    save_file(state, base / "model.safetensors", metadata={"format": "pt"})
    edit_adapter(adapter, lambda tensors: [tensor.zero_() for name, tensor in tensors.items() if "lora_B" in name])
    with pytest.warns(UserWarning, match="changes nothing"):
        certificate = merge.fold(base, adapter, tmp_path / "out")
    assert (tmp_path / "out" / "model.safetensors").read_bytes() == (base / "model.safetensors").read_bytes()
    assert certificate.changed == 0 and len(certificate.zero_delta) == certificate.expected == 4
    assert "exactly zero" in certificate.table()


def test_a_second_fold_is_refused(base: Path, adapter: Path, tmp_path: Path) -> None:
    merge.fold(base, adapter, tmp_path / "out")
    refuse("already", tmp_path / "out", adapter, tmp_path / "twice")
    other = save_adapter(base, tmp_path / "other", seed=9)
    merge.fold(tmp_path / "out", other, tmp_path / "stacked")
    refuse("already", tmp_path / "stacked", adapter, tmp_path / "again")


def test_a_change_that_rounding_swallows_is_refused(base: Path, adapter: Path, tmp_path: Path) -> None:
    edit_adapter(adapter, lambda tensors: [tensor.mul_(1e-9) for name, tensor in tensors.items() if "lora_B" in name])
    refuse("vanishes when rounded to torch.bfloat16", base, adapter, tmp_path / "out")


def test_existing_output_is_refused(base: Path, adapter: Path, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    refuse("exists already", base, adapter, tmp_path / "out")


def test_truncated_shard(base: Path, adapter: Path, tmp_path: Path) -> None:
    with open(base / "model.safetensors", "r+b") as file:
        file.truncate(os.path.getsize(base / "model.safetensors") - 10)
    refuse("truncated", base, adapter, tmp_path / "out")


def test_truncated_header(base: Path, adapter: Path, tmp_path: Path) -> None:
    with open(base / "model.safetensors", "r+b") as file:
        file.truncate(100)
    refuse("truncated", base, adapter, tmp_path / "out")


@pytest.mark.parametrize("name", ["model.layers.1.self_attn.q_proj.weight", "model.norm.weight"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_base_that_is_not_finite(name: str, value: float, base: Path, adapter: Path, tmp_path: Path) -> None:
    state = load_file(base / "model.safetensors")
    state[name].view(-1)[7] = value
    save_file(state, base / "model.safetensors", metadata={"format": "pt"})
    refuse(f"{name} would hold NaN or infinity", base, adapter, tmp_path / "out")


def test_adapter_that_is_not_finite(base: Path, adapter: Path, tmp_path: Path) -> None:
    edit_adapter(adapter, lambda tensors: next(iter(tensors.values())).view(-1)[:1].fill_(float("nan")))
    refuse("holds NaN or infinity; training diverged", base, adapter, tmp_path / "out")


def test_float16_overflow(base: Path, adapter: Path, tmp_path: Path) -> None:
    state = load_file(base / "model.safetensors")
    state["model.layers.0.self_attn.q_proj.weight"][0, 0] = 1e6
    save_file(state, base / "model.safetensors", metadata={"format": "pt"})
    refuse("too large for float16", base, adapter, tmp_path / "out", dtype="float16")


def test_adapter_for_another_shape(base: Path, tmp_path: Path) -> None:
    other = save_base(llama(hidden_size=32), tmp_path / "other")
    refuse("trained on another base", base, save_adapter(other, tmp_path / "adapter"), tmp_path / "out")


def test_adapter_for_more_layers(base: Path, tmp_path: Path) -> None:
    other = save_base(llama(num_hidden_layers=3), tmp_path / "other")
    refuse("trained on another base", base, save_adapter(other, tmp_path / "adapter"), tmp_path / "out")


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"peft_type": "IA3"}, "peft_type is 'IA3'"),
        ({"use_qalora": True}, "use_qalora"),
        ({"alora_invocation_tokens": [1]}, "aLoRA"),
        ({"target_parameters": ["x"]}, "target_parameters"),
        ({"layer_replication": [[0, 1]]}, "layer_replication"),
        ({"a_new_trick": 3}, "unknown field 'a_new_trick'"),
        ({"r": 8}, "rank 4, adapter_config.json says 8"),
        ({"use_dora": True}, "lora_magnitude_vector"),
        ({"init_lora_weights": "pissa"}, "changed the base weights when training began"),
        ({"init_lora_weights": "corda"}, "changed the base weights when training began"),
        ({"init_lora_weights": "loftq"}, "LoftQ itself quantised"),
        ({"init_lora_weights": "novel"}, "is not known"),
    ],
)
def test_adapter_config_that_is_not_understood(
    values: dict, words: str, base: Path, adapter: Path, tmp_path: Path
) -> None:
    edit_config(adapter, **values)
    refuse(words, base, adapter, tmp_path / "out")


def test_adapter_tensor_that_is_not_understood(base: Path, adapter: Path, tmp_path: Path) -> None:
    edit_adapter(
        adapter,
        lambda tensors: tensors.update({"base_model.model.model.layers.0.self_attn.q_proj.lora_E": torch.ones(4)}),
    )
    refuse("lora_E is not understood", base, adapter, tmp_path / "out")


def test_half_a_pair(base: Path, adapter: Path, tmp_path: Path) -> None:
    edit_adapter(adapter, lambda tensors: tensors.pop(next(name for name in tensors if "lora_A" in name)))
    refuse("is not understood", base, adapter, tmp_path / "out")


def test_quantised_base_and_bad_options(base: Path, adapter: Path, tmp_path: Path) -> None:
    refuse("onto = 'int8'; expected", base, adapter, tmp_path / "out", onto="int8")
    refuse("dtype = 'half'; expected", base, adapter, tmp_path / "out", dtype="half")
    config = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps(config | {"quantization_config": {"load_in_4bit": True}}))
    refuse("quantised already", base, adapter, tmp_path / "out")


def test_missing_pieces(base: Path, adapter: Path, tmp_path: Path) -> None:
    with pytest.raises(merge.MergeError, match="is not a folder; create it first"):
        merge.fold(base, adapter, tmp_path / "nowhere" / "out")
    refuse("adapter_config.json is missing", base, base, tmp_path / "out")
    (base / "config.json").unlink()
    refuse("config.json is missing", base, adapter, tmp_path / "out")


def test_full_disk_is_seen_before_the_first_byte(
    base: Path, adapter: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=1000))
    refuse("GB free, the merged model needs", base, adapter, tmp_path / "out")


@pytest.mark.skipif(
    not os.access("/dev/shm", os.W_OK) or os.geteuid() != 0, reason="needs root, to mount a small file system"
)
def test_disk_that_fills_midway(base: Path, adapter: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A real file system of 100 kB; the check before the first byte is blinded, as when another process takes the
    space."""
    small = tmp_path / "small"
    small.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=100k", "tmpfs", small], capture_output=True).returncode:
        pytest.skip("mounting is not allowed here")
    try:
        monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(1 << 40, 0, 1 << 40))
        refuse("filled up during the fold", base, adapter, small / "out")
    finally:
        subprocess.run(["umount", small], check=True)


def test_killed_fold_leaves_nothing_under_the_final_name(base: Path, adapter: Path, tmp_path: Path) -> None:
    """SIGKILL in the middle: only a folder that calls itself unfinished is left."""
    code = "import merge, os, signal, sys; merge.fold(*sys.argv[1:], progress=lambda *_: os.kill(os.getpid(), signal.SIGKILL))"
    done = subprocess.run(
        [sys.executable, "-c", code, base, adapter, tmp_path / "out"], cwd=Path(merge.__file__).parents[1]
    )
    assert done.returncode == -9
    assert [path.suffix for path in tmp_path.iterdir() if "out" in path.name] == [".unfinished"]


def test_adapters_tokenizer_wins_as_one_set(base: Path, adapter: Path, tmp_path: Path) -> None:
    (base / "chat_template.jinja").write_text("old")
    (adapter / "tokenizer.json").write_text('{"model": {"vocab": {"new": 0}}}')
    (adapter / "tokenizer_config.json").write_text('{"chat_template": "trained"}')
    certificate = merge.fold(base, adapter, tmp_path / "out")
    assert (tmp_path / "out" / "tokenizer_config.json").read_text() == '{"chat_template": "trained"}'
    assert not (tmp_path / "out" / "chat_template.jinja").exists()
    assert "DIFFERS" in certificate.tokenizer["tokenizer.json"]


def test_template_alone_comes_from_the_adapter(base: Path, adapter: Path, tmp_path: Path) -> None:
    (base / "tokenizer_config.json").write_text("{}")
    (adapter / "chat_template.jinja").write_text("trained")
    merge.fold(base, adapter, tmp_path / "out")
    assert (tmp_path / "out" / "chat_template.jinja").read_text() == "trained"
    assert (tmp_path / "out" / "tokenizer.json").exists()


def test_missing_tokenizer_is_said(base: Path, adapter: Path, tmp_path: Path) -> None:
    (base / "tokenizer.json").unlink()
    (base / "tokenizer_config.json").unlink()
    with pytest.warns(UserWarning, match="has a tokenizer"):
        certificate = merge.fold(base, adapter, tmp_path / "out")
    assert any("has a tokenizer" in note for note in certificate.notes)


def test_invalid_generation_config_is_mended(base: Path, adapter: Path, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    (base / "generation_config.json").write_text(
        json.dumps({"do_sample": False, "temperature": 0.6, "eos_token_id": 2})
    )
    certificate = merge.fold(base, adapter, tmp_path / "out")
    assert json.loads((tmp_path / "out" / "generation_config.json").read_text()) == {
        "do_sample": False,
        "eos_token_id": 2,
    }
    assert any("temperature" in note for note in certificate.notes)
    AutoModelForCausalLM.from_pretrained(tmp_path / "out").save_pretrained(tmp_path / "again")


def test_adapter_in_a_bin_file(base: Path, adapter: Path, tmp_path: Path) -> None:
    merge.fold(base, adapter, tmp_path / "out")
    torch.save(load_file(adapter / "adapter_model.safetensors"), adapter / "adapter_model.bin")
    (adapter / "adapter_model.safetensors").unlink()
    merge.fold(base, adapter, tmp_path / "again")
    assert (tmp_path / "again" / "model.safetensors").read_bytes() == (
        tmp_path / "out" / "model.safetensors"
    ).read_bytes()


def test_pickled_code_is_refused(base: Path, adapter: Path, tmp_path: Path) -> None:
    (adapter / "adapter_model.safetensors").unlink()
    torch.save({"x": Path("code")}, adapter / "adapter_model.bin")
    refuse("weights_only=True", base, adapter, tmp_path / "out")


def test_changed_base_is_not_nf4(base: Path, adapter: Path, tmp_path: Path) -> None:
    edit_config(adapter, init_lora_weights="pissa")
    shutil.copytree(adapter, adapter / "initial")
    refuse("not dequant", base, adapter, tmp_path / "out", onto="nf4")


def test_streamed_rows_are_the_fold(base: Path, adapter: Path, tmp_path: Path) -> None:
    merge.fold(base, adapter, tmp_path / "out")
    after, weights = written(tmp_path / "out"), merge.MergedWeights(base, adapter)
    for name, tensor in weights.tensors.items():
        rows = weights.rows(name, 0, tensor.shape[0])
        assert rows.dtype == torch.float32 and torch.equal(bits(rows.to(tensor.dtype)), bits(after[name]))
        assert torch.equal(weights.rows(name, 3, 40), rows[3:40])
    weights.close()


def test_import_is_light() -> None:
    code = (
        "import sys, merge; assert not {'transformers', 'peft', 'bitsandbytes', 'finetune', 'gguf'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(merge.__file__).parents[1])
