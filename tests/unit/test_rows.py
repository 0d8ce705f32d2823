"""Rows as public projects write them: each shape gives the query that its author meant, or is refused by name.

Leaves out files (test_row_files.py), the formats by name (test_data.py), and judging (tests/runs/test_offline_judge.py).
"""

import json
import re

import pytest

from g2r_megatron.data.chat_template import conversation_text
from g2r_megatron.data.readers import read_queries
from g2r_megatron.errors import UserError

TEXT = "Write a haiku"
USER = [{"role": "user", "content": TEXT}]
ITEM = {"criterion": "Has three lines", "points": 5}
ITEMS = {"rubrics": [ITEM]}
ANSWERED = [*USER, {"role": "assistant", "content": "Old pond"}]


def read(tmp_path, *rows: dict, polarity=None, **options):
    file = tmp_path / "rows.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return read_queries([str(file)], "auto", polarity, **options)


def conversation(query) -> list[tuple[str, str]]:
    return [(message["role"], message["content"]) for message in query.messages]


ASKED = [("user", TEXT)]
BRIEF = [("system", "Be brief."), ("user", TEXT)]
CONVERSATIONS = {
    "text": ({"prompt": TEXT}, ASKED),
    "list of messages": ({"prompt": USER}, ASKED),
    "one message": ({"prompt": USER[0]}, ASKED),
    "JSON in a text": ({"prompt": json.dumps(USER)}, ASKED),
    "Python in a text (pandas' CSV)": ({"prompt": str(USER)}, ASKED),
    "messages as JSON texts (datasets' Json)": ({"messages": [json.dumps(USER[0])]}, ASKED),
    "messages": ({"messages": USER}, ASKED),
    "messages in an object": ({"prompt": {"messages": USER}}, ASKED),
    "question": ({"question": TEXT}, ASKED),
    "instruction": ({"instruction": TEXT, "input": "", "output": "Old pond"}, ASKED),
    "instruction + input": ({"instruction": "Shorten this.", "input": TEXT}, [("user", f"Shorten this.\n{TEXT}")]),
    "instruction + history": (
        {"instruction": TEXT, "history": [["hi", "yes?"]]},
        [("user", "hi"), ("assistant", "yes?"), *ASKED],
    ),
    "from/value": ({"conversations": [{"from": "human", "value": TEXT}]}, ASKED),
    "system with from/value": (
        {"conversations": [{"from": "system", "value": "Be brief."}, {"from": "human", "value": TEXT}]},
        BRIEF,
    ),
    "system_prompt": ({"prompt": TEXT, "system_prompt": "Be brief."}, BRIEF),
    "the same system message twice": (
        {"system": "Be brief.", "messages": [{"role": "developer", "content": "Be brief."}, *USER]},
        BRIEF,
    ),
    "empty system message": (
        {"prompt": [{"role": "system", "content": ""}, *USER]},
        [("system", ""), *ASKED],
    ),
    "content parts": ({"prompt": [{"role": "user", "content": [{"type": "text", "text": TEXT}]}]}, ASKED),
    "two parts": ({"prompt": [{"role": "user", "content": [{"type": "text", "text": "a"}, "b"]}]}, [("user", "a\nb")]),
    "prompt null beside messages": ({"prompt": None, "messages": USER}, ASKED),
    "question within the prompt": (
        {"prompt": f"Answer briefly: {TEXT}", "question": TEXT},
        [("user", f"Answer briefly: {TEXT}")],
    ),
    "batch request": ({"custom_id": "7", "method": "POST", "body": {"model": "m", "messages": USER}}, ASKED),
    "JSON that a user wrote": ({"prompt": [{"role": "user", "content": '{"a": 1}'}]}, [("user", '{"a": 1}')]),
    "brackets that are no JSON": ({"prompt": "[Verse] hi [End]"}, [("user", "[Verse] hi [End]")]),
}


@pytest.mark.parametrize("row, messages", CONVERSATIONS.values(), ids=CONVERSATIONS)
def test_conversations(tmp_path, row, messages):
    """Every way to write a conversation down gives its messages."""
    (query,) = read(tmp_path, row | ITEMS)
    assert conversation(query) == messages


