"""Tutoring dialogues. The student is the user, the teacher the assistant; moves and notes stay in meta."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

from .adapter import Adapter, Context, Record, Row, example, has, is_text, pick
from .dialogue import ROLES as SPEAKERS
from .dialogue import clean_text
from .errors import SkipRow
from .example import Example, Message
from .gold import clean_number, is_sentinel, type_of

ROLE = "You are a maths tutor. Help the student find the mistake and the answer by themselves; do not give the answer away."
_MOVE = re.compile(r"\s*\((focus|probing|telling|generic)\)\s*", re.IGNORECASE)


def tutor_prompt(*facts: tuple[str, str], role: str = ROLE) -> Message:
    """The tutor's system turn: its role, then what it knows, a line each; blank facts are left out."""
    lines = [role, *(f"{name}: {text.strip()}" for name, text in facts if text.strip())]
    return {"role": "system", "content": "\n".join(lines)}


def _ground_truth(context: Context, text: str) -> tuple[str, str]:
    return ("Reference solution", text if context.options.ground_truth_in_system else "")


def _final_line(text: str) -> tuple[str | None, str]:
    """(answer, solution) of a reference solution whose last line is a number; (None, text) when it is not."""
    solution, _, last = text.rstrip().rpartition("\n")
    answer = clean_number(last)
    if answer is not None and type_of(answer) == "number":
        return answer, solution.strip()
    return None, text.strip()


def mathdial(row: Row, context: Context) -> Example:
    """MathDial (eth-nlped/mathdial): a question, a student's wrong solution, and the talk "Teacher:
    (move)..|EOM|Student: ..".

    System: the problem, the teacher's note on the confusion and the student's profile. First user turn: the problem and
    the student's solution. Teacher -> assistant, any other speaker (students go by name in some rows) -> user. Moves
    stand in meta["moves"]. The answer is the last line of ground_truth.
    """
    texts = {
        name: _real_newlines(context.text(row, name), context) for name in ("question", "ground_truth", "conversation")
    }
    question, truth = texts["question"].strip(), texts["ground_truth"]
    attempt = _real_newlines(context.text(row, "student_incorrect_solution", required=False), context).strip()
    turns: list[Message] = [
        tutor_prompt(
            ("Problem", question),
            _ground_truth(context, truth),
            ("The student's confusion", context.text(row, "teacher_described_confusion", required=False)),
            ("The student", context.text(row, "student_profile", required=False)),
        ),
        {"role": "user", "content": f"{question}\n\nMy solution:\n{attempt}" if attempt else question},
    ]
    for part in texts["conversation"].split("|EOM|"):
        speaker, colon, said = part.partition(":")
        if not colon or len(speaker) > 40:
            raise SkipRow("a turn of the conversation names no speaker")
        if speaker.strip().casefold() == "teacher":
            move = _MOVE.match(said)
            moves = [move[1].casefold()] if move else []
            turns.append({"role": "assistant", "content": said[move.end() if move else 0 :].strip(), "moves": moves})
        else:
            turns.append({"role": "user", "content": said.strip()})
    answer, solution = _final_line(truth)
    meta = {
        "question": question,
        **pick(row, "qid", "scenario", "self-correctness", "self-typical-confusion", "self-typical-interactions"),
    }
    return example(context.dialogue(turns), answer=answer, solution=solution, meta=meta)


def _real_newlines(text: str, context: Context) -> str:
    if "\\n" not in text:
        return text
    context.changes[r"the two characters \n written as a newline"] += 1
    return text.replace("\\n", "\n")


def _fits_mathdial(row: Row) -> str | None:
    if is_text(row, "conversation", "question", "ground_truth", "student_incorrect_solution"):
        return "columns conversation, question, ground_truth and student_incorrect_solution"
    return None


