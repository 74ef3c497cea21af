"""Extraction, equality, and what hostile or broken answers do to them.

`answers_cases.json` holds hand-labelled [gold, answer, verdict] cases by kind. The answers come from what models and people write; each
verdict was decided by hand from the rules in `equal`'s docstring.
"""

import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

import finetune
from finetune.answers import equal, extract, parseable, verify

DATA = Path(os.environ.get("FINETUNE_SHARED", Path(__file__).resolve().parents[2] / "shared")) / "data"
ROOT = Path(next(iter(finetune.__path__))).parent
CASES: dict[str, list[tuple[str, str, bool]]] = json.loads(Path(__file__).with_name("answers_cases.json").read_text("utf-8"))
FLAT = [(kind, *case) for kind, cases in CASES.items() for case in cases]


# The rows of ToRA-70B's first 200 outputs on GSM8K whose final answer differs from the gold one, read one by one.
WRONG_IN_TORA = {
    8, 12, 13, 19, 20, 46, 62, 74, 75, 89, 93, 97, 99, 102, 116, 119, 122, 125, 146, 147, 148, 153, 154, 157, 162, 167, 182, 184, 193, 199,
}  # fmt: skip


@pytest.mark.parametrize(("kind", "gold", "answer", "verdict"), FLAT)
def test_labelled_case(kind: str, gold: str, answer: str, verdict: bool) -> None:
    assert equal(gold, answer) is verdict


def test_labelled_cases_are_enough_and_of_both_verdicts() -> None:
    assert len(FLAT) >= 300 and len(set(FLAT)) == len(FLAT)
    assert 0.3 < sum(verdict for *_, verdict in FLAT) / len(FLAT) < 0.7


@pytest.mark.skipif(not DATA.is_dir(), reason="../shared/data is absent")
def test_real_outputs_of_tora() -> None:
    rows = [json.loads(line) for line in (DATA / "tora" / "tora70b_gsm8k_outputs_200.jsonl").read_text("utf-8").splitlines()]
    verdicts = verify([(row["gt"], extract(row["code"][0])) for row in rows])
    assert len(rows) == 200
    assert {row["idx"] for row, verdict in zip(rows, verdicts, strict=True) if not verdict} == WRONG_IN_TORA


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        (r"First $\boxed{3}$, then finally $\boxed{\frac{1}{\sqrt{2}}}$.", r"\frac{1}{\sqrt{2}}"),
        (r"our answer is $\boxed 2$.", "2"),
        (r"so \fbox{7}", "7"),
        (r"$\boxed{12\text{ cm}^2}$", r"12\text{ cm}^2"),
        (r"$\boxed{\{1,2\}}$", r"\{1,2\}"),
        (r"$\boxed{\frac{1}{2}$", None),
        (r"$\boxed{5}$ and again $\boxed{\frac{1}{2}$", "5"),
        (r"$\boxed{}$", None),
        (r"\boxed{1} and \boxed{2}", "1, 2"),
        (r"\boxed{1}, so now \boxed{2}", "2"),
        (r"#### 3" + "\n#### 4", "4"),
        ("...\n####-5", "-5"),
        ("#### $18.00", "$18.00"),
        ("#### Step 1: add\nThe sum is 1,234.", "1,234"),
        ("... #### 18\nThe answer is: 18", "18"),
        ("The answer is 5. No: the answer is 6.", "6"),
        ("The final answer is $28 \\%$. I hope it is correct. Note: 7 days.", "$28 \\%$"),
        ("**Final Answer:** 42", "42"),
        ("Therefore the answer is (B) 15.", "B"),
        ("The answer is correct because 2 + 2 = 4", "4"),
        ("答案是18。", "18"),
        ("答案：3/4", "3/4"),
        ("综上，故选：C", "C"),
        ("```python\nprint(7)\n```\n```output\n6\n7\n```\n", "7"),
        ("She has 16 - 3 - 4 = 9 eggs and earns 9 * 2 = $1,018", "$1,018"),
        ("so the fraction is $\\frac{1}{2}$.", "$\\frac{1}{2}$"),
        ("It rose by 12.5%.", "12.5%"),
        ("5 cm", "5 cm"),
        ("[0,1)", "[0,1)"),
        ("(B)", "(B)"),
        ("<think>it is \\boxed{4}</think>\n\\boxed{5}", "5"),
        ("<think>it is \\boxed{4}</think>\n", "4"),
        ("I do not know.", None),
        ("", None),
        (None, None),
    ],
)
def test_extract(text: str | None, answer: str | None) -> None:
    assert extract(text) == answer


