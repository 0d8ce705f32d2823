"""Final answers: where they are found, what counts as the same, and programs that are too slow, too large or not there.

Leaves out math-verify's own rules, of which a few cases are tried, and training on answers (test_verifiable_training.py).
"""

import sys

import pytest

from g2r_megatron.config.options import VerifierConfig
from g2r_megatron.data.readers import read_queries
from g2r_megatron.data.types import Query
from g2r_megatron.errors import UserError
from g2r_megatron.verify.answers import final_answer, letter, plain
from g2r_megatron.verify.verifier import Verifier


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("so \\boxed{42}.", "42"),
        ("first \\boxed{1}, then \\boxed{\\frac{1}{2}}", "\\frac{1}{2}"),
        ("\\boxed{\\{1, 2\\}}", "\\{1, 2\\}"),
        ("steps\n#### 7 apples\nbye", "7 apples"),
        ("#### 7\nno: \\boxed{8}", "8"),
        ("\\boxed{8} #### 7", "7"),
        ("\\boxed{8", None),
        ("the answer is 42", None),
        ("", None),
    ],
)
def test_where_the_final_answer_is(text, answer):
    assert final_answer(text) == answer


def test_what_people_write_around_an_answer():
    assert plain(" $42$. ") == "42" and plain("\\text{yes}") == "yes"
    assert [letter(text) for text in ("B", "(b)", "B. the second", "\\text{C}", "both", "7")] == [
        "B",
        "B",
        "B",
        "C",
        None,
        None,
    ]


def right(kind: str, answer: str, text: str, **options) -> bool:
    verifier = Verifier(VerifierConfig(kind=kind, **options))
    query = Query("q", ({"role": "user", "content": "?"},), (), answer=answer)
    verifier.check(query)
    try:
        return verifier.right(query, text)
    finally:
        verifier.close()


@pytest.mark.parametrize(
    ("kind", "answer", "text", "expected"),
    [
        ("exact", "42", "\\boxed{42}", True),
        ("exact", "42", "\\boxed{42.0}", False),
        ("exact", "a long way\n#### 42", "#### 42", True),
        ("exact", "42", "42", False),
        ("choice", "b", "\\boxed{(B) because}", True),
        ("choice", "B", "\\boxed{A}", False),
        ("regex", "4[0-9]", "#### 43", True),
        ("regex", "4", "#### 43", False),
    ],
)
def test_kinds_without_a_process(kind, answer, text, expected):
    assert right(kind, answer, text) is expected


def test_mathematics():
    """Also after an answer that sympy would compute for hours, which is wrong after the time that it may take."""
    verifier = Verifier(VerifierConfig(timeout_seconds=3.0))
    query = Query("q", (), (), answer="1/2")
    same = ["\\boxed{0.5}", "#### \\frac{2}{4}", "\\boxed{7^{7^{7^{7^{7}}}}}", "\\boxed{50\\%}", "\\boxed{2}"]
    assert [verifier.right(query, text) for text in same] == [True, True, False, True, False]
    verifier.close()


PROGRAM = """
import json, sys, time
asked = json.load(sys.stdin)
if "slow" in asked["response"]:
    time.sleep(60)
if "large" in asked["response"]:
    bytearray(1 << 30)
sys.exit(asked["response"] != asked["answer"] or asked["messages"][0]["content"] != "?")
"""


def test_a_program_with_limits():
    command = [sys.executable, "-c", PROGRAM]
    options = {"command": command, "timeout_seconds": 2.0, "memory_mib": 256}
    texts = ("yes", "no", "slow", "large")
    assert [right("command", "yes", text, **options) for text in texts] == [True, False, False, False]


def test_what_cannot_work_is_refused():
    with pytest.raises(UserError, match=r"verifier.command: no program 'no-such-program'"):
        Verifier(VerifierConfig(kind="command", command=["no-such-program"]))
    with pytest.raises(UserError, match="must be one letter"):
        right("choice", "42", "")
    with pytest.raises(UserError, match="regular expression"):
        right("regex", "(", "")


def read(tmp_path, line: str, format: str = "auto", criterion: str | None = "right? {answer}"):
    path = tmp_path / "rows.jsonl"
    path.write_text(line + "\n")
    return read_queries([str(path)], format, None, criterion=criterion)[0]


def test_rows_with_an_answer(tmp_path):
    """A rubric comes before an answer, unless the format says verifiable; a row without both is refused."""
    query = read(tmp_path, '{"question": "q", "answer": 42}')
    assert (query.answer, query.dataset) == ("42", "verifiable")
    assert [(item.criterion, item.weight) for item in query.rubric] == [("right? 42", 1.0)]
    both = '{"prompt": "q", "answer": "42", "rubric": [{"criterion": "c", "weight": 2}]}'
    assert read(tmp_path, both).answer is None and read(tmp_path, both, "verifiable").answer == "42"
    for line, format in (('{"prompt": "q"}', "auto"), ('{"prompt": "q", "answer": " "}', "verifiable")):
        with pytest.raises(UserError, match="hold no (rubric or )?answer"):
            read(tmp_path, line, format)
    with pytest.raises(UserError, match="hold no rubric; "):  # g2r judge: answers mean nothing
        read(tmp_path, '{"question": "q", "answer": 42}', criterion=None)


def test_a_pattern_that_takes_too_long():
    """It decides nothing: the answer is wrong, after the time that a decision may take."""
    assert right("regex", "a*b", "\\boxed{aab}")
    assert not right("regex", "(a|aa)+b", "\\boxed{" + "a" * 200 + "}", timeout_seconds=0.2)


def test_a_worked_solution_as_the_answer_of_a_choice():
    assert right("choice", "Both are gases.\n#### B", "\\boxed{B}")
