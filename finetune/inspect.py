"""The inspect stage: what is in a data file, and what the model will see of it, in one streaming pass."""

import json
import logging
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from itertools import islice
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

import data_formats
from data_formats import Example, Inspection
from data_formats.mixture import Source
from data_formats.template_tokens import TemplateTokens
from finetune import chats, data, decontaminate, models, sources
from finetune.config import Config
from finetune.run import Result, Run, write_atomic

if TYPE_CHECKING:
    from tokenizers import Encoding
    from transformers import PreTrainedTokenizerBase

log = logging.getLogger("finetune")

BATCH = 1000
"""Examples rendered and tokenised at a time; memory does not grow beyond one batch being read and one being tokenised."""

SAMPLES = 3
"""Examples shown as the model will see them."""

SHOWN = 100
"""Contaminated examples that are listed; the count goes on."""


@dataclass
class Seen:
    """What one source is in the chosen model's tokens. lengths: tokens of an example -> examples; roles: role -> tokens of
    its turns' contents, `template` for what the chat template adds; supervised: tokens with loss; eos: trained turns whose
    EOS has loss, of `turns`."""

    lengths: Counter[int] = field(default_factory=Counter)
    roles: Counter[str] = field(default_factory=Counter)
    supervised: int = 0
    turns: int = 0
    eos: int = 0
    untrained: int = 0
    template_tokens: Counter[str] = field(default_factory=Counter)
    contaminated: Counter[str] = field(default_factory=Counter)
    contaminated_rows: list[dict[str, str]] = field(default_factory=list)
    samples: list[dict[str, Any]] = field(default_factory=list)

    def add(self, messages: chats.Messages, rendered: chats.Rendered, encoding: "Encoding", eos: str) -> None:
        """Count one tokenised chat."""
        length = len(encoding)
        self.lengths[length] += 1
        self.untrained += not rendered.spans
        position, contents = 0, 0
        for message in messages:
            content = message["content"].strip()
            start = rendered.text.find(content, position)
            if content and start >= 0:
                position = start + len(content)
                count = tokens_between(encoding, start, position)
                self.roles[message["role"]] += count
                contents += count
        self.roles["template"] += length - contents
        for start, end in rendered.spans:
            self.supervised += tokens_between(encoding, start, end)
            last = encoding.char_to_token(end - 1)
            self.turns += 1
            self.eos += last is not None and encoding.token_to_chars(last) == (end - len(eos), end)


def tokens_between(encoding: "Encoding", start: int, end: int) -> int:
    """Tokens that begin in the characters start .. end - 1; characters that belong to no token (blanks, in some tokenizers) are passed."""
    first, last = encoding.char_to_token(start), encoding.char_to_token(end - 1)
    while first is None and start < end - 1:
        start += 1
        first = encoding.char_to_token(start)
    if first is None:
        return 0
    while last is None:
        end -= 1
        last = encoding.char_to_token(end - 1)
    whole = encoding.token_to_chars(first)
    return last - first + (whole is not None and whole[0] >= start)


def inspect(config: Config, run: Run) -> Result:
    """The inspect stage: `inspect.json` and a page on the terminal for each source of the data; a report has a section of it.

    Each source is read whole: caps and weights of a mixture take effect in training. Raises DataFormatError for a bad file.
    """
    tokenizer = models.load_tokenizer(models.resolve(config.model.path), config.model)
    tokens = chats.template_tokens(tokenizer)
    evaluation = sources.evaluation_source(config.data)
    problems = sources.read(evaluation)[0] if evaluation is not None else []
    detector = decontaminate.Detector(config.data, problems)
    pages = []
    for source in sources.sources(config.data):
        counts, seen = read(source, tokenizer, tokens, detector, config)
        page = summary(counts, seen, config, checked=bool(problems or config.data.decontaminate))
        show(page)
        pages.append(page)
    write_atomic(run.path("inspect.json"), json.dumps({"sources": pages}, indent=1, ensure_ascii=False))
    return Result(sources.files(config.data), ["inspect.json"])


