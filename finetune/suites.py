"""The evaluation suites: where each one's problems are, and the prompts that DeepSeekMath's tables were made with.

Any other file is a suite too: give it as data.path.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from finetune import few_shot
from finetune.config import Config, one_of
from finetune.errors import UserError
from finetune.few_shot import FewShot

PROMPTS = {
    ("cot", "en"): "{question}\nPlease reason step by step, and put your final answer within \\boxed{}.",
    ("cot", "zh"): "{question}\n请通过逐步推理来解答问题，并把最终答案放置于\\boxed{}中。",
    ("tool", "en"): "{question}\nPlease integrate natural language reasoning with programs to solve the problem above, "
                    "and put your final answer within \\boxed{}.",
    ("tool", "zh"): "{question}\n请结合自然语言和Python程序语言来解答问题，并把最终答案放置于\\boxed{}中。",
}
"""What DeepSeekMath-Instruct and -RL were trained and measured with, by mode and language (deepseek-ai/DeepSeek-Math, README)."""


@dataclass(frozen=True)
class Suite:
    licence: str
    hub: str | None = None
    """Name on the hub; None: only from a file of your own, given as evaluate.suite_path."""
    options: Mapping[str, Any] = field(default_factory=dict)
    """Options of data_formats.read for the hub's copy."""
    language: str = "en"
    shots: FewShot | None = None
    """Examples for base models; None: give a file of your own as evaluate.shots_path."""
    note: str = ""
    """Terms that go into the log and the results."""


SUITES = {
    "gsm8k": Suite("MIT", "openai/gsm8k", {"config": "main", "split": "test"}, shots=few_shot.GSM8K),
    "math": Suite("MIT", "DigitalLearningGmbH/MATH-lighteval", {"split": "test"}, shots=few_shot.MATH),
    "math500": Suite("MIT", "HuggingFaceH4/MATH-500", {"split": "test"}, shots=few_shot.MATH),
    "svamp": Suite("MIT", "ChilleD/SVAMP", {"split": "test"}, shots=few_shot.GSM8K),
    "asdiv": Suite(
        "CC BY-NC 4.0", "EleutherAI/asdiv", {"split": "validation", "columns": {"Body": "body", "Question": "question", "Answer": "answer"}},
        shots=few_shot.GSM8K,
    ),
    "mawps": Suite("not stated upstream", shots=few_shot.GSM8K),
    "gsm_hard": Suite("MIT", "reasoning-machines/gsm-hard", {"split": "train"}, shots=few_shot.GSM8K),
    "mgsm_zh": Suite("CC BY-SA 4.0", language="zh"),
    "cmath": Suite("CC BY 4.0", "weitianwen/cmath", {"split": "test", "columns": {"answer": "golden"}}, language="zh"),
    "sat": Suite("MIT (AGIEval)"),
    "ocw": Suite("see its authors (Minerva, arXiv 2206.14858)", shots=few_shot.MATH),
    "aqua": Suite("Apache-2.0", "deepmind/aqua_rat", {"config": "raw", "split": "test"}),
    "theoremqa": Suite("MIT", "TIGER-Lab/TheoremQA", {"split": "test"}, shots=few_shot.MATH),
    "mathdial": Suite("CC BY-SA 4.0", "eth-nlped/mathdial", {"split": "test"}),
    "bridge": Suite("MIT"),
    "mrbench": Suite("CC BY-SA 4.0"),
    "comta": Suite(
        "Khan Academy's own terms",
        note="CoMTA may be used for internal, non-commercial evaluation only: do not train on it, do not pass it on.",
    ),
}


def find(config: Config) -> Suite | None:
    """The suite that evaluate.suite names; None without one. Raises UserError for an unknown name or one that needs a file."""
    settings = config.evaluate
    if settings.suite is None:
        return None
    one_of("evaluate.suite", settings.suite, tuple(SUITES))
    suite = SUITES[settings.suite]
    if suite.hub is None and settings.suite_path is None:
        raise UserError(f"evaluate.suite={settings.suite}: is not on the hub in a form that can be read. Give its file as evaluate.suite_path.")
    return suite


def prompt(config: Config, suite: Suite | None) -> str:
    """What a problem becomes in a user's turn: data.prompt where it is set, else the suite's prompt, else (tool mode apart) the bare problem."""
    mode = config.evaluate.prompt
    if config.data.prompt != "{question}" or suite is None and mode != "tool":
        return config.data.prompt
    return PROMPTS["tool" if mode == "tool" else "cot", suite.language if suite else "en"]
