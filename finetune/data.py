"""Files -> data_formats -> split by problem -> tokens with a loss mask, each hand-over checked and counted."""

import hashlib
import json
import logging
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.text import Text

import data_formats
from data_formats import Example
from finetune.config import Config, DataConfig
from finetune.errors import UserError
from finetune.rewards import TUTORING
from finetune.run import Run, write_atomic

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedTokenizerBase

log = logging.getLogger("finetune")


@dataclass
class Splits:
    """Examples to train on and problems to evaluate on; no problem is on both sides."""

    train: list[Example]
    held_out: list[Example]


def load(config: Config, run: Run) -> Splits:
    """Read and split the data; the counts and a digest go to `data.json` in the run directory.

    Raises UserError where a side is empty, and DataFormatError where a file is not what it should be.
    """
    settings = config.data
    examples = unique(list(read(settings, settings.path)))
    if settings.eval_path is not None:
        train, held_out = examples, unique(list(read(settings, settings.eval_path)))
        evaluated = {example.key for example in held_out}
        train = [example for example in train if example.key not in evaluated]
    else:
        train, held_out = split(examples, settings.held_out, config.seed)
    held_out = [example for example in held_out if example.answer is not None]
    dropped = len(examples) - len(train) - (len(held_out) if settings.eval_path is None else 0)
    for side, found in (("train on", train), ("evaluate on", held_out)):
        if not found:
            raise UserError(
                f"data.path={settings.path}: {len(examples)} examples, none of them left to {side}. "
                f"Give more data, or another data.held_out (now {settings.held_out}) or data.eval_path."
            )
    assert not {example.key for example in train} & {example.key for example in held_out}, "a problem is on both sides"
    record = {
        "path": settings.path,
        "examples": len(examples),
        "train": len(train),
        "held_out": len(held_out),
        "left_out": dropped,
        "train_sha256": digest(train),
        "held_out_sha256": digest(held_out),
    }
    write_atomic(run.path("data.json"), json.dumps(record, indent=1))
    log.info("data: %d examples, %d to train on, %d held out, no problem on both sides", len(examples), len(train), len(held_out))
    return Splits(train, held_out)


def read(settings: DataConfig, path: str) -> Any:
    """Examples of one source, with the options of the data configuration."""
    options: dict[str, Any] = dict(settings.options)
    for name in ("columns", "split", "limit"):
        value = getattr(settings, name)
        if value:
            options[name] = value
    return data_formats.read(path, format=settings.format, **options)


def unique(examples: list[Example]) -> list[Example]:
    """The examples without exact repetitions (same messages, same answer), in their order."""
    seen: set[str] = set()
    kept = []
    for example in examples:
        content = json.dumps([example.messages, example.answer], sort_keys=True)
        if content not in seen:
            seen.add(content)
            kept.append(example)
    return kept


def split(examples: list[Example], held_out: int, seed: int) -> tuple[list[Example], list[Example]]:
    """Hold out at least `held_out` examples, whole problems at a time, chosen by a hash of seed and problem.

    The choice of a problem does not depend on the other rows' order or presence.
    """
    ranked = sorted({example.key for example in examples}, key=lambda key: hashlib.sha256(f"{seed}:{key}".encode()).digest())
    sizes: dict[str, int] = {}
    for example in examples:
        sizes[example.key] = sizes.get(example.key, 0) + 1
    chosen: set[str] = set()
    count = 0
    for key in ranked:
        if count >= held_out:
            break
        chosen.add(key)
        count += sizes[key]
    return [e for e in examples if e.key not in chosen], [e for e in examples if e.key in chosen]


def digest(examples: list[Example]) -> str:
    """SHA-256 over messages and answers."""
    total = hashlib.sha256()
    for example in examples:
        total.update(json.dumps([example.messages, example.answer], sort_keys=True).encode())
    return total.hexdigest()


def inputs(config: Config, run: Run) -> dict[str, Path]:
    """What the manifest records of the data: the files where there are some, and the digest of the examples."""
    found = {"data": run.dir / "data.json"}
    for name, path in (("data_path", config.data.path), ("eval_path", config.data.eval_path)):
        if path is not None and Path(path).exists():
            found[name] = Path(path)
    return found


