"""The evaluate stage: the base, each trained adapter and the merged weights on the same problems, with intervals and paired tests."""

import hashlib
import json
import logging
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import track
from rich.table import Table

import data_formats
from data_formats import Example
from finetune import answers, data, few_shot, hardware, interpreter, metrics, models, pedagogy, suites, training
from finetune.config import Config
from finetune.engines import Answer, Engine, Gguf, Local, Prompt, Server
from finetune.errors import UserError
from finetune.rows import Rows
from finetune.run import Result, Run, write_atomic

log = logging.getLogger("finetune")

SUBJECT = ("subject", "type", "Type", "field", "dataset", "lesson_topic")
LEVEL = ("level", "grade", "Grade", "math_level")
"""Names in an example's meta that hold its subject and its level."""
SHOWN_GROUPS = 12
"""Most values of a subject or level for which accuracy is given by value; more are no grouping."""


@dataclass(frozen=True)
class Task:
    """One problem as it is put to the models."""

    example: Example
    prompt: Prompt
    shown: list[dict[str, Any]]
    """The prompt as messages, for the results."""


@dataclass(frozen=True)
class Candidate:
    """A model to evaluate."""

    name: str
    source: Path | None
    """File or folder for the manifest; None for a server."""
    engine: Engine


def evaluate(config: Config, run: Run) -> Result:
    """Put every problem to every model; `evaluate/results.json`, samples in lm-eval's format, and a table.

    The models are model.path (a folder, hub name, GGUF file or server) and, as far as they are there, model.adapter or the run's
    adapters on the full-precision base, and the merged folder. Problems are a suite's, or those that the run held out; where
    the run trains nothing, all of data.eval_path or data.path. Answers are kept as they come (`evaluate/rows.jsonl`): a killed
    evaluation goes on. Tutoring dialogues are scored for pedagogy instead of an answer.
    """
    choices = hardware.choose(config, hardware.detect())
    if config.evaluate.dtype != "auto":
        choices = replace(choices, dtype=config.evaluate.dtype)
    training.prepare_machine(config, choices)
    suite = suites.find(config)
    if suite is not None and suite.note:
        log.warning("evaluate: %s", suite.note)
    examples, source, inputs = problems(config, run, suite)
    tutoring = pedagogy.is_tutoring(examples)
    shots = worked_examples(config, suite) if config.evaluate.prompt == "few_shot" else None
    tasks = (tutor_tasks(config, examples) if tutoring else make_tasks(config, suite, shots, examples))[: config.evaluate.limit]
    if config.evaluate.prompt == "tool":
        log.info("evaluate: programs run at sandbox level %s", interpreter.sandbox.level().name)

    rows = Rows(run.path("evaluate/rows.jsonl"), fingerprint(config, run, tasks))
    names = []
    for candidate in candidates(config, run, choices):
        if candidate.source is not None:
            inputs[candidate.name] = candidate.source
        names.append(candidate.name)
        answer_all(candidate, tasks, rows, config, shots.stop if shots else ())
    shown: list[dict[str, Any]] = [
        {"id": task.example.id, "gold": task.example.answer, "prompt": task.shown, "completions": {}} for task in tasks
    ]
    results: dict[str, Any] = {
        "data": source, "licence": suite.licence if suite else None, "note": suite.note if suite else "", "problems": len(tasks),
        "k": config.evaluate.k, "mode": config.evaluate.prompt, "models": {}, "comparisons": [], "rows": shown,
    }
    for name in names:
        found = [rows.answers[name, index] for index in range(len(tasks))]
        if tutoring:
            summary = tutor_summary(name, tasks, found, shown)
        else:
            summary = answer_summary(name, tasks, found, shown)
            log.info("evaluate: %s solves %.1f%% of %d", name, 100 * summary["accuracy"], len(tasks))
        results["models"][name] = summary
    if tutoring:
        results["references"] = pedagogy.reference_summaries([task.example for task in tasks])
        for row, task in zip(shown, tasks, strict=True):
            row["references"] = pedagogy.references(task.example)
    else:
        results["comparisons"] = [compare(shown, first, second) for first, second in pairs(names)]
    write_atomic(run.path("evaluate/results.json"), json.dumps(results, indent=1, ensure_ascii=False))
    if not tutoring:
        for name in names:
            write_samples(run.path(f"evaluate/{name}/samples_{config.evaluate.suite or 'problems'}.jsonl"), name, shown, tasks, config)
    Console(stderr=True).print(tutor_table(results) if tutoring else table(results))
    log.debug("results:\n%s", json.dumps({key: value for key, value in results.items() if key != "rows"}, indent=1))
    return Result(inputs, ["evaluate"], training.peak_gpu_memory())