@pytest.mark.parametrize(
    ("gold", "answer", "kind", "verdict"),
    [
        ("[1, 2]", "(1, 2)", "list", True),
        ("[1, 2]", "(1, 2)", None, False),
        ("[1, 2]", "(2, 1)", "list", False),
        ("ABE", "A, B, E", "choice", True),
        ("ABE", "A, B", "choice", False),
        ("b", "(B)", "choice", True),
        ("True", "1", "bool", True),
        ("True", "0", "bool", False),
        ("18", "18.0", "number", True),
    ],
)
def test_answer_type(gold: str, answer: str, kind: str | None, verdict: bool) -> None:
    assert equal(gold, answer, kind) is verdict


def test_unknown_answer_type_is_refused() -> None:
    with pytest.raises(ValueError, match="'latx'; expected one of number, latex"):
        equal("1", "1", "latx")
    with pytest.raises(ValueError, match="1 entries for 2 pairs"):
        verify([("1", "1"), ("2", "2")], answer_types=["number"])


@pytest.mark.parametrize("gold", ["", " ", "proof", "notfound", "Proof", r"\boxed{}", r"\frac{1}{2", "}{", None])
def test_ungradable_gold_earns_nothing(gold: str | None) -> None:
    assert not parseable(gold)
    assert not equal(gold, gold) and not equal(gold, "0")


@pytest.mark.parametrize("gold", ["5", r"\text{Evelyn}", "(1,2]", r"\{1,2\}", "x=5", "True", "答案", r"\begin{pmatrix}1\\2\end{pmatrix}"])
def test_gradable_gold_equals_itself(gold: str) -> None:
    assert parseable(gold) and equal(gold, gold)


def test_missing_prediction_is_wrong() -> None:
    assert not equal("5", None) and not equal("5", "")


def _golds() -> Iterator[tuple[str, list[str]]]:
    def lines(name: str) -> list[dict]:
        return [json.loads(line) for line in (DATA / name).read_text("utf-8").split("\n") if line.strip()]

    yield "gsm8k", [extract(row["answer"]) or "" for name in ("train", "test") for row in lines(f"gsm8k/{name}.jsonl")]
    yield "math500", [row["answer"] for row in lines("math/math500_test.jsonl")]
    yield "math", [row["answer"] for row in json.loads((DATA / "math/train_answers_only_7474.json").read_text("utf-8")) if row["answer"]]
    yield "svamp", [str(row["Answer"]) for row in json.loads((DATA / "svamp/SVAMP.json").read_text("utf-8"))]
    yield "cmath", [row["golden"] for row in lines("deepseek_math_eval/cmath_test.jsonl")]
    yield "mgsm_zh", [row["answer"] for row in lines("deepseek_math_eval/mgsm_zh.jsonl")]
    yield "theoremqa", [str(row["Answer"]) for row in json.loads((DATA / "theoremqa/theoremqa_test.json").read_text("utf-8"))]
    yield "aqua", [row["correct"] for row in lines("aqua/test.json")]


# Neighbours in the files that are written differently and are equal all the same, each looked at.
EQUAL_NEIGHBOURS = {
    ("5", "x=5"), ("8", "K=8"), ("25\\%", "25"), ("120", "120^\\circ"), ("21\\text{ dogs}", "21"), ("18 \\text{ degrees}", "18"),
    ("0.0", "0"),
}  # fmt: skip


@pytest.mark.slow
@pytest.mark.skipif(not DATA.is_dir(), reason="../shared/data is absent")
def test_every_gold_equals_itself_and_not_its_neighbour() -> None:
    for name, golds in _golds():
        assert all(map(parseable, golds)), name
        assert all(verify([(gold, gold) for gold in golds])), name
        # written otherwise, so that the comparison has to parse them
        assert [gold for gold, same in zip(golds, verify([(gold, f"$ {gold} $") for gold in golds]), strict=True) if not same] == [], name
        pairs = list(zip(golds, golds[1:], strict=False))
        equal_pairs = {pair for pair, same in zip(pairs, verify(pairs), strict=True) if same and pair[0] != pair[1]}
        assert equal_pairs <= EQUAL_NEIGHBOURS, name


