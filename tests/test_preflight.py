"""The preflight: its account against what torch really allocates, its verdict, and the change it proposes."""

import json
from pathlib import Path

import pytest
import torch
from bitsandbytes.functional import quantize_4bit
from peft import get_peft_model
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed._tools.mem_tracker import MemTracker
from transformers import LlamaConfig, LlamaForCausalLM

from finetune import memory, models, packing, preflight, sft
from finetune.config import (
    Config,
    DataConfig,
    EvaluateConfig,
    GrpoConfig,
    HardwareConfig,
    LoraConfig,
    ModelConfig,
    SftConfig,
)
from finetune.errors import UserError
from finetune.hardware import Choices, Machine
from finetune.pipeline import with_preflight
from finetune.run import Run

DEEPSEEK_MATH = {
    "vocab_size": 102400, "hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 30, "num_attention_heads": 32,
    "num_key_value_heads": 32, "tie_word_embeddings": False,
}


def write_model(folder: Path, **overrides: object) -> Path:
    torch.manual_seed(0)
    settings: dict = {
        "vocab_size": 2000, "hidden_size": 256, "intermediate_size": 704, "num_hidden_layers": 4, "num_attention_heads": 8,
        "num_key_value_heads": 4, "tie_word_embeddings": False,
    }
    LlamaForCausalLM(LlamaConfig(**settings | overrides)).save_pretrained(folder)
    return folder


def allocated(base: Path, step: memory.Step) -> int:
    """Peak bytes of torch's CPU allocator over two real steps of the sft stage's own loss, the base included (torch.profiler)."""
    model = models.load_base(base, ModelConfig(), Choices("cpu", step.dtype, "sdpa", step.quantization, ()))
    policy = get_peft_model(model, models.peft_config(LoraConfig()))
    packing.prepare(model, "batch" if step.packed else "none")
    if step.checkpointing:
        policy.gradient_checkpointing_enable({"use_reentrant": False})
        policy.enable_input_require_grads()
    policy.train()
    optimizer = torch.optim.AdamW([parameter for parameter in policy.parameters() if parameter.requires_grad])
    rows = [{"input_ids": [5] * n, "labels": [5] * n, "ids": ["a"], "lengths": [n], "length": n} for n in step.lengths]
    batch = packing.flatten(rows) if step.packed else packing.pad(rows, 0)

    def one() -> None:
        total, _ = sft.nll(policy, batch)
        total.backward()

    one()
    optimizer.step()  # the moments are there, and the gradients stay, as while micro-batches accumulate
    before = sum(parameter.nbytes for parameter in policy.parameters()) + sum(
        tensor.nbytes for parameter in policy.parameters() if parameter.requires_grad
        for tensor in (parameter.grad, *optimizer.state[parameter].values())
    )
    for module in policy.modules():
        if isinstance(module, torch.nn.Linear) and step.quantization == "nf4" and "quant_state" in module.__dict__ and module.quant_state:
            before += sum(value.nbytes for value in module.quant_state.as_dict(packed=True).values())
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        one()
    now = peak = 0
    for event in profile.profiler.kineto_results.events():
        if event.name() == "[memory]":
            now += event.nbytes()
            peak = max(peak, now)
    return before + peak


STEPS = [
    memory.Step((200, 120, 90), "bfloat16", "nf4"),
    memory.Step((200, 120, 90), "bfloat16", "nf4", checkpointing=True),
    memory.Step((200, 120, 90), "bfloat16", "none", packed=False),
    memory.Step((200, 120, 90), "float32", "none"),
]


@pytest.mark.parametrize("step", STEPS, ids=["nf4", "nf4-checkpointing", "padded-bf16", "fp32"])
def test_the_account_is_what_torch_allocates(tmp_path: Path, step: memory.Step) -> None:
    base = write_model(tmp_path / "base")
    estimate, real = memory.training_step(base, LoraConfig(), step), allocated(base, step)
    assert estimate.total == pytest.approx(real, rel=0.15), estimate


@pytest.mark.slow
def test_the_account_of_smollm2_is_what_torch_allocates(smollm2: Path) -> None:
    step = memory.Step((256, 200, 200, 150), "bfloat16", "nf4")
    assert memory.training_step(smollm2, LoraConfig(), step).total == pytest.approx(allocated(smollm2, step), rel=0.15)


