"""The canonical form of a dialogue, and what is counted on the way."""

from __future__ import annotations

from collections import Counter

import pytest

from data_formats.dialogue import canonical
from data_formats.errors import SkipRow


def turns(*pairs):
    names = {"s": "system", "u": "user", "a": "assistant", "t": "tool"}
    return [{"role": names.get(role, role), "content": content} for role, content in pairs]


def run(raw, **options):
    changes: Counter[str] = Counter()
    messages = canonical(raw, changes, opening="Hello.", **options)
    return [(m["role"][0], m["content"]) for m in messages], dict(changes)


CASES = [
    # raw, canonical, changes
    ([("u", "a"), ("a", "b")], [("u", "a"), ("a", "b")], {}),
    ([("a", "b")], [("u", "Hello."), ("a", "b")], {"opening user turn added": 1}),
    ([("s", "x"), ("a", "b")], [("s", "x"), ("u", "Hello."), ("a", "b")], {"opening user turn added": 1}),
    ([("u", "a"), ("u", "b"), ("a", "c")], [("u", "a\nb"), ("a", "c")], {"user turns in a row merged": 1}),
    ([("u", "a"), ("a", "b"), ("a", "c")], [("u", "a"), ("a", "b\nc")], {"assistant turns in a row merged": 1}),
    ([("u", "a"), ("a", " \n"), ("a", "c")], [("u", "a"), ("a", "c")], {"empty turn removed": 1}),
    ([("u", "a"), ("a", None), ("a", "c")], [("u", "a"), ("a", "c")], {"empty turn removed": 1}),
    ([("u", "a"), ("a", "b"), ("u", "c")], [("u", "a"), ("a", "b")], {"trailing user turn removed": 1}),
    (
        [("s", "x"), ("s", "y"), ("u", "a"), ("a", "b")],
        [("s", "x\n\ny"), ("u", "a"), ("a", "b")],
        {"system turns merged": 1},
    ),
    (
        [("u", "a"), ("s", "x"), ("a", "b")],
        [("s", "x"), ("u", "a"), ("a", "b")],
        {"late system turn moved to the front": 1},
    ),
    ([(" USER", "a"), ("Assistant ", "b")], [("u", "a"), ("a", "b")], {"role's case or blanks put right": 2}),
    ([("student", "a"), ("tutor", "b")], [("u", "a"), ("a", "b")], {"role renamed": 2}),
    (
        [("u", "a"), ("a", "call"), ("t", "1"), ("t", "2"), ("a", "b")],
        [("u", "a"), ("a", "call"), ("t", "1"), ("t", "2"), ("a", "b")],
        {},
    ),
    ([("u", "a"), ("a", "call"), ("t", "1")], [("u", "a"), ("a", "call")], {"trailing tool turn removed": 1}),
    ([("u", "a\r\nb"), ("a", "c")], [("u", "a\nb"), ("a", "c")], {"CRLF line ends written as LF": 1}),
]


@pytest.mark.parametrize("raw, expected, changes", CASES)
def test_canonical(raw, expected, changes):
    assert run(turns(*raw)) == (expected, changes)


@pytest.mark.parametrize(
    "raw, reason",
    [
        ([], "messages is an empty list"),
        (None, "messages is null"),
        ("user: hi", "messages is plain text"),
        ("[{'role': oops", "neither JSON nor a Python literal"),
        ({"role": "user"}, "messages is an object"),
        (["hi"], "a turn is text"),
        ([{"content": "x"}], "a turn has no role"),
        (turns(("hummany", "x")), "unknown role 'hummany', nearest is 'human'"),
        (turns(("u", "x")), "no assistant turn to learn from"),
        (turns(("u", ""), ("a", "b")), "the user's first turn is empty"),
        (turns(("u", ""), ("a", "")), "no turn with any text"),
        (turns(("u", "x"), ("t", "1"), ("a", "b")), "a tool turn without a call before it"),
        (
            turns(("u", "x"), ("a", "c"), ("t", "1"), ("u", "b"), ("a", "d")),
            "a tool turn without an assistant turn after it",
        ),
        (turns(("u", 5), ("a", "b")), "a turn's content is a number"),
        (turns(("u", [{"type": "image_url"}]), ("a", "b")), "a content part of type 'image_url'"),
        ([{"role": "user", "content": "x"}, {"role": "assistant", "content": "y", "weight": 0.5}], "weight is 0.5"),
    ],
)
def test_set_aside(raw, reason):
    with pytest.raises(SkipRow) as caught:
        run(raw)
    assert reason in caught.value.reason


def test_prompt_only_keeps_the_last_user_turn():
    assert run(turns(("u", "a"), ("a", "b"), ("u", "c")), prompt_only=True)[0][-1] == ("u", "c")


@pytest.mark.parametrize(
    "mark", [{"train": False}, {"loss": False}, {"weight": 0}, {"loss_weight": 0.0}, {"train": "false"}]
)
def test_marks_of_turns_not_to_learn(mark):
    messages = canonical(
        [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b", **mark}], Counter(), opening="x"
    )
    assert messages[1]["train"] is False


def test_merged_turns_are_learnt_only_when_all_parts_are():
    raw = [*turns(("u", "a"), ("a", "b")), {"role": "assistant", "content": "c", "train": False}]
    changes: Counter[str] = Counter()
    assert canonical(raw, changes, opening="x")[1]["train"] is False
    assert changes["merged turn not learnt: one part was marked so"] == 1


def test_declared_roles():
    messages = canonical(
        turns(("Schüler", "a"), ("Lehrer", "b")),
        Counter(),
        opening="x",
        roles={"schüler": "user", "LEHRER": "assistant"},
    )
    assert [m["role"] for m in messages] == ["user", "assistant"]


def test_content_parts_and_tool_calls():
    call = {"id": "1", "type": "function", "function": {"name": "python", "arguments": '{"code": "1+1"}'}}
    raw = [
        {"role": "user", "content": [{"type": "text", "text": "1+"}, {"type": "text", "value": "1?"}]},
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "content": "2"},
        {"role": "assistant", "content": "2"},
    ]
    messages, changes = run(raw)
    assert messages[0] == ("u", "1+1?") and changes == {"content parts joined": 1}
    assert messages[1][1] == '<tool_call>\n{"name": "python", "arguments": {"code": "1+1"}}\n</tool_call>'