def read(
    source: Source, tokenizer: "PreTrainedTokenizerBase", tokens: TemplateTokens, detector: decontaminate.Detector, config: Config
) -> tuple[Inspection, Seen]:
    """One pass over a source: a batch is tokenised on the other cores (Rust) while the next one is read and rendered."""
    reader = data_formats.read(source.path, source.format, **source.options)
    seen = Seen()

    def rendered_batches() -> Iterator[tuple[list[chats.Messages], list[chats.Rendered]]]:
        stream = counted()
        while examples := list(islice(stream, BATCH)):
            chosen = [training_or_prompt(example, config.data.prompt) for example in examples]
            yield [messages for messages, _ in chosen], chats.render(tokenizer, chosen)

    def counted() -> Iterator[Example]:
        for example in reader:
            reader.inspection.add_example(example)
            match = detector.find(example)
            if match is not None:
                seen.contaminated[f"{match.reason} in {match.found_in}"] += 1
                if len(seen.contaminated_rows) < SHOWN:
                    seen.contaminated_rows.append(match._asdict())
            if any(tokens.find(message["content"]) for message in example.messages):
                example.messages, found = tokens.guard(example.messages)
                seen.template_tokens += found
            if len(seen.samples) < SAMPLES:
                row = chats.encode(tokenizer, *training_or_prompt(example, config.data.prompt))
                seen.samples.append({"id": example.id, "segments": chats.segments(tokenizer, row)})
            yield example

    def count(messages: list[chats.Messages], rendered: list[chats.Rendered], work: "Future[list[Encoding]]") -> None:
        for chat, text, encoding in zip(messages, rendered, work.result(), strict=True):
            seen.add(chat, text, encoding, tokenizer.eos_token)

    waiting = None
    with ThreadPoolExecutor(1) as pool:
        for messages, rendered in rendered_batches():
            texts = [text for text, _ in rendered]
            work = pool.submit(tokenizer.backend_tokenizer.encode_batch, texts, add_special_tokens=False)
            if waiting is not None:
                count(*waiting)
            waiting = messages, rendered, work
        if waiting is not None:
            count(*waiting)
    return reader.inspection, seen


def training_or_prompt(example: Example, prompt: str) -> tuple[chats.Messages, list[bool]]:
    """An example's chat and its flags of trained turns; one without an answer is its prompt alone, in which nothing is trained."""
    if example.completion is not None:
        return data.training_chat(example, prompt)
    messages = data.prompt_messages(example, prompt)
    return messages, [False] * sum(message["role"] == "assistant" for message in messages)


def summary(counts: Inspection, seen: Seen, config: Config, checked: bool) -> dict[str, Any]:
    """Everything that is shown, as inspect.json holds it; shares are from 0 to 1, lengths in tokens."""
    examples, total = seen.lengths.total(), sum(length * number for length, number in seen.lengths.items())
    longest = config.sft.max_length
    cut = {length: number for length, number in seen.lengths.items() if length > longest}
    held = total - sum((length - longest) * number for length, number in cut.items())

    def tallies(kinds: dict[str, Any]) -> dict[str, Any]:
        ordered = sorted(kinds.items(), key=lambda item: -item[1].count)
        return {kind: {"count": tally.count, "rows": tally.rows} for kind, tally in ordered}

    return {
        "path": counts.path, "format": counts.format, "why": counts.why, "container": counts.container, "notes": counts.notes,
        "read": counts.read, "kept": counts.kept, "changed": counts.changed, "skipped": counts.skipped,
        "changes": tallies(counts.changes), "skips": tallies(counts.skips),
        "answers": dict(counts.answers.most_common()), "prompt_only": counts.prompt_only,
        "duplicates": counts.duplicates, "conflicts": {"count": counts.conflicts.count, "rows": counts.conflicts.rows},
        "turns": dict(counts.roles), "trained_turns": counts.trained_turns,
        "model": config.model.path, "tokens": total, "role_tokens": dict(seen.roles.most_common()),
        "lengths": {"histogram": histogram(seen.lengths)} | {name: quantile(seen.lengths, share) for name, share in QUANTILES.items()},
        "supervised_share": seen.supervised / total, "eos_supervised": seen.eos, "eos_expected": seen.turns,
        "without_trained_turn": seen.untrained,
        "max_length": longest, "longer": sum(cut.values()), "tokens_beyond_max_length": total - held,
        "padding_share": 1 - held / (examples * longest),
        "template_tokens": dict(seen.template_tokens.most_common()),
        "contamination_checked": checked, "contaminated": dict(seen.contaminated.most_common()),
        "contaminated_rows": seen.contaminated_rows,
        "samples": seen.samples,
    }


