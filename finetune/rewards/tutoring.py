"""Rewards for a tutor's turn in a dialogue: each is 0 to 1, read from the dialogue and the data, without another model.

What they read: `prompts` (the dialogue so far; the student is the user), `answer`, `solution` (the reference), and in `meta`
(JSON) question, moves (the teacher's labelled moves, MathDial: one list a teacher turn) and strategy (the expert's, Bridge).
An empty turn earns 0 in each. Teacher moves are those of MathDial (arXiv 2305.14536): focus and probing guide the student, telling
states something, generic greets or praises.
"""

import json
import re
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

from finetune import answers
from finetune.rewards.arithmetic import equations, numbers

TRIES = 3
"""Student turns with work in them, the opening one included, after which the tutor may say the answer."""
FITTING_WORDS = 40
"""Words that a student reads without losing the thread: about 95 of 100 expert turns in MathDial and Bridge are no longer."""
TOO_MANY_WORDS = 120

STRATEGY_MOVES = {
    "ask_question": "probing", "simplify_question": "focus", "provide_hint": "focus", "provide_strategy": "focus",
    "provide_similar_problem": "probing", "provide_example": "telling", "explain_concept": "telling", "provide_correction": "telling",
    "provide_solution": "telling", "affirm_correct_answer": "generic", "encourage_student": "generic",
}
"""Bridge's strategies (arXiv 2310.10648) as teacher moves."""

_INVITES = re.compile(
    r"\?|\b(?:try|check|re-?check|explain|show|tell me|walk me|talk me|think|re-?read|re-?calculate|re-?do|look|have another|consider|"
    r"remember|go back|work out|write|draw|list|find|count|figure out|imagine|use|let'?s|let us|can you|could you|what|how|why|which)\b",
    re.I,
)
_AFFIRMS = re.compile(r"\b(?:yes|correct|right|well done|good|great|perfect|excellent|exactly|fantastic|brilliant|amazing|awesome|nice)\b", re.I)
_ASKS_FOR_WORK = re.compile(r"\b(?:your|you)\b.{0,40}\b(?:solution|answer|steps?|workings?|work|calculations?|reasoning|thinking|get|got|did)\b", re.I | re.S)
_FINAL = re.compile(r"\\boxed|####|\b(?:the|correct|final|right)\s+(?:final\s+)?answer\b[^.?!\n]{0,20}?\b(?:is|was|would be|should be)\b(?!\s*(?:not|incorrect|wrong)\b)|\banswer\s*[:=]", re.I)
_SENTENCE = re.compile(r"(?<=[.!?])\s+|\n+")
_WORD = re.compile(r"[a-z]{4,}")
_COMMON = frozenset(
    "that this with have from they what your when were will would could should there their them then than been each many much more most some "
    "about which into also only just like does said says make makes made need needs know want well good great answer solution question problem "
    "number numbers total find found first next last time times please think because where other these those right correct let's lets here over "
    "after before again still take takes took gave give gives used uses using left same equal equals step steps calculate calculated means".split()
)


@dataclass
class Turn:
    """A tutor's turn and what it answers."""

    said: str
    """The turn itself."""
    question: str
    student: list[str]
    """What the student has written so far, turn by turn, without the problem's own text."""
    tutor: list[str]
    """The tutor's earlier turns."""
    answer: str | None
    solution: str
    move: str | None
    """The expert's move at this place: focus, probing, telling or generic; None where the data has none."""

    @property
    def empty(self) -> bool:
        return is_empty(self.said)

    @property
    def known(self) -> frozenset[Fraction]:
        """Numbers that stood in the dialogue before."""
        return numbers("\n".join([self.question, *self.student, *self.tutor]))


def is_empty(text: str) -> bool:
    """Whether a text says nothing at all: no letter and no digit."""
    return not any(map(str.isalnum, text))


def turns(
    prompts: list[list[dict[str, str]]], completions: list[list[dict[str, str]]], answer: list[str | None] | None = None,
    solution: list[str] | None = None, meta: list[str] | None = None,
) -> list[Turn]:
    """Each completion with its dialogue."""
    found = []
    for index, (prompt, completion) in enumerate(zip(prompts, completions, strict=True)):
        facts = json.loads(meta[index]) if meta is not None else {}
        question = facts.get("question") or ""
        tutor = [message["content"] for message in prompt if message["role"] == "assistant"]
        student = [message["content"].replace(question, "", 1) if question else message["content"]
                   for message in prompt if message["role"] == "user"]
        moves = facts.get("moves", [])
        here = moves[len(tutor)] if len(tutor) < len(moves) else []
        move = here[0] if here else STRATEGY_MOVES.get(facts.get("strategy", ""))
        found.append(Turn(
            completion[-1]["content"], question, student, tutor, answer[index] if answer is not None else None,
            solution[index] if solution is not None else "", move,
        ))
    return found


