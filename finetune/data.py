"""Files -> data_formats -> split by problem -> tokens with a loss mask, each hand-over checked and counted."""

import hashlib
import json
import logging
from collections import Counter
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.text import Text

from data_formats import Example
from data_formats.mixture import problem_key
from finetune import chats, decontaminate, models, sources
from finetune.config import Config
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
    """Read, guard, split and decontaminate the data; what became of every row, and digests, go to `data.json` in the run directory.

    Raises UserError where a side that the stages need is empty, and DataFormatError where a file is not what it should be.
    """
    settings = config.data
    tokens = chats.template_tokens(models.load_tokenizer(models.resolve(config.model.path), config.model))
    found, record = sources.read_all(settings, config.seed)
    escaped = sources.guard(found, tokens, settings.template_tokens)
    examples = unique(found)
    evaluation = sources.evaluation_source(settings)
    if evaluation is None:
        train, held_out = split(examples, settings.held_out, config.seed)
    else:
        train = examples
        problems, evaluation_record = sources.read(evaluation)
        escaped += sources.guard(problems, tokens, settings.template_tokens)
        held_out = unique(problems)
        record.append(evaluation_record)
    detector = decontaminate.Detector(settings, held_out)
    matches = [(example, detector.find(example)) for example in train]
    contaminated = [match for _, match in matches if match is not None]
    train = [example for example, match in matches if match is None]
    without_answer = sum(example.answer is None for example in held_out)
    held_out = [example for example in held_out if example.answer is not None]
    needed = (("train on", train, {"sft", "grpo"}), ("evaluate on", held_out, {"evaluate"}))
    for side, left, stages in needed:
        if not left and stages & set(config.stages):
            raise UserError(
                f"data.path={sources.name(settings)}: {len(examples)} examples, none of them left to {side} ({len(contaminated)} hold an "
                f"evaluation question, {without_answer} held-out ones have no gold answer). "
                f"Give more data, or another data.held_out (now {settings.held_out}) or data.eval_path."
            )
    assert not {problem_key(e) for e in train} & {problem_key(e) for e in held_out}, "a problem is on both sides"
    write_atomic(
        run.path("data.json"),
        json.dumps(
            {
                "path": sources.name(settings),
                "sources": record,
                "examples": len(examples),
                "repeated": len(found) - len(examples),
                "train": len(train),
                "held_out": len(held_out),
                "held_out_without_answer": without_answer,
                "left_out": len(contaminated),
                "contaminated": [match._asdict() for match in contaminated],
                "template_tokens": dict(escaped),
                "train_sha256": digest(train),
                "held_out_sha256": digest(held_out),
            },
            indent=1, ensure_ascii=False,
        ),
    )
    log.info(
        "data: %d examples (%d exact repetitions left out), %d to train on, %d held out (%d more without a gold answer), "
        "no problem on both sides", len(examples), len(found) - len(examples), len(train), len(held_out), without_answer,
    )
    if contaminated:
        kinds = Counter(f"{match.reason} in {match.found_in}" for match in contaminated)
        log.warning(
            "data: %d training examples hold an evaluation question and are left out (%s); all of them are in %s, the first: %s",
            len(contaminated), "; ".join(f"{count} {kind}" for kind, count in kinds.most_common()), run.path("data.json"),
            ", ".join(match.id for match in contaminated[:5]),
        )
    return Splits(train, held_out)


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

    A problem and its rewritings are one; its choice does not depend on the other rows' order or presence.
    """
    keys = [problem_key(example) for example in examples]
    ranked = sorted(set(keys), key=lambda key: hashlib.sha256(f"{seed}:{key}".encode()).digest())
    sizes = Counter(keys)
    chosen: set[str] = set()
    count = 0
    for key in ranked:
        if count >= held_out:
            break
        chosen.add(key)
        count += sizes[key]
    sides = list(zip(keys, examples, strict=True))
    return [e for key, e in sides if key not in chosen], [e for key, e in sides if key in chosen]


def digest(examples: list[Example]) -> str:
    """SHA-256 over messages and answers."""
    total = hashlib.sha256()
    for example in examples:
        total.update(json.dumps([example.messages, example.answer], sort_keys=True).encode())
    return total.hexdigest()


def inputs(config: Config, run: Run) -> dict[str, Path]:
    """What the manifest records of the data: the files where there are some, and the digest of the examples."""
    return {"data": run.dir / "data.json"} | sources.files(config.data)


def prompt_messages(example: Example, prompt: str) -> list[dict[str, Any]]:
    """The messages before the answer, as the model will see them; `prompt` wraps the problem of a single-turn example."""
    messages = [{"role": message["role"], "content": message["content"]} for message in example.prompt]
    users = [message for message in messages if message["role"] == "user"]
    if len(users) == 1 and not any(message["role"] == "assistant" for message in messages):
        users[0]["content"] = prompt.replace("{question}", users[0]["content"])
    return messages


def training_chat(example: Example, prompt: str) -> tuple[list[dict[str, Any]], list[bool]]:
    """The messages that an example is trained on, and for each assistant turn whether it is; the example has a completion."""
    assert example.completion is not None
    messages = prompt_messages(example, prompt) + [{"role": "assistant", "content": example.completion.strip()}]
    return messages, [message.get("train", True) for message in example.messages if message["role"] == "assistant"]


def refuse_evaluation_only(examples: list[Example]) -> None:
    """Raise UserError where an example may not be trained on by its data's terms (meta["evaluation_only"])."""
    refused = [example for example in examples if example.meta.get("evaluation_only")]
    if refused:
        raise UserError(
            f"{refused[0].meta.get('source')}: {len(refused)} of {len(examples)} training examples are of a data set that its authors give "
            f"for evaluation only (format {refused[0].meta.get('format')}, the first is {refused[0].id}). Give it as data.eval_path, "
            "and train on other data."
        )


