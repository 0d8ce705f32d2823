"""Rows that could be misread: each is read as its author meant it, or refused with one line that names the field.

Weights in words, signs, mapped names that lead nowhere, labels beside questions, material, media, rendered prompts, and
rows joined with queries. Leaves out the shapes that are read as they stand (test_rows.py) and files (test_row_files.py).
"""

import json

import pytest

from g2r_megatron.data.files import find_files
from g2r_megatron.data.readers import read_queries
from g2r_megatron.errors import UserError, warn

USER = [{"role": "user", "content": "hi"}]
ITEMS = {"rubric": [{"criterion": "c", "weight": 1}]}


def read(tmp_path, *rows: dict, polarity=None, **options):
    file = tmp_path / "rows.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return read_queries([str(file)], "auto", polarity, **options)


def refusal(tmp_path, *rows: dict, **options) -> str:
    with pytest.raises(UserError) as error:
        read(tmp_path, *rows, **options)
    assert "\n" not in str(error.value)
    return str(error.value).replace(f"{tmp_path}/", "")


# ---- weights --------------------------------------------------------------------------------------------------------

PITFALL = "Pitfall Criteria"
WEIGHTS = {
    "title": ([{"title": "Essential Criteria", "description": "a"}, {"title": "Optional", "description": "b"}], [1, 0.3]),
    "category": ([{"category": "Important", "description": "a"}], [0.7]),
    "tags": ([{"tags": ["form", "optional"], "criterion": "a"}], [0.3]),
    "beginning of the text": (["Optional Criteria: a", "[Important] b", "**Essential**: c"], [0.3, 0.7, 1]),
    "no such words": (["Important details are there: a", "Essential oils"], [1, 1]),
    "the number counts": ([{"title": "Optional", "description": "a", "weight": 4}], [4]),
    "priority": ([{"priority": "Essential", "criterion": "a"}], [1]),
    "max_points": ([{"max_points": 5, "criterion": "a"}], [5]),
    "max_score beside the score reached": ([{"max_score": 5, "score": 2, "criterion": "a"}], [5]),
    "negative and called so": ([{"criterion": "a", "points": 2}, {"criterion": "b", "points": -2, "type": "penalty"}], [2, -2]),
    "criterion to word": ({"names a doctor": "Important"}, [0.7]),
    "one item": ({"criterion": "a", "weight": 2}, [2]),
    "points reached": ([{"criterion": "a", "points_awarded": 2}], [1]),
}  # fmt: skip


@pytest.mark.parametrize("rubric, weights", WEIGHTS.values(), ids=WEIGHTS)
def test_weights(tmp_path, rubric, weights):
    (query,) = read(tmp_path, {"prompt": "hi", "rubric": rubric})
    assert [item.weight for item in query.rubric] == weights


NO_WEIGHT = {
    "title": ([{"title": PITFALL, "description": "b"}], r"rubric\[0\].title is 'Pitfall Criteria'; .*data.polarity"),
    "type": ([{"type": "pitfall", "description": "b"}], r"rubric\[0\].type is 'pitfall'; .*data.polarity"),
    "beginning of the text": ([{"description": f"{PITFALL}: b"}], r"rubric\[0\].description is .*data.polarity"),
    "a positive pitfall": ([{"title": PITFALL, "description": "b", "weight": 2}], "title is .*its weight is positive"),
    "negative": ([{"criterion": "b", "points": 2, "negative": True}], "negative is True; its weight is positive"),
    "not positive": (
        [{"criterion": "b", "points": 2, "is_positive": False}],
        "is_positive is False; its weight is pos",
    ),
    "negative type": ([{"criterion": "b", "type": "Negative"}], "type is 'Negative'; its weight is positive"),
    "sign": ([{"criterion": "b", "weight": 2, "sign": -1}], "sign is -1; its weight is positive"),
    "two words": ([{"title": "Optional", "description": "Essential: b"}], "description is .*differs from title"),
    "another name": ([{"criterion": "b", "maxPoints": 2}], "maxPoints is 2; .*data.fields: {weight: maxPoints}"),
    "another word": ([{"criterion": "b", "priority": "high"}], "priority is 'high'; .*data.fields: {weight: priority}"),
    "a mark": ([{"criterion": "b", "is_important": True}], "is_important is True; it may be the weight"),
    "inside": ([{"criterion": "b", "meta": {"weight": 2}}], "meta.weight is 2; .*data.fields: {weight: meta.weight}"),
    "underscore": ([{"criterion": "b", "weight": "1_0"}], "weight is '1_0'; it must be a finite number"),
    "names of fields": ({"max_score": 10, "min_score": 0}, "'max_score' is the name of a field and no criterion"),
    "a list of weights": ({"criteria": ["a", "b"], "weights": [3, 1]}, "rubric.weights is .*its own"),
    "points in the text": (["[+5] a", "b"], r"rubric\[0\].criterion is '\[\+5\] a'; it holds its points"),
    "points after the text": (["a (5 points)"], "it holds its points"),
    "two lists": ({"criteria": ["a"], "items": ["b"]}, "criteria and items differ"),
    "a scale": ({"criteria": "a", "score1_description": "b"}, "list of criteria"),
}


