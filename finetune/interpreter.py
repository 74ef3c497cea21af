"""Tool-integrated answers: the model writes Python, the sandbox runs it, the model goes on from the output (ToRA, arXiv 2309.17452)."""

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

from finetune import sandbox
from finetune.config import EvaluateConfig
from finetune.engines import Answer, Engine, Prompt

OUTPUT = "```output"
"""What the models write where a program's output belongs: a stretch of text ends there."""
OUTPUT_CHARS = 2000
"""Longest output that is shown to the model, characters."""


def program(text: str) -> str | None:
    r"""The Python block that the text ends with, or None.

    >>> program("So:\n```python\nprint(2 * 3)\n```\n")
    'print(2 * 3)\n'
    """
    before, fence, block = text.rstrip().rpartition("```python\n")
    if not fence or not block.endswith("```") or "```" in block[:-3]:
        return None
    return block[:-3]


def run(code: str, settings: EvaluateConfig) -> str:
    """What the program printed and, where it failed, the last line of the error. Raises UserError where there is no sandbox."""
    result = sandbox.run_python(code, timeout=settings.tool_seconds, allow_unsandboxed=settings.allow_unsandboxed)
    error = result.stderr.strip().splitlines()[-1:] if result.exit_code and not result.timed_out else []
    late = [f"TimeoutError: more than {settings.tool_seconds:g} seconds"] if result.timed_out else []
    return "\n".join([*([result.stdout.strip()] if result.stdout.strip() else []), *error, *late])[:OUTPUT_CHARS]


def answer(engine: Engine, prompts: Sequence[Prompt], settings: EvaluateConfig, seed: int) -> list[Answer]:
    """Answers with up to evaluate.tool_rounds runs of code in each; every output stands in the text as an ```output block.

    Tokens are those that the model wrote. An answer that asks for one run more than there are rounds is not finished.
    """
    found = [Answer("", 0, False) for _ in prompts]
    going = list(range(len(prompts)))
    for round_number in range(settings.tool_rounds + 1):
        stretches = engine.answer([replace(prompts[i], text=found[i].text) for i in going], settings, seed + round_number, (OUTPUT,))
        for i, stretch in zip(going, stretches, strict=True):
            found[i] = Answer(found[i].text + stretch.text, found[i].tokens + stretch.tokens, stretch.finished)
        programs = {i: code for i in going if found[i].finished and (code := program(found[i].text)) is not None}
        going = list(programs)
        if round_number == settings.tool_rounds:
            for i in going:
                found[i] = replace(found[i], finished=False)
        else:
            with ThreadPoolExecutor(2) as threads:
                outputs = list(threads.map(lambda code: run(code, settings), programs.values()))
            for i, output in zip(going, outputs, strict=True):
                found[i] = replace(found[i], text=f"{found[i].text.rstrip()}\n{OUTPUT}\n{output}\n```\n")
        if not going:
            break
    return found
