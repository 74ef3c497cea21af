"""FORMATS: the name of each format and its adapter."""

from __future__ import annotations

from . import chat, instruct, math, procedural, questions, tools, tutoring, word_problems
from .adapter import Adapter

FORMATS: dict[str, Adapter] = {
    "messages": chat.MESSAGES,
    "sharegpt": chat.SHAREGPT,
    "oasst_tree": chat.OASST_TREE,
    "alpaca": instruct.ALPACA,
    "prompt_completion": instruct.PROMPT_COMPLETION,
    "prompt_only": instruct.PROMPT_ONLY,
    "query_response": instruct.QUERY_RESPONSE,
    "text": instruct.TEXT,
    "custom": questions.CUSTOM,
    "qa_answer": questions.QA_ANSWER,
    "multiple_choice": questions.MULTIPLE_CHOICE,
    "theoremqa": questions.THEOREMQA,
    "verl": questions.VERL,
    "word_problem": word_problems.WORD_PROBLEM,
    "gsm8k": math.GSM8K,
    "gsm8k_socratic": math.GSM8K_SOCRATIC,
    "math_boxed": math.MATH_BOXED,
    "metamath": math.METAMATH,
    "mathinstruct": math.MATHINSTRUCT,
    "openmathinstruct": math.OPENMATHINSTRUCT,
    "tool_integrated": tools.TOOL_INTEGRATED,
    "mathdial": tutoring.MATHDIAL,
    "bridge": tutoring.BRIDGE,
    "mrbench": tutoring.MRBENCH,
    "socrateach": tutoring.SOCRATEACH,
    "comta": tutoring.COMTA,
    "dialog_history": tutoring.DIALOG_HISTORY,
    "cima": tutoring.CIMA,
    "reasoning_gym": procedural.REASONING_GYM,
}