def bridge(row: Row, context: Context) -> Example:
    """Bridge (rosewang2008/bridge): history c_h, novice reply c_r, the expert's revision c_r_, and e, z_what, z_why.

    Only the expert's revision is learnt. meta: error, strategy, intention (labels or free text), rejected (the novice's
    reply). A student's silent last turn is written out, so that the revision keeps its place.
    """
    topic = context.text(row, "lesson_topic", required=False).strip()
    history = [_spoken(turn) for turn in context.listed(row, "c_h")]
    if history and history[-1]["role"] == "user" and not history[-1]["content"].strip():
        history[-1]["content"] = "(no reply)"
        context.changes["silent student turn written out"] += 1
    revision = [_spoken(turn) for turn in context.listed(row, "c_r_")]
    if not any(turn["content"].strip() for turn in revision):
        raise SkipRow("no expert revision")
    notes = {"error": "e", "strategy": "z_what", "intention": "z_why"}
    meta: dict[str, Any] = {name: context.text(row, column, required=False) for name, column in notes.items()}
    meta["rejected"] = "\n".join(_spoken(turn)["content"] for turn in context.listed(row, "c_r"))
    meta["question"] = "\n".join([topic, *(turn["content"] for turn in history)])
    meta.update(pick(row, "lesson_topic"), id=row.get("c_id"))
    system = tutor_prompt(
        ("Lesson", topic),
        ("The student's error", meta["error"]),
        ("Strategy", meta["strategy"]),
        ("Intention", meta["intention"]),
    )
    turns = [system, *_opened(history, topic), *({**turn, "train": False} for turn in history), *revision]
    return example(context.dialogue(turns), meta=meta)


def _opened(history: list[Message], topic: str) -> list[Message]:
    """The user turn that opens a dialogue whose history begins with the tutor."""
    first = next((turn for turn in history if turn["content"].strip()), None)
    if first is None or first["role"] == "assistant":
        return [{"role": "user", "content": f"I need help with {topic}." if topic else "I need help."}]
    return []


def _spoken(turn: Any) -> Message:
    """{user: who speaks, text} as a turn."""
    if (
        not isinstance(turn, dict)
        or not isinstance(turn.get("user"), str)
        or not isinstance(turn.get("text"), (str, type(None)))
    ):
        raise SkipRow("a turn without a speaker (user) and a text")
    return {"role": _role(turn["user"]), "content": turn["text"] or ""}


def _role(speaker: str) -> str:
    """user or assistant for the names files give to student and teacher; another name as it is, to be refused later."""
    name = speaker.strip().casefold()
    return SPEAKERS.get(name, name)


def _fits_bridge(row: Row) -> str | None:
    return "columns c_h and c_r_" if has(row, "c_h", "c_r_") else None


_SPEAKER = re.compile(r"(?:\A|\n)\s*(Tutor|Teacher|Student)\s*:\s*")
_ASKED = re.compile(r"The question is:\s*(.+)", re.DOTALL)


def mrbench(row: Row, context: Context) -> Example:
    """MRBench (UnifyingAITutorEvaluation), v2 and v3: a history as text, and replies of several tutors with
    annotations.

    The Expert's reply is the only turn learnt; the others stand in meta["responses"] with their annotations. "Not
    Available" means none. The answer is the last line of the reference solution when that is a number.
    """
    history = context.text(row, "conversation_history").replace("\u00a0", " ")
    pieces = _SPEAKER.split(history)
    if len(pieces) < 3 or pieces[0].strip():
        raise SkipRow("conversation_history names no speakers")
    spoken: list[Message] = [
        {"role": _role(speaker), "content": said.strip(), "train": False}
        for speaker, said in zip(pieces[1::2], pieces[2::2], strict=True)
    ]
    column = "tutor_responses" if "tutor_responses" in row else "anno_llm_responses"
    replies = row.get(column)
    if not isinstance(replies, dict) or not all(isinstance(reply, dict) for reply in replies.values()):
        raise SkipRow(f"{column} is no object of replies")
    expert = replies.get("Expert")
    if expert is None:
        raise SkipRow("no reply by Expert")
    facts = {name: context.text(row, name, required=False) for name in ("Topic", "Ground_Truth_Solution")}
    topic, truth = ("" if is_sentinel(text) else text.strip() for text in facts.values())
    answer, solution = _final_line(truth)
    asked = _ASKED.search(spoken[0]["content"])
    meta: dict[str, Any] = pick(row, "Data", "Split", "Topic")
    meta["id"] = row.get("conversation_id")
    meta["question"] = asked[1].strip() if asked else "\n".join([topic, *(turn["content"] for turn in spoken)])
    meta["responses"] = [{"tutor": name, **reply} for name, reply in replies.items()]
    system = tutor_prompt(("Lesson", topic), _ground_truth(context, truth))
    turns = [
        system,
        *_opened(spoken, topic or "this problem"),
        *spoken,
        {"role": "assistant", "content": expert.get("response")},
    ]
    return example(context.dialogue(turns), answer=answer, solution=solution, meta=meta)