QUANTILES = {"shortest": 0.0, "median": 0.5, "p95": 0.95, "longest": 1.0}


def quantile(lengths: Counter[int], share: float) -> int:
    """The length that this share of the examples does not exceed, tokens."""
    reached, wanted = 0, max(1, share * lengths.total())
    for length in sorted(lengths):
        reached += lengths[length]
        if reached >= wanted:
            return length
    raise AssertionError("no examples")


def histogram(lengths: Counter[int]) -> list[dict[str, int]]:
    """Examples by length, in bins of doubling width: {from, to, count}, both ends included, tokens."""
    bins: Counter[int] = Counter()
    for length, number in lengths.items():
        bins[max(length, 1).bit_length()] += number
    return [{"from": 2 ** (bits - 1), "to": 2**bits - 1, "count": bins[bits]} for bits in range(min(bins), max(bins) + 1)]


# -- the terminal page ------------------------------------------------------------------------------------------------


def show(page: dict[str, Any]) -> None:
    """Print the page; the log file has its figures."""
    table = Table(title=page["path"], show_header=False)
    table.add_column(style="bold")
    table.add_column()
    for name, value in lines(page):
        table.add_row(name, Text(value))
    console = Console()
    console.print(table)
    for sample in page["samples"]:
        console.print(Text(f"{sample['id']} as the model will see it, the loss is on the green part:", style="bold"))
        console.print(Text.assemble(*((piece, "bold green" if learned else "bright_black") for piece, learned in sample["segments"])))
    log.debug("inspect:\n%s", "\n".join(f"{name}: {value}" for name, value in lines(page)))


def lines(page: dict[str, Any]) -> Iterator[tuple[str, str]]:
    """(title, text) of each line, for the terminal, the log and the report."""
    yield "format", f"{page['format']}: {page['why']} ({page['container']})"
    for note in page["notes"]:
        yield "note", note
    yield "rows", f"read {page['read']}, kept {page['kept']}, changed {page['changed']}, skipped {page['skipped']}"
    for title, kinds in (("changed", page["changes"]), ("skipped", page["skips"])):
        for kind, tally in kinds.items():
            yield title, f"{tally['count']}  {kind} (rows {listed(tally)})"
    yield "answers", ", ".join(f"{kind} {count}" for kind, count in page["answers"].items())
    yield "questions", f"{page['duplicates']} repeated, {page['conflicts']['count']} of them with another answer ({listed(page['conflicts'])})"
    yield "turns", ", ".join(f"{role} {count}" for role, count in page["turns"].items()) + f"; {page['trained_turns']} learnt"
    yield "tokens by role", ", ".join(f"{role} {count / page['tokens']:.1%}" for role, count in page["role_tokens"].items())
    yield "tokens", ", ".join(f"{name} {page['lengths'][name]}" for name in QUANTILES)
    most = max(entry["count"] for entry in page["lengths"]["histogram"])
    for entry in page["lengths"]["histogram"]:
        yield f"{entry['from']}-{entry['to']}", f"{'█' * round(40 * entry['count'] / most)} {entry['count']}"
    yield "learnt", (
        f"{page['supervised_share']:.1%} of tokens, EOS in {page['eos_supervised']} of {page['eos_expected']} turns; "
        f"{page['without_trained_turn']} examples without a turn to learn, {page['prompt_only']} of them prompts alone"
    )
    yield f"at {page['max_length']} tokens", (
        f"{page['longer']} examples are longer ({page['tokens_beyond_max_length'] / page['tokens']:.1%} of tokens beyond), "
        f"{page['padding_share']:.1%} padding if all were padded to it"
    )
    found = ", ".join(f"{token} {count}" for token, count in page["template_tokens"].items())
    yield "template tokens", found + " in content" if found else "none in content"
    if page["contamination_checked"]:
        yield "contamination", "; ".join(f"{count} {kind}" for kind, count in page["contaminated"].items()) or "none"
    else:
        yield "contamination", "not checked: neither data.eval_path nor data.decontaminate is set"


def listed(tally: dict[str, Any]) -> str:
    """The first rows of a tally."""
    return ", ".join(map(str, tally["rows"][:8])) + (", …" if tally["count"] > 8 else "") or "none"