def test_counts_as_torchs_own_tracker_does() -> None:
    # MemTracker fails on frozen parameters, so the comparison is on a model that trains them all.
    with FakeTensorMode():
        config = LlamaConfig(vocab_size=1000, hidden_size=128, intermediate_size=352, num_hidden_layers=3, num_attention_heads=4)
        model = LlamaForCausalLM(config)
        ids = torch.zeros((2, 64), dtype=torch.long)
        tracker = MemTracker()
        tracker.track_external(model)
        ours = memory.Peak()
        for tensor in [*model.parameters(), *model.buffers()]:
            ours.add(tensor)
        with tracker, ours:
            model(input_ids=ids, use_cache=False)[0].float().sum().backward()
        (theirs,) = [snapshot["Total"] for snapshot in tracker.get_tracker_snapshot("peak").values()]
    assert ours.peak == pytest.approx(theirs, rel=0.02)


def test_two_depths_give_every_depth(tmp_path: Path) -> None:
    base = write_model(tmp_path / "base", num_hidden_layers=7)
    step = memory.Step((128, 64), "bfloat16", "nf4")
    whole = sum(memory._run(base, 16, "all-linear", step, 7)[:1])
    account = memory.training_step(base, LoraConfig(), step)
    assert account.weights == whole
    assert account.activations == pytest.approx(memory._run(base, 16, "all-linear", step, 7)[2], rel=0.01)


@pytest.mark.parametrize("shape", [(64, 64), (176, 64), (11008, 256)])
def test_nf4_bytes_are_those_of_bitsandbytes(shape: tuple[int, int]) -> None:
    packed, state = quantize_4bit(torch.randn(shape), blocksize=64, quant_type="nf4", compress_statistics=True)
    parts = [packed, state.absmax, state.code, state.offset, state.state2.absmax, state.state2.code]
    assert memory.nf4_bytes(shape[0] * shape[1]) == sum(part.nbytes for part in parts)


@pytest.fixture
def deepseek_math(tmp_path: Path) -> Path:
    LlamaConfig(**DEEPSEEK_MATH).save_pretrained(tmp_path / "config")
    return tmp_path / "config"


def test_deepseek_math_fits_a_t4_by_short_context_and_checkpointing(deepseek_math: Path) -> None:
    def total(length: int, checkpointing: bool) -> int:
        step = memory.Step((length,), "float16", "nf4", checkpointing=checkpointing)
        return memory.training_step(deepseek_math, LoraConfig(), step).total

    room = 15e9 - preflight.GPU_OVERHEAD
    assert memory.weight_bytes(deepseek_math, "float16", "nf4") == pytest.approx(4.81e9, rel=0.01)
    assert total(1024, checkpointing=True) < room
    assert total(4096, checkpointing=False) > room


# -- the verdict -----------------------------------------------------------------------------------------------------


def config_for(base: Path, rows: Path, **sections: object) -> Config:
    settings: dict = {
        "model": ModelConfig(path=str(base), dtype="float32"),
        "data": DataConfig(path=str(rows), held_out=10),
        "sft": SftConfig(max_steps=10, batch_size=8, micro_batch_size=8, max_length=256),
        "evaluate": EvaluateConfig(max_new_tokens=16, batch_size=4),
        "stages": ["sft", "merge"],
    }
    return Config(**settings | sections)


@pytest.fixture
def rows(tmp_path: Path) -> Path:
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(
        json.dumps({"question": f"What is {i} + {i}?", "answer": f"{i} + {i} = {2 * i}\n#### {2 * i}"}) + "\n" for i in range(60)
    ))
    return path


def machine(ram: int) -> Machine:
    return Machine(device="cpu", name="a small computer", ram=ram)