def prompt_messages(example: Example, prompt: str) -> list[dict[str, Any]]:
    """The messages before the answer, as the model will see them; `prompt` wraps the problem of a single-turn example."""
    messages = [{"role": message["role"], "content": message["content"]} for message in example.prompt]
    users = [message for message in messages if message["role"] == "user"]
    if len(users) == 1 and not any(message["role"] == "assistant" for message in messages):
        users[0]["content"] = prompt.replace("{question}", users[0]["content"])
    return messages


# -- tokens ----------------------------------------------------------------------------------------------------------


def encode(tokenizer: "PreTrainedTokenizerBase", messages: list[dict[str, Any]], train: list[bool]) -> dict[str, list[int]]:
    """input_ids and labels of a chat: labels are the ids on each trained assistant turn and its EOS, -100 elsewhere.

    A turn's span is what the template adds to the chat before it (ended by the generation prompt), cut after its EOS: what
    the model sees as a prompt when it is served is thus exactly what stands before the loss. `train` has a flag for each
    assistant turn. Raises UserError where the template rewrites earlier turns or does not end a turn with EOS.
    """
    def render(upto: int, generation_prompt: bool = False) -> str:
        return tokenizer.apply_chat_template(messages[:upto], tokenize=False, add_generation_prompt=generation_prompt)

    text = render(len(messages))
    spans = []
    assistant_turns = [position for position, message in enumerate(messages) if message["role"] == "assistant"]
    for position, trained in zip(assistant_turns, train, strict=True):
        before, after = render(position, generation_prompt=True), render(position + 1)
        if not (text.startswith(after.rstrip()) and after.startswith(before)):
            raise UserError(
                f"The chat template rewrites earlier turns: turn {position} is rendered as {after[-80:]!r}, the whole chat "
                "has something else there. Set model.chat_template to a template that only appends."
            )
        end = after.rfind(tokenizer.eos_token)
        if end < len(before):
            raise UserError(
                f"The chat template does not end an assistant turn with EOS ({tokenizer.eos_token}): {after[-80:]!r}. "
                "The model would never learn to stop. Set model.chat_template to one that does."
            )
        if trained:
            spans.append((len(before), end + len(tokenizer.eos_token)))
    encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    labels = [-100] * len(encoded["input_ids"])
    for index, (start, end) in enumerate(encoded["offset_mapping"]):
        if any(first <= start and end <= last for first, last in spans) and end > start:
            labels[index] = encoded["input_ids"][index]
    return {"input_ids": encoded["input_ids"], "labels": labels}


def sft_dataset(examples: list[Example], tokenizer: "PreTrainedTokenizerBase", config: Config) -> "Dataset":
    """Rows of input_ids, labels, ids and lengths (an entry an example) and length, verified: every trained turn supervises its EOS.

    Examples longer than `sft.max_length` go by `sft.over_length`; one without an answer to learn from is counted and left
    out. Where `sft.packing` is rows, examples are put together. Raises UserError where nothing is left or an EOS is not supervised.
    """
    from datasets import Dataset

    from finetune import over_length, packing

    settings = config.sft
    rows: list[dict[str, Any]] = []
    left_out: list[str] = []
    shortened = without_answer = 0

    def encode_turns(messages: list[dict[str, Any]], train: list[bool]) -> dict[str, list[int]]:
        row = encode(tokenizer, messages, train)
        eos = sum(label == tokenizer.eos_token_id for label in row["labels"])
        if sum(train) == 0 or eos < sum(train):
            raise UserError(
                f"{example.id}: {eos} supervised EOS for {sum(train)} trained turns. Every sample must supervise its EOS, "
                "or the model never stops; check the chat template and the row."
            )
        return row

    for example in examples:
        if example.completion is None:
            without_answer += 1
            continue
        messages = prompt_messages(example, config.data.prompt) + [{"role": "assistant", "content": example.completion.strip()}]
        train = [message.get("train", True) for message in example.messages if message["role"] == "assistant"]
        encoded, lost_turns = [encode_turns(messages, train)], 0
        length = len(encoded[0]["input_ids"])
        if length > settings.max_length:
            encoded = []
            if settings.over_length == "truncate_prompt":
                encoded = over_length.truncate_prompt(messages, train, settings.max_length, encode_turns, tokenizer)
            elif settings.over_length == "split_turns":
                encoded, lost_turns = over_length.split_turns(messages, train, settings.max_length, encode_turns)
            shortened += bool(encoded)
            if not encoded or lost_turns:
                left_out.append(f"{example.id} ({length} tokens{f', {lost_turns} turns' if encoded else ''})")
        for part, row in enumerate(encoded):
            name = example.id if len(encoded) == 1 else f"{example.id}, part {part + 1}"
            rows.append(row | {"ids": [name], "lengths": [len(row["input_ids"])], "length": len(row["input_ids"])})
    if left_out and settings.over_length == "error":
        raise UserError(
            f"{len(left_out)} examples are longer than sft.max_length={settings.max_length}, the first: {left_out[0]}. "
            "Raise sft.max_length, or set sft.over_length=drop, truncate_prompt or split_turns."
        )
    if not rows:
        raise UserError(
            f"data.path={config.data.path}: no example is left to train on ({without_answer} without an answer, "
            f"{len(left_out)} longer than sft.max_length={settings.max_length})."
        )
    lengths = [row["length"] for row in rows]
    supervised = sum(label != -100 for row in rows for label in row["labels"])
    log.info(
        "sft data: %d samples, %d to %d tokens, %.0f%% of tokens supervised, EOS supervised in 100%%; longer than %d tokens: %d made to "
        "fit (%s), %d left out in whole or in part; left out: %d without an answer",
        len(rows), min(lengths), max(lengths), 100 * supervised / sum(lengths), settings.max_length, shortened, settings.over_length,
        len(left_out), without_answer,
    )
    if left_out:
        log.debug("longer than sft.max_length: %s", ", ".join(left_out))
    show_mask(rows[0], tokenizer)
    if settings.packing == "rows":
        rows = packing.concatenate(rows, settings.max_length, config.seed)
        log.info("sft data: put together to %d rows, %.0f%% full", len(rows), 100 * sum(lengths) / (len(rows) * settings.max_length))
    return Dataset.from_list(rows)