REFUSED_CONVERSATIONS = {
    "JSON that is no message": ({"prompt": "[1, 2]"}, "prompt is '[1, 2]'.*not messages.*role"),
    "an object that is no message": ({"prompt": '{"a": 1}'}, "JSON, but not messages.*role"),
    "messages cut short": ({"prompt": json.dumps(USER)[:-5]}, "not whole JSON"),
    "numpy's repr (no commas)": ({"prompt": "[{'role': 'user', 'content': 'a'}\n {'role': 'user'}]"}, "not whole JSON"),
    "an image": ({"prompt": [{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}]}, "each part"),
    "a tool's turn": ({"messages": [*USER, {"role": "tool", "content": "4"}]}, r"messages\[1\].role is 'tool'"),
    "a tool call": (
        {"messages": [*USER, {"role": "assistant", "content": "x", "tool_calls": [{"id": "1"}]}, *USER]},
        "tool_calls",
    ),
    "two prompts": ({"prompt": TEXT, "question": "Why?"}, r"question is 'Why\?'.*data.fields: {prompt: prompt}"),
    "two system messages": (
        {"system_prompt": "Be rude.", "messages": [{"role": "system", "content": "Be brief."}, *USER]},
        "system_prompt is 'Be rude.'.*differs",
    ),
    "turns as texts": ({"messages": ["hi", "yes?"]}, r"messages\[0\] is 'hi'.*object"),
    "an answer in the prompt": ({"prompt": ANSWERED}, "last message must be the user's"),
}


@pytest.mark.parametrize("row, said", REFUSED_CONVERSATIONS.values(), ids=REFUSED_CONVERSATIONS)
def test_refused_conversations(tmp_path, row, said):
    with pytest.raises(UserError, match="rows.jsonl:1: .*") as error:
        read(tmp_path, row | ITEMS)
    assert re.search(said.replace("[1, 2]", r"\[1, 2\]"), str(error.value), re.S), error.value


def test_answers_of_training_rows(tmp_path, capsys):
    """The last answer of ``messages`` or ``conversations`` is the reference, which is said once; ``output`` is ignored."""
    from g2r_megatron.errors import warn

    warn.cache_clear()
    turns = [{"from": "human", "value": "Why?"}, {"from": "gpt", "value": "So."}]
    queries = read(tmp_path, {"messages": ANSWERED} | ITEMS, {"conversations": turns} | ITEMS)
    assert [(conversation(q)[-1][0], q.reference) for q in queries] == [("user", "Old pond"), ("user", "So.")]
    assert "2 conversations end with the assistant's answer" in capsys.readouterr().err


def rubric(query) -> list[tuple]:
    return [(item.criterion, item.weight, item.tags) for item in query.rubric]


LINES = ("Has three lines", 5.0, ())
RUBRICS = {
    "rubrics": ({"rubrics": [ITEM]}, [LINES]),
    "criteria": ({"criteria": [ITEM]}, [LINES]),
    "reward_model.rubrics": ({"reward_model": {"ground_truth": "", "rubrics": [ITEM]}}, [LINES]),
    "reward_model as a text": ({"reward_model": json.dumps({"rubrics": [ITEM]})}, [LINES]),
    "ground truth": ({"reward_model": {"ground_truth": json.dumps([ITEM])}}, [LINES]),
    "extra_info": ({"reward_model": {"ground_truth": "x"}, "extra_info": {"rubrics": [ITEM]}}, [LINES]),
    "the same twice": ({"reward_model": {"rubrics": [ITEM]}, "extra_info": {"rubrics": [ITEM]}}, [LINES]),
    "JSON text": ({"rubrics": json.dumps([ITEM])}, [LINES]),
    "in an object": ({"rubric": {"criteria": [ITEM], "version": 2}}, [LINES]),
    "texts": ({"rubrics": ["Has three lines", "Names a season"]}, [("Has three lines", 1.0, ()), ("Names a season", 1.0, ())]),
    "items as JSON texts": ({"rubrics": [json.dumps(ITEM)]}, [LINES]),
    "criterion to weight": ({"rubric": {"Has three lines": 5}}, [LINES]),
    "name to item": ({"rubric": {"form": {"description": "Has three lines", "weight": 5}}}, [(*LINES[:2], ("form",))]),
    "title only": ({"criteria": [{"title": "Has three lines", "weight": 5}]}, [(*LINES[:2], ("Has three lines",))]),
    "expected_outcome": ({"rubrics": [{"expected_outcome": "Has three lines", "weight": 5}]}, [LINES]),
    "tags as an object": ({"rubrics": [ITEM | {"tags": {"axis": "form", "cluster": None}}]}, [(*LINES[:2], ("axis:form",))]),
    "weight missing": ({"rubrics": [{"criterion": "Has three lines"}]}, [("Has three lines", 1.0, ())]),
    "score": ({"rubrics": [{"criterion": "Has three lines", "score": 5}]}, [LINES]),
    "score beside points": ({"rubrics": [ITEM | {"score": 0}]}, [LINES]),
    "weight as a text": ({"rubrics": [{"criterion": "Has three lines", "weight": " +5.0"}]}, [LINES]),
    "words": (
        {"rubrics": [{"criterion": c, "weight": w} for c, w in (("a", "Essential"), ("b", "Important Criteria"), ("c", "optional"))]},
        [("a", 1.0, ()), ("b", 0.7, ()), ("c", 0.3, ())],
    ),
    "empty beside full": ({"rubric": [], "rubrics": [ITEM]}, [LINES]),
}  # fmt: skip