@pytest.mark.parametrize("rubric, said", NO_WEIGHT.values(), ids=NO_WEIGHT)
def test_refused_weights(tmp_path, rubric, said):
    with pytest.raises(UserError, match=f"rows.jsonl:1: rubric.*{said.removeprefix('rubric')}"):
        read(tmp_path, {"prompt": "hi", "rubric": rubric})


def test_polarity_decides_pitfalls_by_title(tmp_path):
    """With data.polarity a word in the title weighs as in the weight, and numbers stay as they are."""
    pitfalls = [{"description": "Does not b"}, {"description": "c", "weight": 2}]
    row = {"prompt": "hi", "rubric": [{"description": "a"}, *({"title": PITFALL} | item for item in pitfalls)]}
    weights = {p: [i.weight for i in read(tmp_path, row, polarity=p)[0].rubric] for p in ("raw", "flip_negated")}
    assert weights == {"raw": [1, -0.9, 2], "flip_negated": [1, 0.9, 2]}


def test_missing_weights_are_said_once(tmp_path, capsys):
    """Unweighted items beside weighted ones, and fields that might be weights, give one warning; plain ones give none."""
    warn.cache_clear()
    read(tmp_path, {"query": "hi", "rubric": [{"rubric_item": "a", "type": "Cite"}]})
    assert capsys.readouterr().err == ""
    read(tmp_path, {"prompt": "hi", "rubric": [{"criterion": "a", "difficulty": 3}]})
    assert "no rubric item has a weight (fields ['criterion', 'difficulty'])" in capsys.readouterr().err
    read(tmp_path, {"prompt": "hi", "rubric": [{"criterion": "a", "weight": 3}, {"criterion": "b"}]})
    assert "1 of 2 rubric items have no weight: they weigh 1" in capsys.readouterr().err


# ---- data.fields ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("role", ["id", "system", "weight", "tags", "reference"])
def test_mapped_names_must_be_there(tmp_path, role):
    """A role that is mapped to a field of no row is refused; one that some rows lack is not."""
    row = {"prompt": "hi", "rubric": [{"criterion": "c", "w": 2}]}
    said = refusal(tmp_path, row, fields={role: "wieght"})
    assert said.startswith(f"data.fields: {role} is mapped to 'wieght', which no row has")
    with_it = {"prompt": "ho", "rubric": [{"criterion": "c", "x": "2"}], "x": "2"}
    assert len(read(tmp_path, row, with_it, fields={role: "x"})) == 2


def test_mapped_criterion_and_texts(tmp_path):
    """Texts in a rubric are criteria whatever objects call theirs."""
    rows = [{"prompt": "a", "rubric": ["c"]}, {"prompt": "b", "rubric": [{"rule": "c"}]}]
    assert [q.rubric[0].criterion for q in read(tmp_path, *rows, fields={"criterion": "rule"})] == ["c", "c"]


# ---- conversations --------------------------------------------------------------------------------------------------