def withholds_answer(
    prompts: list[list[dict[str, str]]], completions: list[list[dict[str, str]]], answer: list[str | None],
    meta: list[str] | None = None, **columns: Any,
) -> list[float]:
    """0.0 where the turn gives the answer away before the student has tried (TRIES turns), else 1.0.

    An answer that the student has found may be confirmed. A number that also stands in the problem counts only where it is
    called the answer.

    >>> prompt = [{"role": "user", "content": "Tom has 3 bags of 4 apples. How many?\\nMy solution: 3 + 4 = 7"}]
    >>> withholds_answer([prompt] * 2, [[{"role": "assistant", "content": text}] for text in
    ...                  ("The answer is 12.", "Each bag has 4. How much is in 2 bags?")], answer=["12", "12"])
    [0.0, 1.0]
    """
    return [float(not turn.empty and not gives_away(turn)) for turn in turns(prompts, completions, answer, meta=meta)]


def gives_away(turn: Turn) -> bool:
    """Whether the turn states the answer too early."""
    if turn.answer is None or sum(bool(numbers(text)) for text in turn.student) >= TRIES:
        return False
    if states(turn.said, turn.answer, numbers(turn.question)):
        return not any(states(text, turn.answer, numbers(turn.question)) for text in turn.student)
    return False


def states(text: str, answer: str, given: frozenset[Fraction]) -> bool:
    """Whether a text states the answer; where its number is `given` in the problem, only if it is called the answer."""
    gold = numbers(answer)
    if len(gold) == 1 and gold.isdisjoint(given):
        return not gold.isdisjoint(numbers(text))
    if _FINAL.search(text):
        extracted = answers.extract(text)
        if extracted is not None and answers.equal(answer, extracted):
            return True
    if len(gold) == 1 or len(answer.strip()) < 3:
        return False
    return re.sub(r"\W", "", answer).casefold() in re.sub(r"\W", "", text).casefold()


def asks(
    prompts: list[list[dict[str, str]]], completions: list[list[dict[str, str]]], answer: list[str | None] | None = None,
    meta: list[str] | None = None, **columns: Any,
) -> list[float]:
    """How well the turn asks rather than tells, by the teacher's move at this place.

    To guide (focus, probing, or no move known): 1.0 for a question or a task that leaves the computing to the student, 0.5 for a
    hint without one, or for one that also computes something; 0.0 for telling alone. Where the expert tells: 1.0 for telling one
    thing, 0.5 for asking still, 0.0 for a worked solution. Where the expert greets or praises: 1.0, or 0.5 when it tells.

    >>> prompt = [{"role": "user", "content": "Tom has 3 bags of 4 apples. How many?\\nMy solution: 3 + 4 = 7"}]
    >>> asks([prompt] * 3, [[{"role": "assistant", "content": text}] for text in
    ...      ("What does each bag hold?", "Each bag has 4.", "3 x 4 = 12, so he has 12.")])
    [1.0, 0.5, 0.0]
    """
    return [asking(turn) for turn in turns(prompts, completions, answer, meta=meta)]


def asking(turn: Turn) -> float:
    """The grade of `asks` for one turn."""
    if turn.empty:
        return 0.0
    invites = bool(_INVITES.search(turn.said))
    computed = len({equation.right for equation in equations(turn.said)} - turn.known)
    new = numbers(turn.said) - turn.known
    tells = computed > 0 or (bool(new) and "?" not in turn.said) or bool(_FINAL.search(turn.said))
    if turn.move == "telling":
        return 0.0 if computed > 1 else 0.5 if "?" in turn.said and not tells else 1.0
    if turn.move == "generic":
        return 0.5 if tells else 1.0
    return (0.5 if computed <= 1 else 0.0) if invites and tells else 1.0 if invites else 0.0 if tells else 0.5


def addresses_error(
    prompts: list[list[dict[str, str]]], completions: list[list[dict[str, str]]], answer: list[str | None] | None = None,
    solution: list[str] | None = None, meta: list[str] | None = None, **columns: Any,
) -> list[float]:
    """How closely the turn takes up what the student got wrong.

    1.0 where it names a number or two words of the wrong step (see `wrong_step`; without one, of the student's last turn), or
    confirms a right answer, or opens by asking for the student's work; 0.5 where it only stays with the problem; else 0.0.

    >>> prompt = [{"role": "user", "content": "Tom has 3 bags of 4 apples. He eats 2. How many?\\nMy solution: 3 * 4 = 14. 14 - 2 = 12."}]
    >>> addresses_error([prompt] * 3, [[{"role": "assistant", "content": text}] for text in
    ...                 ("Is 3 * 4 really 14?", "How many apples and bags are there?", "Do you like rain?")],
    ...                 meta=['{"question": "Tom has 3 bags of 4 apples. He eats 2. How many?"}'] * 3)
    [1.0, 0.5, 0.0]
    """
    found = turns(prompts, completions, answer, solution, meta)
    solved = answers.verify([(turn.answer, answers.extract("".join(turn.student[-1:]))) for turn in found])
    return [addressing(turn, right) for turn, right in zip(found, solved, strict=True)]