def show_mask(row: dict[str, list[int]], tokenizer: "PreTrainedTokenizerBase") -> None:
    """Print a sample as the model sees it: green is learned, grey is given. The log file marks the learned part with ⟦ ⟧."""
    coloured, marked, inside = Text(), "", False
    for token, label in zip(row["input_ids"], row["labels"], strict=True):
        piece = tokenizer.decode([token])
        learned = label != -100
        coloured.append(piece, style="bold green" if learned else "bright_black")
        marked += ("⟦" if learned and not inside else "⟧" if inside and not learned else "") + piece
        inside = learned
    console = Console(stderr=True)
    console.print(Text("one sample as the model sees it, the loss is on the green part:", style="bold"))
    console.print(coloured)
    log.debug("one sample, the loss is on the part in ⟦⟧:\n%s", marked + ("⟧" if inside else ""))


def grpo_dataset(examples: list[Example], config: Config) -> "Dataset":
    """Rows of prompt (messages), answer, answer_type, solution, id and meta (JSON): what TRL and the rewards read.

    Under tutoring rewards each learnt turn of a dialogue is a prompt of its own. Examples without a gold answer, which only those
    rewards can do without, are counted and left out; raises UserError where none is left.
    """
    from datasets import Dataset

    tutoring = not set(config.grpo.rewards).isdisjoint(TUTORING) and "correct" not in config.grpo.rewards
    golden = [example for example in examples if example.answer is not None or tutoring]
    prompts = [turn for example in golden for turn in learnt_turns(example)] if tutoring else golden
    rows = [
        {
            "prompt": prompt_messages(example, config.data.prompt),
            "answer": example.answer,
            "answer_type": example.answer_type or "",
            "solution": example.solution or "",
            "id": example.id,
            "meta": json.dumps(example.meta),
        }
        for example in prompts
    ]
    if not rows:
        raise UserError(f"data.path={config.data.path}: no example has a gold answer, so GRPO has nothing to reward.")
    log.info("grpo data: %d prompts, left out %d without a gold answer", len(rows), len(examples) - len(golden))
    return Dataset.from_list(rows)


def learnt_turns(example: Example) -> list[Example]:
    """The dialogue up to and with each assistant turn that is learnt, or the example as it is where there is none."""
    ends = [
        place + 1 for place, message in enumerate(example.messages) if message["role"] == "assistant" and message.get("train", True)
    ]
    return [replace(example, messages=example.messages[:end], id=f"{example.id}:{place}") for place, end in enumerate(ends)] or [example]