CHATML = "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n"
TURNS = [*USER, {"role": "assistant", "content": "b"}]
TOOLS = [{"type": "function", "function": {"name": "f"}}]
REFUSED = {
    "a label before the question": ({"prompt": "math", "question": "Solve this math problem"}, "question is .*differs"),
    "system messages": ({"prompt": "hi", "system_prompt": "A", "system": "B"}, "system is 'B'; it differs from system_prompt"),
    "system message nan": ({"prompt": "hi", "system": "nan"}, "system is 'nan'; .*missing value"),
    "system message None": ({"prompt": "hi", "system": "None"}, "system is 'None'; .*missing value"),
    "prompt nan": ({"prompt": "nan"}, "prompt is 'nan'; .*missing value"),
    "the last turn beside all": ({"prompt": "c", "messages": [*TURNS, {"role": "user", "content": "c"}]}, "messages is .*differs"),
    "system message in the second": ({"prompt": USER, "messages": [{"role": "system", "content": "S"}, *USER]}, "messages is .*differs"),
    "chat history": ({"prompt": "c", "chat_history": TURNS}, "chat_history is .*stands beside prompt"),
    "multi-modal data": ({"prompt": USER, "multi_modal_data": {"image": ["x"]}}, "multi_modal_data is .*not supported"),
    "tools": ({"messages": USER, "tools": TOOLS}, "tools is .*not supported"),
    "tools as JSON": ({"messages": USER, "tools": json.dumps(TOOLS)}, "tools is .*not supported"),
    "tools of a request": ({"body": {"messages": USER, "tools": TOOLS}}, "body.tools is .*not supported"),
    "decoded ChatML": ({"prompt": "system\nYou help.\nuser\nhi\nassistant\n"}, "chat template has made"),
    "decoded Llama": ({"prompt": "user\n\nhiassistant\n\n"}, "chat template has made"),
    "decoded Gemma": ({"prompt": "user\nhi\nmodel\n"}, "chat template has made"),
    "images": ({"prompt": "<image>what?", "images": [{"bytes": "x"}]}, "images is .*not supported"),
    "images of a message": ({"messages": [USER[0] | {"images": ["x.png"]}]}, r"messages\[0\].images is .*not supported"),
    "context": ({"question": "Who?", "context": "A cat."}, "context is 'A cat.'; it stands beside question"),
    "contexts": ({"question": "Who?", "context": {"contexts": ["A cat."]}}, "context is .*stands beside question"),
    "options": ({"question": "Who?", "options": {"A": "cat", "B": "dog"}}, "options is .*stands beside question"),
    "choices": ({"question": "Who?", "choices": ["cat", "dog"]}, "choices is .*stands beside question"),
    "numpy": ({"prompt": f"array([{USER[0]}], dtype=object)"}, "looks like messages"),
    "numpy in a list": ({"prompt": f"[array({USER[0]})]"}, "looks like messages"),
    "objects": ({"prompt": "[Message(role='user', content='hi')]"}, "looks like messages"),
    "cut short after another key": ({"prompt": '[{"id": 1, "role": "user", "content": "h'}, "looks like messages"),
    "another object": ({"prompt": {"0": "hi"}}, "prompt is {'0': 'hi'}; it is an object, but not messages"),
    "the answer last": ({"prompt": [*USER, {"role": "assistant", "content": "a"}]}, r"prompt\[1\] is of the role assistant"),
    "ChatML": ({"prompt": CHATML}, "what a chat template has made"),
    "Llama": ({"prompt": "<|begin_of_text|><|start_header_id|>user<|end_header_id|>\n\nhi<|eot_id|>"}, "what a chat template"),
    "Mistral": ({"prompt": "<s>[INST] hi [/INST]"}, "what a chat template"),
    "hh-rlhf": ({"prompt": "\n\nHuman: hi\n\nAssistant:"}, "what a chat template"),
}  # fmt: skip


@pytest.mark.parametrize("row, said", REFUSED.values(), ids=REFUSED)
def test_refused_conversations(tmp_path, row, said):
    with pytest.raises(UserError, match=f"rows.jsonl:1: .*{said}"):
        read(tmp_path, row | ITEMS)


CONVERSATIONS = {
    "the question in a template": ({"prompt": "Solve it: hi", "problem": "hi"}, "Solve it: hi"),
    "equal but for blanks": ({"prompt": "hi", "question": " hi\n"}, "hi"),
    "instruction + context": ({"instruction": "Sum up.", "context": "A cat.", "response": "x"}, "Sum up.\nA cat."),
    "context that is in the prompt": ({"prompt": "A cat. Who?", "context": "A cat."}, "A cat. Who?"),
    "numbers called context": ({"prompt": "hi", "context": [1, 2]}, "hi"),
    "empty media": ({"prompt": "hi", "tools": "[]", "images": [], "image": None, "audio": ""}, "hi"),
    "blank system messages": ({"prompt": "hi", "system": " ", "system_prompt": None}, "hi"),
    "the same system message twice": ({"prompt": "hi", "system": "S", "system_prompt": "S "}, "hi"),
    "markers in a question": ({"prompt": "What is <|im_start|>?"}, "What is <|im_start|>?"),
    "markers in a message": ({"messages": [{"role": "user", "content": CHATML}]}, CHATML),
    "the first turn beside all": ({"prompt": "hi", "messages": [*TURNS, *USER]}, "hi"),
    "parts as JSON": ({"messages": [{"role": "user", "content": '[{"type": "text", "text": "hi"}]'}]}, "hi"),
    "a subject called history": ({"prompt": "hi", "history": "Rome"}, "hi"),
    "an array": ({"prompt": "array([1, 2]) in numpy?"}, "array([1, 2]) in numpy?"),
}