# -- problems --------------------------------------------------------------------------------------------------------


def problems(config: Config, run: Run, suite: suites.Suite | None) -> tuple[list[Example], str, dict[str, Path]]:
    """(examples, what they are called, files for the manifest) of the suite, of the run's held-out side or of a whole file."""
    settings = config.data
    if suite is not None:
        path = config.evaluate.suite_path or str(suite.hub)
        options = {} if config.evaluate.suite_path else dict(suite.options)
        examples = list(data_formats.read(path, **options))
        source = f"{config.evaluate.suite} ({path})"
    elif {"sft", "grpo"} & set(config.stages) or run.last_adapter() is not None:
        return data.load(config, run).held_out, settings.eval_path or settings.path, data.inputs(config, run)
    else:
        path = settings.eval_path or settings.path
        options = dict(settings.options)
        options |= {name: value for name in ("columns", "split", "limit") if (value := asdict(settings)[name])}
        examples = list(data_formats.read(path, settings.format, **options))
        source = path
        log.info("evaluate: all %d rows of %s are problems; what the model was trained on is not known here", len(examples), path)
    return examples, source, {"data_path": Path(path)} if Path(path).exists() else {}


def tutor_tasks(config: Config, examples: list[Example]) -> list[Task]:
    """Each place in the dialogues where the tutor speaks next. Raises UserError for another prompt than cot."""
    if config.evaluate.prompt != "cot":
        raise UserError(f"evaluate.prompt={config.evaluate.prompt}: these are tutoring dialogues, which are their own prompts. Set evaluate.prompt=cot.")
    turns = [turn for example in examples for turn in data.learnt_turns(example)]
    return [
        Task(turn, Prompt(plain), plain)
        for turn in turns for plain in [[{"role": message["role"], "content": message["content"]} for message in turn.prompt]]
    ]


def make_tasks(config: Config, suite: suites.Suite | None, shots: few_shot.FewShot | None, examples: list[Example]) -> list[Task]:
    """The examples as prompts; those without a gold answer are counted and left out. Raises UserError where none is left."""
    solvable = [example for example in examples if example.answer is not None]
    if len(solvable) < len(examples):
        log.warning("evaluate: %d of %d examples have no gold answer and are left out", len(examples) - len(solvable), len(examples))
    if not solvable:
        raise UserError(f"none of {len(examples)} examples has a gold answer to compare with. Name its column with data.columns.answer.")
    hopeless = [example.id for example in solvable if not answers.parseable(example.answer)]
    if hopeless:
        log.warning("evaluate: %d gold answers cannot be compared with, nothing is right there: %s", len(hopeless), ", ".join(hopeless[:5]))
    if shots is not None:
        texts = [shots.prompt(last_user(example)) for example in solvable]
        return [
            Task(example, Prompt(None, text), [{"role": "user", "content": text}]) for example, text in zip(solvable, texts, strict=True)
        ]
    wording = suites.prompt(config, suite)
    chats = [data.prompt_messages(example, wording) for example in solvable]
    return [Task(example, Prompt(chat), chat) for example, chat in zip(solvable, chats, strict=True)]


def last_user(example: Example) -> str:
    """The problem as its last user turn states it, with the options of a choice."""
    return next(message["content"] for message in reversed(example.prompt) if message["role"] == "user")


def worked_examples(config: Config, suite: suites.Suite | None) -> few_shot.FewShot:
    """The few-shot examples of evaluate.shots_path, else the suite's. Raises UserError where there are none."""
    settings = config.evaluate
    if settings.shots_path is not None:
        return few_shot.from_examples(list(data_formats.read(settings.shots_path, limit=10 * settings.shots)), settings.shots, settings.shots_path)
    if suite is None or suite.shots is None:
        raise UserError(f"evaluate.suite={settings.suite}: has no published examples here. Set evaluate.shots_path to a file with worked solutions.")
    return suite.shots


# -- models ----------------------------------------------------------------------------------------------------------


