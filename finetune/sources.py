"""The data that a configuration names: a file, folder, hub name or generator, or a mixture of several."""

import itertools
import logging
from collections import Counter
from pathlib import Path
from typing import Any

import data_formats
from data_formats import DataFormatError, Example
from data_formats.mixture import Mixture, Source
from data_formats.template_tokens import TemplateTokens
from finetune.config import DataConfig
from finetune.errors import UserError

log = logging.getLogger("finetune")


def sources(settings: DataConfig) -> list[Source]:
    """The training sources: data.sources, or data.path alone with the options beside it."""
    if not settings.sources:
        return [Source(settings.path, settings.format, options=options(settings, settings.split) | limit(settings))]
    return [
        Source(
            entry.path, entry.format, entry.weight, entry.cap,
            dict(entry.options)
            | {name: value for name, value in (("columns", entry.columns), ("filter", entry.filter), ("split", entry.split)) if value},
        )
        for entry in settings.sources
    ]


def evaluation_source(settings: DataConfig) -> Source | None:
    """data.eval_path, read as data.path is (format, columns, options) or, beside data.sources, by its content; None without one."""
    if settings.eval_path is None:
        return None
    if settings.sources:
        return Source(settings.eval_path, options={"split": settings.eval_split} if settings.eval_split else {})
    return Source(settings.eval_path, settings.format, options=options(settings, settings.eval_split) | limit(settings))


def options(settings: DataConfig, split: str | None) -> dict[str, Any]:
    """Options of data_formats.read for data.path and data.eval_path."""
    return dict(settings.options) | {name: value for name, value in (("columns", settings.columns), ("split", split)) if value}


def limit(settings: DataConfig) -> dict[str, int]:
    """data.limit as an option of one source."""
    return {"limit": settings.limit} if settings.limit is not None else {}


def name(settings: DataConfig) -> str:
    """What the training data is called in messages: its paths."""
    return ", ".join(str(source.path) for source in sources(settings))


def files(settings: DataConfig) -> dict[str, Path]:
    """The files and folders among the training and evaluation sources, for the manifest."""
    named = {f"data_source_{place}": source.path for place, source in enumerate(sources(settings), 1)}
    if not settings.sources:
        named = {"data_path": settings.path}
    if settings.eval_path is not None:
        named["eval_path"] = settings.eval_path
    named |= {f"decontaminate_{place}": path for place, path in enumerate(settings.decontaminate, 1)}
    return {name: Path(path) for name, path in named.items() if Path(path).exists()}


def read(source: Source) -> tuple[list[Example], dict[str, Any]]:
    """All examples of one source, and what became of its rows. Raises DataFormatError for a bad file."""
    reader = data_formats.read(source.path, source.format, **source.options)
    examples = list(reader)
    counts = reader.inspection
    return examples, {
        "path": str(source.path), "format": counts.format, "read": counts.read, "kept": counts.kept,
        "changed": {kind: tally.count for kind, tally in counts.changes.items()},
        "skipped": {reason: tally.count for reason, tally in counts.skips.items()},
    }


def read_all(settings: DataConfig, seed: int) -> tuple[list[Example], list[dict[str, Any]]]:
    """The training data's examples, mixed under `seed`, and a record for each source.

    Raises DataFormatError for a bad file or an impossible mixture.
    """
    if not settings.sources:
        examples, record = read(sources(settings)[0])
        return examples, [record]
    mixture = Mixture(sources(settings), seed)
    examples = list(itertools.islice(mixture, settings.limit))
    log.info("data: mixture of %s", ", ".join(f"{count} from {path}" for path, count in mixture.taken.items()))
    if mixture.ended_by is not None:
        log.info("data: the mixture ends where %s has no more examples, since its share could not be kept beyond", mixture.ended_by)
    return examples, [{"path": path, "kept": count} for path, count in mixture.taken.items()]


def guard(examples: list[Example], tokens: TemplateTokens, action: str) -> Counter[str]:
    """Escape the chat template's tokens in the examples' contents, in place; returns which were found, how often.

    Raises UserError where `action` is refuse and one is found.
    """
    total: Counter[str] = Counter()
    guarded = []
    for example in examples:
        try:
            messages, found = tokens.guard(example.messages, action)
        except DataFormatError as error:
            raise UserError(
                f"{example.meta.get('source')}, row {example.meta.get('row')} ({example.id}): {error.found}. "
                "Remove it, or set data.template_tokens=escape."
            ) from error
        if found:
            example.messages = messages
            guarded.append(example.id)
            total += found
    if total:
        log.warning(
            "data: the chat template's tokens stand in %d examples and were escaped: %s; the first: %s", len(guarded),
            ", ".join(f"{token} {count} times" for token, count in total.most_common(5)), ", ".join(guarded[:5]),
        )
    return total