@pytest.mark.parametrize("row, items", RUBRICS.values(), ids=RUBRICS)
def test_rubrics(tmp_path, row, items):
    """Every place and way to write a rubric down gives its items."""
    (query,) = read(tmp_path, {"prompt": TEXT} | row)
    assert rubric(query) == items


REFUSED_RUBRICS = {
    "two rubrics": ({"rubric": [ITEM], "rubrics": [ITEM, ITEM]}, "rubrics is .*differs from rubric.*data.fields"),
    "two weights": ({"rubrics": [ITEM | {"weight": 3}]}, "weight is 3.*differs from points"),
    "two criteria": (
        {"rubrics": [ITEM | {"description": "About form"}]},
        "description is 'About form'.*beside criterion",
    ),
    "a guide in prose": ({"rubric": "1. Has three lines"}, "rubric is '1. Has three lines'.*list of criteria"),
    "text and object": ({"rubrics": ["a", ITEM]}, r"rubrics\[0\] is 'a'.*object"),
    "an unknown word": ({"rubrics": [{"criterion": "a", "weight": "HIGH"}]}, "weight is 'HIGH'.*essential"),
    "a pitfall": ({"rubrics": [ITEM, {"criterion": "a", "weight": "Pitfall"}]}, r"weight is 'Pitfall'.*data.polarity"),
}


@pytest.mark.parametrize("row, said", REFUSED_RUBRICS.values(), ids=REFUSED_RUBRICS)
def test_refused_rubrics(tmp_path, row, said):
    with pytest.raises(UserError, match=said):
        read(tmp_path, {"prompt": TEXT} | row)


def test_pitfalls_need_a_polarity(tmp_path):
    """A pitfall without a number counts -.9, or .9 where it begins with a negation and data.polarity turns those."""
    items = [{"criterion": c, "weight": "Pitfall"} for c in ("Does not rhyme", "Rhymes")]
    row = {"prompt": TEXT, "rubrics": [{"criterion": "a", "weight": "Essential"}, *items]}
    weights = {p: [i.weight for i in read(tmp_path, row, polarity=p)[0].rubric] for p in ("raw", "flip_negated")}
    assert weights == {"raw": [1.0, -0.9, -0.9], "flip_negated": [1.0, 0.9, -0.9]}


def test_fields(tmp_path):
    """``data.fields`` maps any role, by dotted paths too, also into lists and texts; a path that leads nowhere is named."""
    row = {
        "meta": json.dumps({"uid": "q7", "task": TEXT}),
        "annotations": [{"checks": [{"rule": {"en": "Has three lines"}, "w": 5}]}],
        "prompt": "not this one",
    }
    fields = {
        "prompt": "meta.task",
        "id": "meta.uid",
        "rubric": "annotations.0.checks",
        "criterion": "rule.en",
        "weight": "w",
    }
    (query,) = read(tmp_path, row, fields=fields)
    assert (query.id, conversation(query), rubric(query)) == ("q7", ASKED, [LINES])
    with pytest.raises(UserError, match="hold no conversation.*give one of meta.question"):
        read(tmp_path, row, fields=fields | {"prompt": "meta.question"})
    with pytest.raises(UserError, match=r"data.fields: .*'promt'.*prompt, system"):
        read(tmp_path, row, fields={"promt": "x"})