@pytest.mark.parametrize("row, text", CONVERSATIONS.values(), ids=CONVERSATIONS)
def test_conversations(tmp_path, row, text):
    (query,) = read(tmp_path, row | ITEMS)
    assert query.messages[-1]["content"] == text


@pytest.mark.parametrize("history", [[["hi", "b"]], TURNS])
def test_history(tmp_path, history):
    """Earlier turns come before the question, as pairs or as messages."""
    (query,) = read(tmp_path, {"question": "c", "history": history} | ITEMS)
    assert query.messages == (*TURNS, {"role": "user", "content": "c"})


def test_data_fields_leave_material_out(tmp_path):
    (query,) = read(tmp_path, {"question": "Who?", "context": "A cat."} | ITEMS, fields={"prompt": "question"})
    assert query.messages == ({"role": "user", "content": "Who?"},)


# ---- ground truth ---------------------------------------------------------------------------------------------------

OBJECTS = [{"criterion": "c", "weight": 1}]
GROUND_TRUTHS = {
    "objects": ({"style": "rule", "ground_truth": OBJECTS}, None),
    "objects as JSON": ({"style": "model", "ground_truth": json.dumps(OBJECTS)}, None),
    "texts of a rubric": ({"style": "rubric", "ground_truth": ["c"]}, None),
    "an object that holds them": ({"ground_truth": json.dumps({"rubrics": OBJECTS})}, None),
    "an answer beside the rubric": ({"style": "rule", "ground_truth": "42", "rubrics": OBJECTS}, "42"),
    "a list of numbers is an answer": ({"style": "rule", "ground_truth": "[1, 2]", "rubrics": OBJECTS}, "[1, 2]"),
    "accepted answers": ({"style": "rule", "ground_truth": ["42", "forty-two"], "rubrics": OBJECTS}, None),
}


@pytest.mark.parametrize("reward_model, reference", GROUND_TRUTHS.values(), ids=GROUND_TRUTHS)
def test_ground_truth(tmp_path, reward_model, reference):
    """A ground truth is a rubric or an answer, never both."""
    (query,) = read(tmp_path, {"prompt": USER, "reward_model": reward_model})
    assert ([item.criterion for item in query.rubric], query.reference) == (["c"], reference)


@pytest.mark.parametrize("truth", [["42", "forty-two"], [{"input": "1", "output": "2"}], [{"name": "a", "text": "b"}]])
def test_answers_and_tests_are_no_rubric(tmp_path, truth):
    said = refusal(tmp_path, {"prompt": USER, "reward_model": {"style": "rule", "ground_truth": truth}})
    assert "hold no rubric" in said


def test_items_beside_the_rubric(tmp_path):
    said = refusal(tmp_path, {"prompt": "hi", "rubrics": ["a"], "negative_rubrics": ["b"]})
    assert "negative_rubrics is ['b']; it stands beside the rubric" in said


def test_two_references_or_answers_that_differ(tmp_path):
    """Refused unless the option says which counts. The end of a solution is its answer."""
    row = {"prompt": "hi", "reference": "a"} | ITEMS
    assert read(tmp_path, row | {"reference_answer": "a "})[0].reference == "a"
    with pytest.raises(UserError, match="reference_answer is 'b'; it differs from reference.*data.fields"):
        read(tmp_path, row | {"reference_answer": "b"})
    mapped = read(tmp_path, row | {"reference_answer": "b"}, fields={"reference": "reference_answer"})
    assert mapped[0].reference == "b"
    row = {"prompt": "hi", "answer": "so #### 42"}
    assert read(tmp_path, row | {"final_answer": 42}, criterion="Right?")[0].answer == "so #### 42"
    with pytest.raises(UserError, match="final_answer is 41; it differs from answer.*data.fields"):
        read(tmp_path, row | {"final_answer": 41}, criterion="Right?")


def test_marks_of_media_are_named_once(tmp_path, capsys):
    rows = [{"prompt": f"{mark}What is this? {i}"} | ITEMS for i, mark in enumerate(("<image>", "", "<|audio_1|>"))]
    read(tmp_path, *rows)
    said = capsys.readouterr().err
    assert said.count("warning") == 1 and "in their text: 2 (the first: <image> at " in said


# ---- rows to be judged ----------------------------------------------------------------------------------------------


def judged(tmp_path, row: dict, joined=True, **options):
    queries = {query.id: query for query in read(tmp_path, {"id": "q", "prompt": "hi"} | ITEMS)} if joined else None
    return read(tmp_path, row, require_response=True, queries=queries, **options)