def candidates(config: Config, run: Run, choices: hardware.Choices) -> Iterator[Candidate]:
    """Each model to evaluate; one is in memory at a time, adapters share the base."""
    path = config.model.path
    if path.startswith(("http://", "https://")) or path.endswith(".gguf"):
        if config.model.adapter:
            raise UserError(f"model.adapter={config.model.adapter}: cannot be put on {path}. Give the base's folder, or merge and convert it first.")
        if path.startswith("http"):
            if config.evaluate.prompt == "tool":
                raise UserError(f"evaluate.prompt=tool: a server cannot go on with a begun answer. Give the model of {path} as a folder or GGUF file.")
            server = Server(path, config.evaluate.server_model)
            yield Candidate(Path(server.model).name, None, server)
        else:
            if not Path(path).is_file():
                raise UserError(f"model.path={path}: no such file.")
            yield Candidate(Path(path).stem, Path(path), Gguf(Path(path), config.hardware.threads))
        return
    trained = {"adapter": Path(config.model.adapter)} if config.model.adapter else {}
    trained |= {stage: run.dir / stage / "adapter" for stage in ("sft", "grpo") if (run.dir / stage / "adapter").is_dir()}
    base = models.resolve(path)
    tokenizer = models.load_tokenizer(base, config.model)
    model = models.load_base(base, config.model, choices, quantize=False)
    # Every adapter is put on once before the first answer: one that is damaged must not cost an evaluation of the base.
    for folder in trained.values():
        model = models.load_adapter(model, folder).unload()
    yield Candidate("base", base, Local(model, tokenizer))
    for name, folder in trained.items():
        adapted = models.load_adapter(model, folder)
        yield Candidate(name, folder, Local(adapted, models.load_tokenizer(folder, config.model) if has_tokenizer(folder) else tokenizer))
        model = adapted.unload()
    merged = run.dir / "merged"
    if merged.is_dir():
        del model
        tokenizer = models.load_tokenizer(merged, config.model)
        yield Candidate("merged", merged, Local(models.load_base(merged, config.model, choices, quantize=False), tokenizer))


def has_tokenizer(folder: Path) -> bool:
    """Whether an adapter's folder has the tokenizer that it was trained with."""
    return (folder / "tokenizer_config.json").exists()


# -- answers ---------------------------------------------------------------------------------------------------------


def fingerprint(config: Config, run: Run, tasks: Sequence[Task]) -> str:
    """What the answers depend on: problems, prompts, settings, seed and the models, as SHA-256."""
    facts = {
        "settings": asdict(config.evaluate), "seed": config.seed, "model": asdict(config.model),
        "trained": {name: stage.get("outputs") for name, stage in run.manifest["stages"].items() if name in ("sft", "grpo", "merge")},
        "prompts": [[task.shown, task.example.answer] for task in tasks],
    }
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()