def test_bad_rows_are_counted_and_can_be_skipped(tmp_path, capsys):
    """Refusing names the first bad row and counts all; skipping leaves out up to 5%, names them, and refuses more."""
    good = [{"id": f"g{i}", "prompt": f"{TEXT} {i}"} | ITEMS for i in range(38)]
    rows = [*good, {"id": "b1", "prompt": "x", "rubrics": []}, good[3] | {"prompt": "y"}]
    with pytest.raises(
        UserError, match=r"rows.jsonl:39: rubrics is \[\] \(2 of 40 rows are bad: id 'b1' at rows.jsonl:39, "
    ):
        read(tmp_path, *rows)
    queries = read(tmp_path, *rows, on_bad_row="skip")
    assert [q.id for q in queries] == [row["id"] for row in good]
    assert (
        "2 of 40 rows are bad and left out: id 'b1' at rows.jsonl:39, id 'g3' at rows.jsonl:40"
        in capsys.readouterr().err
    )
    with pytest.raises(UserError, match="3 of 41 rows are bad, more than 5%"):
        read(tmp_path, *rows, {"prompt": 3}, on_bad_row="skip")


def test_checks_of_a_query_count_too(tmp_path):
    """What is found out by rendering a row makes it a bad row."""

    def check(query):
        if query.id == "g1":
            raise UserError("limit", "query 'g1' is too long", "shorten it")

    rows = [{"id": f"g{i}", "prompt": f"{TEXT} {i}"} | ITEMS for i in range(20)]
    assert len(read(tmp_path, *rows, on_bad_row="skip", check=check)) == 19
    with pytest.raises(UserError, match="limit: query 'g1' is too long .1 of 20 rows is bad.*shorten it"):
        read(tmp_path, *rows, check=check)


# ---- rows to be judged ----------------------------------------------------------------------------------------------


def judged(tmp_path, *rows: dict, **options):
    return read(tmp_path, *rows, require_response=True, **options)


def message(text: str | None, **more) -> dict:
    return {"index": 0, "message": {"role": "assistant", "content": text, **more}, "finish_reason": "stop"}


def batch(custom_id: str, *choices: dict, status: int = 200, error=None) -> dict:
    body = {"id": "chatcmpl-1", "object": "chat.completion", "choices": list(choices)}
    response = {"status_code": status, "request_id": "r", "body": body}
    return {"id": "batch_req_1", "custom_id": custom_id, "response": response, "error": error}


def part(type: str, **more) -> dict:
    return {"type": type, **more}


RESPONSES = {
    "text": ({"response": "a"}, ["a"]),
    "empty": ({"response": ""}, [""]),
    "None": ({"response": None}, [""]),
    "blank": ({"response": "\n"}, ["\n"]),
    "JSON": ({"response": '["a"]'}, ['["a"]']),
    "list": ({"responses": ["a", "", "a"]}, ["a", "", "a"]),
    "list of lists (resps)": ({"resps": [["a", "b"]]}, ["a", "b"]),
    "completion as messages": ({"completion": [{"role": "assistant", "content": "a"}]}, ["a"]),
    "choices": ({"choices": [message("a"), message(None)]}, ["a", ""]),
    "old choices": ({"choices": [{"index": 0, "text": "a", "logprobs": None}]}, ["a"]),
    "a refusal": ({"choices": [message(None, refusal="No.")]}, ["No."]),
    "content parts": ({"response": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]}, ["ab"]),
    "vLLM RequestOutput": ({"outputs": [{"index": 0, "text": "a", "token_ids": [1]}, {"index": 1, "text": "b"}]}, ["a", "b"]),
    "Responses API": (
        {"output": [{"type": "reasoning", "summary": []}, {"type": "message", "content": [{"type": "output_text", "text": "a"}]}]},
        ["a"],
    ),
    "two messages of Responses": ({"output": [part("message", content="a"), part("function_call"), part("message", content="b")]}, ["ab"]),
    "Anthropic, after a thought": ({"response": [part("thinking", thinking="x"), part("text", text="a")]}, ["a"]),
    "inspect, after a thought": ({"output": {"choices": [message([part("reasoning", reasoning="x"), part("text", text="a")])]}}, ["a"]),
    "a thought cut short": ({"response": {"status": "incomplete", "output": [part("reasoning", summary=[])]}}, [""]),
    "a refusal as a part": ({"output": [part("message", content=[part("refusal", refusal="No.")])]}, ["No."]),
    "Anthropic's batch": ({"result": {"type": "succeeded", "message": {"content": [part("text", text="a")]}}}, ["a"]),
    "Gemini's batch": (
        {"response": {"candidates": [{"content": {"parts": [{"text": "x", "thought": True}, {"text": "a"}, {"text": "b"}]}}]}},
        ["ab"],
    ),
    "Bedrock's batch": ({"modelInput": {}, "modelOutput": {"content": [part("text", text="a")]}}, ["a"]),
    "FastChat": ({"choices": [{"index": 0, "turns": ["a"]}, {"index": 1, "turns": [{"content": "b"}]}]}, ["a", "b"]),
    "response beside output": ({"response": "a", "output": "reference"}, ["a"]),
    "the same in two shapes": ({"generated_text": "a", "outputs": [{"index": 0, "text": "a"}]}, ["a"]),
    "how something went": ({"output": "a", "result": "pass"}, ["a"]),
}  # fmt: skip