def _fits_mrbench(row: Row) -> str | None:
    if is_text(row, "conversation_history") and ("anno_llm_responses" in row or "tutor_responses" in row):
        return "columns conversation_history and " + (
            "tutor_responses" if "tutor_responses" in row else "anno_llm_responses"
        )
    return None


def socrateach_dialogues(records: Iterator[Record]) -> Iterator[Record]:
    """A SocraTeach problem holds many dialogues: one record for each."""
    for record in records:
        dialogues = record.row.get("dialogues")
        if not isinstance(dialogues, dict):
            yield record
            continue
        for name, turns in dialogues.items():
            yield record._replace(row={**record.row, "dialogues": None, "dialogue": turns, "id": name})


def socrateach(row: Row, context: Context) -> Example:
    """SocraTeach. multi: question, analysis, answer, steps, dialogues of {system: the TEACHER, user: the student}; END
    closes.

    single: prompt, response, history of [teacher, student] pairs; only the response is learnt.
    """
    if "dialogue" in row:
        question = context.text(row, "question")
        analysis = context.text(row, "analysis", required=False)
        turns = [
            tutor_prompt(("Problem", question), _ground_truth(context, analysis)),
            {"role": "user", "content": question},
        ]
        kinds = []
        for turn in context.listed(row, "dialogue"):
            if not isinstance(turn, dict):
                raise SkipRow("a turn of the dialogue is no object")
            turns.append({"role": "assistant", "content": turn.get("system", turn.get("END"))})
            if "user" in turn:
                turns.append({"role": "user", "content": turn["user"]})
                kinds.append(str(turn.get("user_type")))
        answer = clean_number(context.text(row, "answer", required=False))
        meta = {"question": question, "user_types": kinds}
        return example(context.dialogue(turns), answer=answer, solution=analysis, meta=meta)
    pairs = context.listed(row, "history")
    turns = [tutor_prompt(), *([{"role": "user", "content": "I need help."}] if pairs else [])]
    if not all(isinstance(pair, list) and len(pair) == 2 for pair in pairs):
        raise SkipRow("history is no list of [teacher, student] pairs")
    for teacher, student in pairs:
        turns += [{"role": "assistant", "content": teacher, "train": False}, {"role": "user", "content": student}]
    turns += [
        {"role": "user", "content": context.text(row, "prompt")},
        {"role": "assistant", "content": context.text(row, "response")},
    ]
    kind, _, problem = str(row.get("id", "")).partition("#")
    return example(context.dialogue(turns), meta={"student_reply": kind, "problem_id": problem} if problem else {})


def _fits_socrateach(row: Row) -> str | None:
    if "question" in row and isinstance(row.get("dialogues"), dict):
        return "columns question and dialogues"
    if has(row, "prompt", "response", "history") and "#" in str(row.get("id")):
        return "columns prompt, response and history, keyed by kind#problem"
    return None


def comta(row: Row, context: Context) -> Example:
    """CoMTA (Khan Academy): data [{role, content}], expected_result, math_level, test_id. Evaluation prompts only.

    Its licence forbids training: no turn is learnt, trailing tutor turns are cut, and meta["evaluation_only"] is True.
    """
    turns = context.listed(row, "data")
    while turns and isinstance(turns[-1], dict) and str(turns[-1].get("role")).strip().casefold() == "assistant":
        turns = turns[:-1]
        context.changes["trailing assistant turn removed"] += 1
    turns = [{**turn, "train": False} if isinstance(turn, dict) else turn for turn in turns]
    meta = {"evaluation_only": True, "id": row.get("test_id"), **pick(row, "expected_result", "math_level")}
    return example(context.dialogue(turns, prompt_only=True), meta=meta)


def _fits_comta(row: Row) -> str | None:
    return "columns data, expected_result and math_level" if has(row, "data", "expected_result", "math_level") else None


def dialog_history(row: Row, context: Context) -> Example:
    """MathTutorBench: problem (may be ""), topic, reference_solution, dialog_history [{text, user}]."""
    facts = {name: context.text(row, name, required=False) for name in ("problem", "topic", "reference_solution")}
    problem, topic, truth = ("" if is_sentinel(text) else text.strip() for text in facts.values())
    spoken = [_spoken(turn) for turn in context.listed(row, "dialog_history")]
    answer, solution = _final_line(truth)
    system = tutor_prompt(("Lesson", topic), ("Problem", problem), _ground_truth(context, truth))
    opening = [{"role": "user", "content": problem}] if problem else _opened(spoken, topic)
    meta = {"question": problem or "\n".join([topic, *(turn["content"] for turn in spoken[:-1])]), "topic": topic}
    return example(context.dialogue([system, *opening, *spoken]), answer=answer, solution=solution, meta=meta)


