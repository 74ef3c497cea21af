"""Problems made by the reasoning-gym package: endless, from a seed, each with an exact answer."""

from __future__ import annotations

from collections.abc import Iterator

from .adapter import Adapter, Context, Record, Row, gold
from .errors import DataFormatError, SkipRow, nearest
from .example import Example
from .gold import last_boxed
from .options import Options, listed
from .worked_solutions import WORKED_SOLUTIONS

PREFIX = "reasoning_gym:"


def generate(path: str, options: Options) -> Iterator[Record]:
    """Rows of "reasoning_gym:<name>[,<name>...]", `size` in all, the names in turn.

    reasoning-gym draws item i of seed s from seed s + i, so two reads share problems unless their seeds stand at least
    `size`
    apart: choose them so, and check the questions themselves. Raises DataFormatError when the package or a name is
        missing.
    """
    names = [name.strip() for name in path.removeprefix(PREFIX).split(",")]
    try:
        import reasoning_gym
        from reasoning_gym.factory import DATASETS
    except ImportError as error:
        raise DataFormatError(
            f"reasoning-gym is not installed ({error})", "pip install reasoning-gym", path=path
        ) from None
    sets = []
    for place, name in enumerate(names):
        if name not in DATASETS or name == "composite":
            close = nearest(name, DATASETS)
            hint = f"did you mean {close!r}? " if close else ""
            raise DataFormatError(
                f"no reasoning_gym data set {name!r}", f"{hint}There are: {listed(DATASETS)}", path=path
            )
        count = len(range(place, options.size, len(names)))
        if not count:
            continue
        try:
            sets.append(reasoning_gym.create_dataset(name, seed=options.seed, size=count, **options.params))
        except (AssertionError, TypeError, ValueError) as error:
            raise DataFormatError(
                f"reasoning_gym refuses params {dict(options.params)} for {name}: {error}",
                "Give parameters the generator knows",
                path=path,
            ) from None
    for number in range(options.size):
        yield Record(sets[number % len(names)][number // len(names)], number + 1, path)


def reasoning_gym(row: Row, context: Context) -> Example:
    """question, answer, metadata.answer_cot (a worked solution that ends in "#### 288", where the generator writes one;
    else ours from WORKED_SOLUTIONS).

    Puzzles that reasoning-gym gives no answer for (many solutions are right) are set aside. Without a worked solution
    the example is prompt-only.
    """
    metadata = row.get("metadata") or {}
    question = context.text(row, "question")
    answer = gold(row.get("answer"))
    if answer is None:
        raise SkipRow("the generator gives no single answer")
    steps = metadata.get("answer_cot")
    if steps is None and metadata.get("source_dataset") in WORKED_SOLUTIONS:
        steps = WORKED_SOLUTIONS[metadata["source_dataset"]](metadata)
    solution = target = None
    if isinstance(steps, str) and steps.strip():
        solution = steps.partition("####")[0].strip()
        target = solution
        if last_boxed(solution) is None:
            ending = f"The answer is \\boxed{{{answer}}}." if context.options.boxed_answer else f"#### {answer}"
            target = f"{solution}\n{ending}"
    meta = {"dataset": metadata.get("source_dataset"), "source_index": metadata.get("source_index")}
    meta["id"] = f"{meta['dataset']}-{context.options.seed}-{meta['source_index']}"
    return context.problem(question, target, answer=answer, solution=solution, meta=meta)


def _fits(row: Row) -> str | None:
    metadata = row.get("metadata")
    if isinstance(metadata, dict) and "source_dataset" in metadata and "question" in row and "answer" in row:
        return "columns question, answer and metadata.source_dataset"
    return None


REASONING_GYM = Adapter(
    reasoning_gym, _fits, ("question", "answer", "metadata"), ("question", "answer", "metadata"), rank=3
)