def test_a_run_that_fits_is_accounted_for(tiny_model: Path, rows: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(preflight.hardware, "detect", lambda: machine(16 * 10**9))
    run = Run.create(tmp_path / "run", "")
    result = preflight.check(config_for(tiny_model, rows), run)
    assert result.outputs == ["preflight.json"]
    report = json.loads((run.dir / "preflight.json").read_text())
    assert [need["stage"] for need in report["needs_bytes"]] == ["sft", "merge"]
    costs = report["data"]
    assert costs["rows"] == 50 and costs["steps_per_epoch"] == 50 / 8 and costs["epochs"] == pytest.approx(80 / 50)
    assert 0 < costs["supervised_share"] < 1 and costs["padding_share"] == 0 and costs["left_out_share"] == 0


def test_a_run_that_cannot_fit_ends_before_any_weight_loads(
    tiny_model: Path, rows: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = config_for(tiny_model, rows, stages=["sft"])
    choices = Choices("cpu", "float32", "sdpa", "nf4", ())
    lengths = (60,) * 50
    full = sum(preflight.sft_need(config, tiny_model, choices, preflight.Shape(lengths, 40)).device.values())
    monkeypatch.setattr(preflight, "LIBRARIES", {"cpu": 0, "cuda": 0})
    monkeypatch.setattr(preflight.nf4_cache, "SHARD_BYTES", 0)
    monkeypatch.setattr(preflight.hardware, "detect", lambda: machine(full * 6 // 10))
    monkeypatch.setattr(models, "load_base", lambda *args: pytest.fail("weights were loaded"))
    with pytest.raises(UserError, match=r"sft takes .*It fits with sft\.") as caught:
        preflight.check(config, Run.create(tmp_path / "run", ""))
    assert "micro_batch_size=" in str(caught.value)
    assert (tmp_path / "run" / "preflight.json").exists()


def test_the_proposed_change_is_the_cheapest_that_fits(tiny_model: Path, rows: Path) -> None:
    config = config_for(tiny_model, rows)
    choices = Choices("cpu", "float32", "sdpa", "nf4", ())
    shape = preflight.Shape((60,) * 50, 40)

    def need(**changed: object) -> int:
        return sum(preflight.sft_need(config_for(tiny_model, rows, sft=SftConfig(**{
            "max_steps": 10, "batch_size": 8, "micro_batch_size": 8, "max_length": 256} | changed)), tiny_model, choices, shape).device.values())

    sizes = {size: need(micro_batch_size=size) for size in (8, 4, 2, 1)}
    assert sizes[8] > sizes[4] > sizes[2] > sizes[1] > need(micro_batch_size=1, gradient_checkpointing=True)
    for limit, expected in (
        (sizes[4], "sft.micro_batch_size=4"),
        (sizes[4] - 1, "sft.micro_batch_size=2"),
        (sizes[1] - 1, "sft.gradient_checkpointing=true"),
    ):
        change = preflight.cheapest_change("sft", limit, config, tiny_model, choices, shape)
        assert change is not None and expected in change
    assert preflight.cheapest_change("sft", 1000, config, tiny_model, choices, shape) is None


def test_sampling_that_does_not_fit_is_made_smaller(tiny_model: Path, rows: Path) -> None:
    config = config_for(tiny_model, rows, grpo=GrpoConfig(batch_size=64, group_size=8, micro_batch_size=1, gradient_checkpointing=True))
    choices, shape = Choices("cpu", "float32", "sdpa", "nf4", ()), preflight.Shape((), 40)
    full = preflight.grpo_need(config, tiny_model, choices, shape).device
    assert full["KV cache or activations and logits"] == preflight.kv_cache(tiny_model, "float32", 64 * (40 + 512))
    change = preflight.cheapest_change("grpo", sum(full.values()) * 6 // 10, config, tiny_model, choices, shape)
    assert change is not None and "grpo.batch_size=32" in change


def test_a_full_disk_is_foreseen(tiny_model: Path, rows: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(preflight.hardware, "detect", lambda: machine(16 * 10**9))
    config = config_for(tiny_model, rows, hardware=HardwareConfig(disk_gb=1e-6))
    with pytest.raises(UserError, match="free on the disk"):
        preflight.check(config, Run.create(tmp_path / "run", ""))


def test_training_on_a_gpu_that_is_only_described_is_refused(
    tiny_model: Path, rows: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(preflight.hardware, "detect", lambda: machine(16 * 10**9))
    described = HardwareConfig(target="T4", sm=75, gpu_memory_gb=15.0, ram_gb=12.7)
    config = config_for(tiny_model, rows, hardware=described, model=ModelConfig(path=str(tiny_model)))
    with pytest.raises(UserError, match="does not have"):
        preflight.check(config, Run.create(tmp_path / "run", ""))
    config.stages = ["preflight"]
    run = Run.create(tmp_path / "asked", "")
    preflight.check(config, run)
    report = json.loads((run.dir / "preflight.json").read_text())
    assert report["machine"] == "T4" and report["capacity_bytes"]["device"] == 15 * 10**9 - preflight.GPU_OVERHEAD
    assert "probe" not in report


def test_runs_before_the_first_stage_that_trains() -> None:
    assert with_preflight(["inspect", "sft", "grpo"]) == ["inspect", "preflight", "sft", "grpo"]
    assert with_preflight(["merge", "evaluate"]) == ["merge", "evaluate"]
    assert with_preflight(["preflight"]) == ["preflight"]


def test_alone_it_accounts_for_the_recipes_stages() -> None:
    assert preflight.accounted_stages(Config(recipe="quickstart", stages=["preflight"])) == ["sft", "grpo", "merge", "export", "evaluate"]
    assert preflight.accounted_stages(Config(recipe="quickstart", stages=["preflight", "merge"])) == ["merge"]