@pytest.mark.parametrize("row, texts", RESPONSES.values(), ids=RESPONSES)
def test_responses(tmp_path, row, texts):
    """Every way to write responses down gives their texts, in order, with the row's id as it was."""
    queries = judged(tmp_path, {"id": 7, "prompt": TEXT} | ITEMS | row)
    assert [q.response for q in queries] == texts
    assert [q.given.id for q in queries] == [7] * len(texts)
    assert [q.given.choice for q in queries] == (list(range(len(texts))) if len(texts) > 1 else [None])


def test_answer_is_the_response(tmp_path):
    """A row whose conversation ends with the assistant needs no other response."""
    (query,) = judged(tmp_path, {"messages": ANSWERED} | ITEMS)
    assert (conversation(query), query.response) == (ASKED, "Old pond")
    (query,) = judged(tmp_path, {"messages": ANSWERED, "model_output": "a"} | ITEMS)
    assert (query.response, query.reference) == ("a", "Old pond")


REFUSED_RESPONSES = {
    "none": ({}, "hold no response.*give one of response"),
    "empty list": ({"responses": []}, r"responses is \[\]"),
    "a number": ({"response": 3}, "response is 3.*text"),
    "two": ({"completion": "a", "prediction": "b"}, "prediction is 'b'.*beside completion.*data.fields"),
    "a failed request": ({"response": None, "error": {"message": "rate limit"}}, "rate limit.*failed"),
    "a failed status": (batch("7", message("a"), status=500), "status 500"),
    "an errored batch request": ({"result": {"type": "errored", "error": {"type": "x"}}}, "result is .*failed"),
    "an expired batch request": ({"result": {"type": "expired"}}, "result is .*failed"),
    "a tool call alone": ({"response": {"content": [part("tool_use", name="f")]}}, "response is .*tool call"),
    "a call of Responses alone": (
        {"output": [part("reasoning"), part("function_call", name="f")]},
        "output is .*tool call",
    ),
    "Gemini's call alone": ({"response": {"parts": [{"functionCall": {"name": "f"}}]}}, "response is .*tool call"),
    "an image beside text": ({"response": [part("text", text="a"), part("image_url")]}, "type 'image_url'.*only text"),
    "answers to two turns": ({"choices": [{"index": 0, "turns": ["a", "b"]}]}, "choices is .*several turns"),
    "options of a multiple choice": ({"id": 1, "choices": ["a", "b"]}, "hold no response"),
    "a list in a text": ({"responses": "['a', 'b']"}, "responses is .*list written as a text"),
    "only how something went": ({"result": "pass"}, "hold no response"),
    "an unknown object": ({"response": {"answer": "a"}}, "response is .*body, choices"),
}


@pytest.mark.parametrize("row, said", REFUSED_RESPONSES.values(), ids=REFUSED_RESPONSES)
def test_refused_responses(tmp_path, row, said):
    with pytest.raises(UserError, match=said):
        judged(tmp_path, {"prompt": TEXT} | ITEMS | row)