def test_choices_have_their_own_numbers(tmp_path):
    """Choices come in the order of their own numbers, which are kept; equal or missing ones are counted."""

    def numbers(*indices):
        choices = [{"index": i, "message": {"content": f"{i}"}} for i in indices]
        return [(q.given.choice, q.response) for q in judged(tmp_path, {"id": "q", "choices": choices})]

    assert numbers(1, 0) == [(0, "0"), (1, "1")]
    assert numbers(3, 1) == [(1, "1"), (3, "3")]
    assert numbers(0, 0) == [(0, "0"), (1, "0")]
    assert numbers("1", "0") == [(0, "0"), (1, "1")]
    assert numbers(0) == [(None, "0")]
    assert numbers(2) == [(2, "2")]


DIFFERENT = {
    "prompt": ({"prompt": "ho"}, "prompt is 'ho'; it differs from the query 'q'"),
    "messages": ({"messages": [{"role": "user", "content": "ho"}]}, "messages is .*differs from the query 'q'"),
    "criterion": ({"rubric": ["d"]}, r"rubric is \['d'\]; it differs from that of the query 'q'"),
    "weight": ({"rubric": [{"criterion": "c", "weight": 2}]}, "rubric is .*differs from that of the query 'q'"),
}


@pytest.mark.parametrize("own, said", DIFFERENT.values(), ids=DIFFERENT)
def test_what_a_row_repeats_must_be_the_querys(tmp_path, own, said):
    with pytest.raises(UserError, match=said):
        judged(tmp_path, {"id": "q", "response": "x"} | own)


ALIKE = {
    "conversation with its answer": {"messages": [*USER, {"role": "assistant", "content": "x"}]},
    "system message in one": {"messages": [{"role": "system", "content": "S"}, *USER], "response": "x"},
    "vLLM's rendered prompt": {"prompt": CHATML, "prompt_token_ids": [1], "outputs": [{"index": 0, "text": "x"}]},
    "earlier results": {"response": "x", "rubric": [{"criterion": "c", "met": True}]},
}


@pytest.mark.parametrize("own", ALIKE.values(), ids=ALIKE)
def test_rows_that_repeat_their_query(tmp_path, own):
    (query,) = judged(tmp_path, {"id": "q"} | own)
    assert (query.response, query.messages, query.rubric[0].weight) == ("x", tuple(USER), 1)
    assert query.given.items == (({"met": True},) if "rubric" in own else ())


def test_ids_of_results_have_their_own_name(tmp_path):
    """``fields`` may map the queries' id; batch results call it custom_id all the same."""
    (query,) = judged(tmp_path, {"custom_id": "q", "response": "x"}, fields={"id": "id"})
    assert (query.given.id, query.given.fields) == ("q", {})


@pytest.mark.parametrize("choice", [{"text": "", "finish_reason": "error"}, {"status_code": 200, "body": None}])
def test_failed_requests(tmp_path, choice):
    with pytest.raises(UserError, match="failed"):
        judged(tmp_path, {"id": "q", "response": choice})


def test_a_tool_call_is_no_empty_response(tmp_path):
    choice = {"index": 0, "message": {"content": None, "tool_calls": [{"id": "x"}]}}
    with pytest.raises(UserError, match="choices is .*tool call"):
        judged(tmp_path, {"id": "q", "choices": [choice]})


# ---- files ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("names", [("health_train", "health_test"), ("train-0", "test-0"), ("a.train", "a.dev")])
def test_splits_are_known_anywhere_in_a_name(tmp_path, names):
    for name in names:
        (tmp_path / f"{name}.jsonl").write_text("{}\n")
    with pytest.raises(UserError, match="several splits"):
        find_files(str(tmp_path))


def test_words_that_hold_a_split(tmp_path):
    """Contest and trainer are no splits."""
    for name in ("contest", "trainer", "train"):
        (tmp_path / f"{name}.jsonl").write_text("{}\n")
    assert len(find_files(str(tmp_path))) == 3


def test_fields_and_columns_that_are_there_twice(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"prompt": "a", "prompt": "b", "rubric": ["c"]}\n')
    (tmp_path / "a.csv").write_text('prompt,prompt,rubric\na,b,"[""c""]"\n')
    for name, said in {"a.jsonl": "a.jsonl:1: .*'prompt' is there twice", "a.csv": "a.csv: .*'prompt' twice"}.items():
        with pytest.raises(UserError, match=said):
            read_queries([str(tmp_path / name)], "auto", None)