def answer_all(candidate: Candidate, tasks: Sequence[Task], rows: Rows, config: Config, stop: tuple[str, ...]) -> None:
    """Answer every problem evaluate.k times, batch by batch, those of like length together.

    Each batch has a seed of its own, the same for every model, so that one that was interrupted is answered as it would have been.
    """
    settings = config.evaluate
    lengths = [candidate.engine.length(task.prompt) for task in tasks]
    order = sorted(range(len(tasks)), key=lambda index: lengths[index])
    size = max(1, settings.batch_size // settings.k)
    for start in track(range(0, len(tasks), size), description=f"evaluate {candidate.name}", console=Console(stderr=True)):
        batch = order[start : start + size]
        if rows.has(candidate.name, batch):
            continue
        seed = int.from_bytes(hashlib.sha256(f"{config.seed}:{start}".encode()).digest()[:4], "big") >> 1
        prompts = [tasks[index].prompt for index in batch for _ in range(settings.k)]
        if settings.prompt == "tool":
            found = interpreter.answer(candidate.engine, prompts, settings, seed)
        else:
            found = candidate.engine.answer(prompts, settings, seed, stop)
        rows.add(candidate.name, batch, [found[place : place + settings.k] for place in range(0, len(found), settings.k)])


# -- figures ---------------------------------------------------------------------------------------------------------


def answer_summary(name: str, tasks: Sequence[Task], found: list[list[Answer]], rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Judge a model's answers, add them to `rows` and return its figures."""
    flat = [(task.example, answer) for task, group in zip(tasks, found, strict=True) for answer in group]
    extracted = [answers.extract(answer.text) for _, answer in flat]
    pairs_ = [(example.answer, text or "") for (example, _), text in zip(flat, extracted, strict=True)]
    verdicts = answers.verify(pairs_, answer_types=[example.answer_type for example, _ in flat])
    k = len(found[0])
    shares, majority = [], []
    for position, (row, task) in enumerate(zip(rows, tasks, strict=True)):
        here = slice(position * k, (position + 1) * k)
        row["completions"][name] = [
            {**asdict(answer), "extracted": text, "correct": verdict}
            for answer, text, verdict in zip(found[position], extracted[here], verdicts[here], strict=True)
        ]
        shares.append(sum(verdicts[here]) / k)
        winner = metrics.majority(extracted[here], task.example.answer_type) if k > 1 else 0
        majority.append(winner is not None and verdicts[here][winner])
    return {
        "accuracy": sum(shares) / len(shares),
        "interval": list(interval(shares)),
        "majority": {"k": k, "accuracy": sum(majority) / len(majority), "interval": list(metrics.wilson(sum(majority), len(majority)))},
        "pass_at": {
            size: sum(metrics.pass_at_k(k, round(share * k), size) for share in shares) / len(shares) for size in metrics.powers_up_to(k)
        },
        **form([answer for _, answer in flat]),
        "extracted": sum(text is not None for text in extracted) / len(extracted),
        "boxed": sum("\\boxed{" in answer.text for _, answer in flat) / len(flat),
        "by": {kind: by_group(tasks, shares, keys) for kind, keys in (("subject", SUBJECT), ("level", LEVEL))},
    }


def form(found: Sequence[Answer]) -> dict[str, float]:
    """How the answers end: shares that ended by themselves or were cut off, and mean length in tokens."""
    finished = sum(answer.finished for answer in found) / len(found)
    return {"finished": finished, "cut_off": 1 - finished, "mean_tokens": sum(answer.tokens for answer in found) / len(found)}


def interval(shares: Sequence[float]) -> tuple[float, float]:
    """95% interval of accuracy: Wilson's for one answer a problem; else by resampling problems, whose samples are not independent."""
    if all(share in (0.0, 1.0) for share in shares):
        return metrics.wilson(round(sum(shares)), len(shares))
    return metrics.bootstrap(shares)


def by_group(tasks: Sequence[Task], shares: Sequence[float], keys: tuple[str, ...]) -> dict[str, dict[str, Any]]:
    """Accuracy by the value that an example's meta has under the first of `keys` there; {} where there are none or too many."""
    groups: dict[str, list[float]] = {}
    for task, share in zip(tasks, shares, strict=True):
        value = next((task.example.meta[key] for key in keys if key in task.example.meta), None)
        if value is not None:
            groups.setdefault(str(value), []).append(share)
    if len(groups) > SHOWN_GROUPS:
        return {}
    return {
        value: {"problems": len(group), "accuracy": sum(group) / len(group), "interval": list(interval(group))}
        for value, group in sorted(groups.items())
    }


def tutor_summary(name: str, tasks: Sequence[Task], found: list[list[Answer]], rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Score a model's turns, add them to `rows` and return its figures."""
    k = len(found[0])
    flat = [answer for group in found for answer in group]
    scores = pedagogy.score([task.example for task in tasks for _ in range(k)], [answer.text for answer in flat])
    for position, row in enumerate(rows):
        row["completions"][name] = [
            {**asdict(answer), "correct": None, "scores": {score: values[position * k + place] for score, values in scores.items()}}
            for place, answer in enumerate(found[position])
        ]
    means = {score: [sum(values[start : start + k]) / k for start in range(0, len(values), k)] for score, values in scores.items()}
    return {"scores": pedagogy.summary(means), **form(flat)}


def pairs(names: list[str]) -> list[tuple[str, str]]:
    """The comparisons worth a line: each model with the one before it, and the last with the first."""
    steps = list(zip(names, names[1:], strict=False))
    return steps + ([(names[0], names[-1])] if len(names) > 2 else [])


def compare(rows: list[dict[str, Any]], first: str, second: str) -> dict[str, Any]:
    """Paired comparison of two models: problems gained and lost by their first completions and McNemar's p, identical texts, and
    the difference of their accuracies with its 95% bootstrap interval."""
    before = [row["completions"][first] for row in rows]
    after = [row["completions"][second] for row in rows]
    gained = sum(not a[0]["correct"] and b[0]["correct"] for a, b in zip(before, after, strict=True))
    lost = sum(a[0]["correct"] and not b[0]["correct"] for a, b in zip(before, after, strict=True))
    differences = [
        sum(item["correct"] for item in b) / len(b) - sum(item["correct"] for item in a) / len(a) for a, b in zip(before, after, strict=True)
    ]
    return {
        "from": first, "to": second, "gained": gained, "lost": lost, "p": metrics.mcnemar(gained, lost),
        "difference": sum(differences) / len(differences), "difference_interval": list(metrics.bootstrap(differences)),
        "identical": sum(a[0]["text"] == b[0]["text"] for a, b in zip(before, after, strict=True)),
    }


# -- what is written and shown ---------------------------------------------------------------------------------------


def write_samples(path: Path, name: str, rows: list[dict[str, Any]], tasks: Sequence[Task], config: Config) -> None:
    """A model's completions as lm-evaluation-harness logs samples (`--log_samples`), one row a problem."""
    settings = config.evaluate
    arguments = {
        "until": [], "max_gen_toks": settings.max_new_tokens, "do_sample": settings.temperature > 0, "temperature": settings.temperature,
        "top_p": settings.top_p, "top_k": settings.top_k,
    }

    def digest(value: Any) -> str:
        return hashlib.sha256(json.dumps(value, ensure_ascii=False).encode()).hexdigest()

    lines = []
    for number, (row, task) in enumerate(zip(rows, tasks, strict=True)):
        completions = row["completions"][name]
        doc = {"id": row["id"], "question": task.example.question, "answer": row["gold"], **task.example.meta}
        prompt = task.prompt.text if task.prompt.messages is None else json.dumps(task.shown, ensure_ascii=False)
        lines.append({
            "doc_id": number, "doc": doc, "target": row["gold"], "arguments": {"gen_args_0": {"arg_0": prompt, "arg_1": arguments}},
            "resps": [[completion["text"] for completion in completions]],
            "filtered_resps": [completion["extracted"] or "[invalid]" for completion in completions], "filter": "none",
            "metrics": ["exact_match"], "exact_match": sum(completion["correct"] for completion in completions) / len(completions),
            "doc_hash": digest(doc), "prompt_hash": digest(prompt), "target_hash": digest(row["gold"]),
        })
    write_atomic(path, "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines))


def table(results: dict[str, Any]) -> Table:
    """The results as a table for the terminal."""
    shown = Table(title=f"{results['problems']} problems of {results['data']}")
    several = results["k"] > 1
    columns = ["model", "accuracy", "95% interval", *([f"maj@{results['k']}", f"pass@{results['k']}"] if several else [])]
    for column in (*columns, "answer found", "cut off", "tokens", "against the one before"):
        shown.add_column(column, justify="left" if column in ("model", "against the one before") else "right")
    against = {comparison["to"]: comparison for comparison in reversed(results["comparisons"])}
    for name, summary in results["models"].items():
        comparison = against.get(name)
        note = ""
        if comparison:
            note = f"+{comparison['gained']} -{comparison['lost']} (p={comparison['p']:.2g}), {comparison['identical']} identical"
        low, high = summary["interval"]
        sampled = [f"{100 * summary['majority']['accuracy']:.1f}%", f"{100 * summary['pass_at'][results['k']]:.1f}%"] if several else []
        shown.add_row(
            name, f"{100 * summary['accuracy']:.1f}%", f"{100 * low:.1f}-{100 * high:.1f}%", *sampled, f"{100 * summary['extracted']:.0f}%",
            f"{100 * summary['cut_off']:.0f}%", f"{summary['mean_tokens']:.0f}", note,
        )
    return shown


def tutor_table(results: dict[str, Any]) -> Table:
    """The models' pedagogy scores under those of the data's own tutors."""
    shown = Table(title=f"{results['problems']} tutor turns in dialogues of {results['data']}, each score from 0 to 1")
    shown.add_column("tutor")
    for name in pedagogy.TUTORING:
        shown.add_column(name, justify="right")
    for name, summary in (results["references"] | results["models"]).items():
        shown.add_row(name, *(f"{summary['scores'][score]['mean']:.2f}" for score in pedagogy.TUTORING))
    return shown