def test_batch_results_are_joined_with_queries(tmp_path):
    """Batch results hold no prompt: they find their query by ``custom_id``, keep their order, and name unknown ids."""
    queries = {q.id: q for q in read(tmp_path, *({"id": f"q{i}", "prompt": f"{TEXT} {i}"} | ITEMS for i in range(3)))}
    rows = [batch("q2", message("c"), message("d")), batch("q0", message("a"))]
    found = judged(tmp_path, *rows, queries=queries)
    assert [(q.given.id, q.given.choice, q.response) for q in found] == [
        ("q2", 0, "c"),
        ("q2", 1, "d"),
        ("q0", None, "a"),
    ]
    assert [conversation(q)[0][1] for q in found] == [f"{TEXT} {i}" for i in (2, 2, 0)]
    with pytest.raises(UserError, match="custom_id is 'q9'.*one of the queries"):
        judged(tmp_path, batch("q9", message("a")), queries=queries)
    with pytest.raises(UserError, match="hold no conversation"):
        judged(tmp_path, rows[0])


def test_any_id_of_a_result_may_name_its_query(tmp_path):
    """The id that a query has counts, and comes back as it was; a row without one goes by its conversation."""
    rows = ({"id": id, "prompt": f"{TEXT} {id}"} | ITEMS for id in (3, 81, "p"))
    queries = {q.id: q for q in read(tmp_path, *rows)}

    def joined(**row):
        (query,) = judged(tmp_path, {"response": "a"} | row, queries=queries)
        return query.id, query.given.id, query.given.fields

    assert joined(id="gen-1", prompt_id="p") == ("p", "p", {"id": "gen-1"})
    assert joined(id=3.0) == ("3", 3.0, {})  # pandas
    assert joined(id="3") == ("3", "3", {})
    for name in ("key", "recordId", "doc_id"):
        assert joined(**{name: 81}) == ("81", 81, {})
    assert joined(prompt=f"{TEXT} 81") == ("81", "81", {})
    with pytest.raises(UserError, match="question_id is 81; id is the id of another query.*data.fields"):
        joined(id=3, question_id=81)
    with pytest.raises(UserError, match="no id, and none of the queries have its conversation"):
        joined(prompt="other")
    with pytest.raises(UserError, match="hold no id"):
        joined()


def test_simple_evals_results(tmp_path):
    row = {"prompt": TEXT, "completion": [{"role": "assistant", "content": "a"}], "prompt_id": "p", "score": 0.5}
    (query,) = judged(tmp_path, row | {"rubric_items": [ITEM | {"criteria_met": True}]})
    assert (query.given.id, query.response, query.given.fields) == ("p", "a", {"score": 0.5})
    assert query.given.items == ({"criteria_met": True},)


def test_scores_that_are_there_come_back(tmp_path):
    """Numbers, labels and earlier results of items are kept; conversations, rubrics, long lists and texts are not."""
    row = {
        "id": "a",
        "prompt": TEXT,
        "rubrics": [ITEM | {"criteria_met": True, "explanation": "x" * 2000}],
        "response": "a",
        "score": 0.5,
        "reward": 1,
        "grade": "B",
        "scores": {"style": 3, "facts": float("nan")},
        "prompt_token_ids": list(range(500)),
        "metrics": None,
    }
    (query,) = judged(tmp_path, row)
    assert query.given.fields == {"score": 0.5, "reward": 1, "grade": "B", "scores": {"style": 3, "facts": None}}
    assert query.given.items == ({"criteria_met": True},)


@pytest.mark.parametrize("name", ["reasoning_content", "reasoning", "thinking"])
def test_thoughts_of_earlier_answers_reach_the_template(tmp_path, name):
    """By the name that they have; a user's and an empty one are no thoughts. What the judge reads as text has no thoughts."""
    turns = [USER[0] | {name: "as a user"}, ANSWERED[1] | {name: "Basho."}, ANSWERED[1] | {name: None}, *USER]
    (query,) = read(tmp_path, {"messages": turns, **ITEMS})
    assert list(query.messages) == [USER[0], ANSWERED[1] | {name: "Basho."}, ANSWERED[1], *USER]
    assert "Basho." not in conversation_text(query.messages)