def _fits_dialog_history(row: Row) -> str | None:
    return "column dialog_history" if isinstance(row.get("dialog_history"), list) else None


def cima_replies(records: Iterator[Record]) -> Iterator[Record]:
    """A CIMA row holds several tutors' replies to one talk: one record for each."""
    for record in records:
        replies, actions = record.row.get("tutorResponses"), record.row.get("tutorActions")
        if not isinstance(replies, list) or not replies:
            yield record
            continue
        for place, reply in enumerate(replies):
            action = actions[place] if isinstance(actions, list) and place < len(actions) else None
            row = {
                **record.row,
                "reply": reply,
                "action": action,
                "id": f"{record.row.get('id', record.number)}:{place}",
            }
            yield record._replace(row=row)


def cima(row: Row, context: Context) -> Example:
    """CIMA (kstats/CIMA), Italian: past_convo alternates tutor and student, the tutor first; each tutor's reply is a
    target.

    Only the reply is learnt. meta["actions"] holds its five flags as the file has them. The words to be used are the
    ground truth.
    """
    past = context.listed(row, "past_convo")
    if not isinstance(row.get("reply"), str):
        raise SkipRow("no tutor reply")
    words = "; ".join(
        f"{row[english]} = {row[italian]}"
        for english, italian in (("engPrep", "prep"), ("engObj", "obj"), ("engColor", "color"))
        if is_text(row, english, italian)
    )
    truth = ("Vocabulary", words if context.options.ground_truth_in_system else "")
    system = tutor_prompt(truth, role="You are a tutor of Italian. Help the student find the words by themselves.")
    spoken = [
        {"role": "user" if place % 2 else "assistant", "content": said, "train": False}
        for place, said in enumerate(past)
    ]
    turns = [
        system,
        {"role": "user", "content": "I am ready."},
        *spoken,
        {"role": "assistant", "content": row["reply"]},
    ]
    meta = {"question": clean_text("\n".join(map(str, past)), context.changes), **pick(row, "id")}
    if row.get("action") is not None:
        meta["actions"] = row["action"]
    return example(context.dialogue(turns), meta=meta)


def _fits_cima(row: Row) -> str | None:
    return "columns past_convo and tutorResponses" if has(row, "past_convo", "tutorResponses") else None


MATHDIAL = Adapter(
    mathdial,
    _fits_mathdial,
    (
        "question",
        "ground_truth",
        "conversation",
        "student_incorrect_solution",
        "student_profile",
        "teacher_described_confusion",
    ),
    ("question", "ground_truth", "conversation"),
    rank=3,
)
BRIDGE = Adapter(
    bridge, _fits_bridge, ("c_h", "c_r", "c_r_", "lesson_topic", "e", "z_what", "z_why"), ("c_h", "c_r_"), rank=3
)
MRBENCH = Adapter(
    mrbench,
    _fits_mrbench,
    ("conversation_history", "tutor_responses", "anno_llm_responses", "Ground_Truth_Solution", "Topic"),
    ("conversation_history", "tutor_responses"),
    rank=3,
    note="MRBench is made of MathDial and Bridge test dialogues: use it for evaluation",
)
SOCRATEACH = Adapter(
    socrateach,
    _fits_socrateach,
    ("question", "analysis", "answer", "dialogues", "prompt", "response", "history"),
    ("question", "dialogues"),
    rank=3,
    expand=socrateach_dialogues,
)
COMTA = Adapter(
    comta,
    _fits_comta,
    ("data", "expected_result", "math_level"),
    ("data",),
    rank=3,
    note="CoMTA's licence forbids training: these are evaluation prompts only",
)
DIALOG_HISTORY = Adapter(
    dialog_history,
    _fits_dialog_history,
    ("problem", "topic", "reference_solution", "dialog_history"),
    ("dialog_history",),
    rank=3,
)
CIMA = Adapter(
    cima, _fits_cima, ("past_convo", "tutorResponses"), ("past_convo", "tutorResponses"), rank=3, expand=cima_replies
)