def addressing(turn: Turn, solved: bool) -> float:
    """The grade of `addresses_error` for one turn; `solved`: the student's last turn ends in the answer."""
    if turn.empty or not turn.student:
        return 0.0
    asks_for_work = bool(_ASKS_FOR_WORK.search(turn.said))
    if solved and _AFFIRMS.search(turn.said) or asks_for_work and not turn.tutor:
        return 1.0
    if not solved and shares(turn.said, wrong_step(turn) or turn.student[-1]):
        return 1.0
    return 0.5 * (asks_for_work or shares(turn.said, "\n".join([turn.question, *turn.student, *turn.tutor[-1:]])))


def wrong_step(turn: Turn) -> str | None:
    """The sentence of the student's in which it goes wrong, the latest turn first: an equation that does not hold, else the
    first number that neither the problem nor the reference solution has. None where there is none to be found."""
    right = numbers("\n".join([turn.question, turn.solution, turn.answer or ""]))
    for text in reversed(turn.student):
        sentences = [sentence for sentence in _SENTENCE.split(text) if sentence.strip()]
        for sentence in sentences:
            if any(not equation.holds for equation in equations(sentence)):
                return sentence
        for sentence in sentences:
            if turn.solution and not numbers(sentence) <= right:
                return sentence
    return None


def shares(said: str, text: str) -> bool:
    """Whether `said` takes up a number, or two words that carry meaning, of `text`."""
    if not numbers(said).isdisjoint(numbers(text)):
        return True
    return len(content(said) & content(text)) >= 2


def content(text: str) -> set[str]:
    """The words of four letters and more that carry meaning, without a plural s."""
    return {word.rstrip("s") for word in _WORD.findall(text.casefold()) if word not in _COMMON}


def one_question(completions: list[list[dict[str, str]]], **columns: Any) -> list[float]:
    """1.0 for one question, 1/n for n of them, 0.5 for none: a student can answer one at a time.

    >>> one_question([[{"role": "assistant", "content": text}] for text in ("Why 7?", "Well done!", "Why? How? And what is 3 x 4?")])
    [1.0, 0.5, 0.3333333333333333]
    """
    texts = [completion[-1]["content"] for completion in completions]
    counts = [len(re.findall(r"\?+", text)) for text in texts]
    return [
        0.0 if is_empty(text) else 1.0 / count if count else 0.5 for text, count in zip(texts, counts, strict=True)
    ]


def fits_student(completions: list[list[dict[str, str]]], **columns: Any) -> list[float]:
    """1.0 up to FITTING_WORDS words, falling evenly to 0.0 at TOO_MANY_WORDS.

    >>> fits_student([[{"role": "assistant", "content": "word " * count}] for count in (0, 10, 80, 200)])
    [0.0, 1.0, 0.5, 0.0]
    """
    texts = [completion[-1]["content"] for completion in completions]
    spare = [(TOO_MANY_WORDS - len(text.split())) / (TOO_MANY_WORDS - FITTING_WORDS) for text in texts]
    return [0.0 if is_empty(text) else min(1.0, max(0.0, share)) for text, share in zip(texts, spare, strict=True)]


def tells_correctly(
    prompts: list[list[dict[str, str]]], completions: list[list[dict[str, str]]], answer: list[str | None], **columns: Any
) -> list[float]:
    """1.0 where what the turn tells is right: each equation holds, and what it calls the answer is the answer. Else 0.0.

    A turn that tells nothing tells nothing wrong.

    >>> prompt = [{"role": "user", "content": "Tom has 3 bags of 4 apples. How many?"}]
    >>> tells_correctly([prompt] * 3, [[{"role": "assistant", "content": text}] for text in
    ...                 ("3 x 4 = 12.", "3 x 4 = 14.", "The answer is 14.")], answer=["12"] * 3)
    [1.0, 0.0, 0.0]
    """
    return [float(not turn.empty and tells_right(turn)) for turn in turns(prompts, completions, answer)]


def tells_right(turn: Turn) -> bool:
    """Whether nothing that the turn states is false; a question ("Is 4 + 5 = 12?") states nothing."""
    stated = "\n".join(sentence for sentence in _SENTENCE.split(turn.said) if not sentence.endswith("?"))
    if any(not equation.holds for equation in equations(stated)):
        return False
    if turn.answer is None or not _FINAL.search(stated):
        return True
    extracted = answers.extract(stated)
    return extracted is None or answers.equal(turn.answer, extracted)