# -- tokens ----------------------------------------------------------------------------------------------------------


encode = chats.encode


def sft_dataset(examples: list[Example], tokenizer: "PreTrainedTokenizerBase", config: Config) -> "Dataset":
    """Rows of input_ids, labels, ids and lengths (an entry an example) and length, verified: every trained turn supervises its EOS.

    Examples longer than `sft.max_length` go by `sft.over_length`; one without an answer to learn from is counted and left
    out. Where `sft.packing` is rows, examples are put together. Raises UserError where nothing is left or an EOS is not supervised.
    """
    from datasets import Dataset

    from finetune import over_length, packing

    settings = config.sft
    refuse_evaluation_only(examples)
    rows: list[dict[str, Any]] = []
    left_out: list[str] = []
    shortened = without_answer = untrained = 0

    def encode_turns(messages: list[dict[str, Any]], train: list[bool]) -> dict[str, list[int]]:
        row = encode(tokenizer, messages, train)
        eos = sum(label == tokenizer.eos_token_id for label in row["labels"])
        if eos < sum(train):
            raise UserError(
                f"{example.id}: {eos} supervised EOS for {sum(train)} trained turns. Every sample must supervise its EOS, "
                "or the model never stops; check the chat template and the row."
            )
        return row

    for example in examples:
        if example.completion is None:
            without_answer += 1
            continue
        messages, train = training_chat(example, config.data.prompt)
        if not any(train):
            untrained += 1
            continue
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
            f"data.path={sources.name(config.data)}: no example is left to train on ({without_answer} without an answer, "
            f"{untrained} without a turn to learn, {len(left_out)} longer than sft.max_length={settings.max_length})."
        )
    lengths = [row["length"] for row in rows]
    supervised = sum(label != -100 for row in rows for label in row["labels"])
    log.info(
        "sft data: %d samples, %d to %d tokens, %.0f%% of tokens supervised, EOS supervised in 100%%; longer than %d tokens: %d made to "
        "fit (%s), %d left out in whole or in part; left out: %d without an answer, %d without a turn to learn",
        len(rows), min(lengths), max(lengths), 100 * supervised / sum(lengths), settings.max_length, shortened, settings.over_length,
        len(left_out), without_answer, untrained,
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
    segments = chats.segments(tokenizer, row)
    console = Console(stderr=True)
    console.print(Text("one sample as the model sees it, the loss is on the green part:", style="bold"))
    console.print(Text.assemble(*((piece, "bold green" if learned else "bright_black") for piece, learned in segments)))
    log.debug(
        "one sample, the loss is on the part in ⟦⟧:\n%s", "".join(f"⟦{piece}⟧" if learned else piece for piece, learned in segments)
    )


def grpo_dataset(examples: list[Example], config: Config) -> "Dataset":
    """Rows of prompt (messages), answer, answer_type, solution, id and meta (JSON): what TRL and the rewards read.

    Under tutoring rewards each learnt turn of a dialogue is a prompt of its own. Examples without a gold answer, which only those
    rewards can do without, are counted and left out; raises UserError where none is left.
    """
    from datasets import Dataset

    tutoring = not set(config.grpo.rewards).isdisjoint(TUTORING) and "correct" not in config.grpo.rewards
    golden = [example for example in examples if example.answer is not None or tutoring]
    prompts = [turn for example in golden for turn in learnt_turns(example)] if tutoring else golden
    refuse_evaluation_only(examples)
    plain = [example for example in examples if example.meta.get("language_modelling")]
    if plain:
        raise UserError(
            f"data.path={sources.name(config.data)}: {len(plain)} examples are plain text without a question (the first is {plain[0].id}), "
            "and GRPO needs a prompt and a gold answer. Give data with questions and answers; plain text is for recipe=sft."
        )
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
        raise UserError(f"data.path={sources.name(config.data)}: no example has a gold answer, so GRPO has nothing to reward.")
    log.info("grpo data: %d prompts, left out %d without a gold answer", len(rows), len(examples) - len(golden))
    return Dataset.from_list(rows)


def learnt_turns(example: Example) -> list[Example]:
    """The dialogue up to and with each assistant turn that is learnt, or the example as it is where there is none."""
    ends = [
        place + 1 for place, message in enumerate(example.messages) if message["role"] == "assistant" and message.get("train", True)
    ]
    return [replace(example, messages=example.messages[:end], id=f"{example.id}:{place}") for place, end in enumerate(ends)] or [example]