HOSTILE = {
    "power tower": "9^{9^{9^{9^9}}}",
    "factorials": "((((9!)!)!)!)!",
    "factorial": "100000000!",
    "exponent": "1e999999999",
    "a megabyte of braces": "{" * 1_000_000,
    "a megabyte of digits": "9" * 1_000_000,
    "open boxes": r"\boxed{" * 150_000,
    "nested fractions": r"\frac{1}{" * 300 + "2" + "}" * 300,
    "nested parentheses": "(" * 5_000 + "1" + ")" * 5_000,
    "endless sum": r"\sum_{n=1}^{10^{9}} \frac{\sin(n)}{n}",
    "binomial": r"\binom{10^9}{5\cdot 10^8}",
    "polynomial": "(1+x)^{100000}",
    "many dollars": "$" * 1_000_000,
    "lone surrogate": "\ud800",
    "many left": r"\left(" * 3_000,
}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_answer_is_wrong_and_harms_nothing(name: str) -> None:
    assert not equal("x^2+1", HOSTILE[name])
    assert equal("x^2+1", f"1+x^{{2}} + 0 \\cdot {len(name)}")  # the workers are alive and well


def test_no_code_is_run(tmp_path: Path) -> None:
    for call in (f"__import__('os').mkdir('{tmp_path}/ran')", rf"\text{{__import__('os').mkdir('{tmp_path}/ran')}}"):
        assert not equal("5", call)
    assert list(tmp_path.iterdir()) == []


def test_a_timeout_is_reported(caplog: pytest.LogCaptureFixture) -> None:
    assert verify([("5", "99999999!")], timeout=0.3) == [False]
    assert "took more than 0.3 s" in caplog.text


def test_threads_share_the_workers() -> None:
    verdicts: dict[int, list[bool]] = {}

    def work(i: int) -> None:
        verdicts[i] = verify([(f"x+{i}", f"{i}+x"), (f"x+{i}", f"{i + 1}+x")])

    threads = [threading.Thread(target=work, args=(i,)) for i in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert verdicts == {i: [True, False] for i in range(8)}


def _script(code: str, **options: object) -> subprocess.CompletedProcess[str]:
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    return subprocess.run([sys.executable, "-"], input=code, env=env, text=True, capture_output=True, timeout=60, **options)  # type: ignore[call-overload]


def test_import_is_light() -> None:
    code = "import sys, finetune.answers; print([m for m in ('torch', 'transformers', 'sympy', 'math_verify') if m in sys.modules])"
    assert _script(code).stdout == "[]\n"


def test_script_on_standard_input_in_another_folder(tmp_path: Path) -> None:
    code = "from finetune.answers import equal\nprint(equal('x^2-1', '(x-1)(x+1)'), equal('x', 'y'))"
    result = _script(code, cwd=tmp_path)
    assert (result.stdout, result.stderr) == ("True False\n", "")


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_no_worker_outlives_its_parent() -> None:
    code = """
import os, signal, threading, time
from finetune.answers import equal, pool
assert equal("x+1", "1+x")
from pathlib import Path
def children(pid):
    return [int(p) for task in Path(f"/proc/{pid}/task").iterdir() for p in (task / "children").read_text().split()]
workers = children(os.getpid())
print(*workers, *[c for w in workers for c in children(w)], flush=True)
os.kill(os.getpid(), signal.SIGKILL)
"""
    pids = [int(pid) for pid in _script(code).stdout.split()]
    assert len(pids) >= 2
    deadline = time.monotonic() + 8
    while any(_alive(pid) for pid in pids) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert [pid for pid in pids if _alive(pid)] == []


def _alive(pid: int) -> bool:
    try:
        return "(python" in (stat := Path(f"/proc/{pid}/stat").read_text()) and ") Z" not in stat
    except OSError:
        return False
