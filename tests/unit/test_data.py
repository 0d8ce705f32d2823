"""Readers and order: rows of the named formats are read, and every kind of mistake is one UserError with its place.

Other shapes of rows are in test_rows.py, files in test_row_files.py. Left out: the public RaR and ResearchQA files
themselves (only their field names, on handwritten rows).
"""

import copy
import json
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest

from g2r_megatron.data.order import epoch_batch
from g2r_megatron.data.readers import read_queries
from g2r_megatron.data.types import RubricItem
from g2r_megatron.errors import UserError

REAL = Path(__file__).parents[3] / "shared" / "data"
real_data = pytest.mark.skipif(not REAL.is_dir(), reason="needs the real rubric data in ../shared/data")

G2R = {
    "id": "a",
    "prompt": "note on fever",
    "rubric": [
        {"criterion": "names the fever", "weight": 3, "tags": ["symptom"], "check": "fever|pyrexia"},
        {"criterion": "alarms", "weight": -4.5},
    ],
    "reference": "pyrexia noted",
}
TURNS = [
    {"role": "user", "content": "hi"},
    {"role": "assistant", "content": "yes?"},
    {"role": "user", "content": "fever"},
]
HEALTHBENCH = {
    "prompt": TURNS,
    "prompt_id": "h1",
    "rubrics": [{"criterion": "Asks for the age.", "points": 5, "tags": ["axis:accuracy"]}],
    "example_tags": [],
    "ideal_completions_data": {"ideal_completion": "How old?", "ideal_completions_group": "x"},
}
VERL = {
    "prompt": TURNS,
    "data_source": "healthbench",
    "ability": "medical_chat",
    "reward_model": {"ground_truth": "", "rubrics": HEALTHBENCH["rubrics"], "style": "rubric"},
    "extra_info": {},
}
RAR = {
    "question": "Why is the sky blue?",
    "reference_answer": "Rayleigh scattering.",
    "question_source": "x",
    "rubric": [
        {"title": "Cause", "description": "Essential Criteria: Names Rayleigh scattering.", "weight": 5},
        {
            "title": "No ocean",
            "description": "Pitfall Criteria: Does not claim that the sea is mirrored.",
            "weight": -1,
        },
        {"title": "Mie", "description": "Pitfall Criteria: Confuses it with Mie scattering.", "weight": -2},
        {"title": "Assumes", "description": "Pitfall Criteria: Assumes that air does not scatter.", "weight": -1},
    ],
    "rubric_list": ["..."],
    "rubric_count": 4,
}
RESEARCHQA = {
    "id": 17,
    "general_domain": "Health",
    "subdomain": "Medicine",
    "field": "Cardiology",
    "query": "Do statins help?",
    "date": "2024-01-01",
    "rubric": [{"rubric_item": "Does it cite a trial?", "type": "Citation"}],
}


def write(path: Path, *rows: dict) -> str:
    if path.suffix == ".parquet":
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(list(rows)), path)
    else:
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def changed(row: dict, *place, to) -> dict:
    """A copy of ``row`` with the value at ``place`` (keys and indices) replaced, or removed when ``to`` is ``...``."""
    row = copy.deepcopy(row)
    target = row
    for key in place[:-1]:
        target = target[key]
    if to is ...:
        del target[place[-1]]
    else:
        target[place[-1]] = to
    return row


@pytest.mark.parametrize("suffix", ["jsonl", "parquet"])
@pytest.mark.parametrize(
    "row, id, messages, first, reference",
    [
        (G2R, "a", 1, RubricItem("names the fever", 3.0, ("symptom",), "fever|pyrexia"), "pyrexia noted"),
        (HEALTHBENCH, "h1", 3, RubricItem("Asks for the age.", 5.0, ("axis:accuracy",)), "How old?"),
        (VERL, None, 3, RubricItem("Asks for the age.", 5.0, ("axis:accuracy",)), None),
        (
            RAR,
            None,
            1,
            RubricItem("Essential Criteria: Names Rayleigh scattering.", 5.0, ("Cause",)),
            "Rayleigh scattering.",
        ),
        (RESEARCHQA, "17", 1, RubricItem("Does it cite a trial?", 1.0, ("Citation",)), None),
    ],
    ids=["g2r", "healthbench", "verl", "rar", "researchqa"],
)
def test_every_format(tmp_path, suffix, row, id, messages, first, reference):
    """Each format, as jsonl and as parquet, gives the same query; without an id of its own a row gets a stable hash."""
    if suffix == "parquet" and row is VERL:
        row = changed(row, "extra_info", to={"index": 1})  # parquet cannot write an empty struct
    (query,) = read_queries([write(tmp_path / f"x.{suffix}", row)], "auto", "raw")
    assert query.id == id if id else len(query.id) == 16
    assert len(query.messages) == messages and query.messages[-1]["role"] == "user"
    assert (query.rubric[0], query.reference, query.response) == (first, reference, None)
    assert read_queries([write(tmp_path / f"y.{suffix}", row)], "auto", "raw")[0].id == query.id


@real_data
def test_real_healthbench_rows():
    """100 real rows: ids, roles, weights and tags survive; the parquet form holds equal conversations and rubrics."""
    path = REAL / "healthbench_100.jsonl"
    raw = [json.loads(line) for line in path.read_text().splitlines()]
    queries = read_queries([str(path)], "auto", "raw")
    assert [q.id for q in queries] == [r["prompt_id"] for r in raw]
    for query, row in zip(queries, raw, strict=True):
        assert [dict(m) for m in query.messages] == row["prompt"]
        read = [{"criterion": i.criterion, "points": i.weight, "tags": list(i.tags)} for i in query.rubric]
        assert read == row["rubrics"]
    verl = read_queries([str(REAL / "healthbench_10_verl.parquet")], "healthbench", "raw")
    known = {q.messages: q for q in (_frozen(q) for q in queries)}
    assert len(verl) == 10
    for query in map(_frozen, verl):
        assert query.messages not in known or query.rubric == known[query.messages].rubric


def _frozen(query):
    return type(query)(query.id, tuple(tuple(sorted(m.items())) for m in query.messages), query.rubric)


def test_polarity(tmp_path):
    """flip_negated turns pitfalls that open with a negation, and only those; raw keeps all; HealthBench refuses it."""
    path = write(tmp_path / "x.jsonl", RAR)
    assert [i.weight for i in read_queries([path], "auto", "raw")[0].rubric] == [5, -1, -2, -1]
    assert [i.weight for i in read_queries([path], "auto", "flip_negated")[0].rubric] == [5, 1, -2, -1]
    for opening, sign in {
        "Doesn't": 1,
        "doesn’t": 1,
        "Avoids": 1,
        "Never": 1,
        "Voids": -1,
        "Does note": -1,
        "Fails": -1,
    }.items():
        row = changed(G2R, "rubric", 1, "criterion", to=f"{opening} alarm")
        assert read_queries([write(path_of(tmp_path), row)], "auto", "flip_negated")[0].rubric[1].weight == sign * 4.5
    only_pitfalls = changed(RAR, "rubric", to=[RAR["rubric"][1]])
    assert read_queries([write(path_of(tmp_path), only_pitfalls)], "auto", "flip_negated")[0].positive_weight == 1
    with pytest.raises(UserError, match="data.polarity"):
        read_queries([write(path_of(tmp_path), HEALTHBENCH)], "auto", "flip_negated")


def path_of(tmp_path: Path) -> Path:
    return tmp_path / "row.jsonl"


def test_responses(tmp_path):
    """Rows to be judged carry a response, which may be empty; several to one query are fine, also the same one twice.

    Rows that may lack it give a query without one, and then need an id of their own.
    """
    rows = [G2R | {"response": "fever"}, G2R | {"response": "rash"}]
    queries = read_queries([write(tmp_path / "x.jsonl", *rows)], "auto", "raw", require_response=True)
    assert [q.response for q in queries] == ["fever", "rash"]
    assert read_queries([write(tmp_path / "x.jsonl", rows[0])], "auto", "raw")[0].response is None
    for bad, found in [
        (G2R, "hold no response"),
        (G2R | {"response": []}, "response is"),
        (G2R | {"response": 3}, "is 3"),
    ]:
        with pytest.raises(UserError, match=found):
            read_queries([write(tmp_path / "x.jsonl", bad)], "auto", "raw", require_response=True)
    same = [rows[0], rows[0], G2R | {"response": ""}, G2R | {"response": None}]
    queries = read_queries([write(tmp_path / "x.jsonl", *same)], "auto", "raw", require_response=True)
    assert [q.response for q in queries] == ["fever", "fever", "", ""]

    def mixed(*rows: dict) -> list[str | None]:
        file = write(tmp_path / "x.jsonl", *rows)
        found = read_queries([file], "auto", "raw", require_response=True, may_lack_response=True)
        return [query.response for query in found]

    assert mixed(rows[0], G2R, G2R | {"response": None}) == ["fever", None, ""]
    with pytest.raises(UserError, match="is also at"):
        mixed(G2R, G2R)


BAD_ROWS = {
    "prompt missing": (changed(HEALTHBENCH, "prompt", to=...), "hold no conversation"),
    "no fields known": ({"text": "x"}, r"fields \['text'\] hold no conversation .*give one of prompt, messages"),
    "rubric missing": (changed(G2R, "rubric", to=...), "hold no rubric .*give one of rubric, rubrics"),
    "rubric empty": (changed(G2R, "rubric", to=[]), r"rubric is \[\]"),
    "rubric a text": (changed(G2R, "rubric", to="x"), "rubric is 'x'"),
    "item a text": (changed(G2R, "rubric", 1, to="x"), r"rubric\[1\] is 'x'"),
    "criterion missing": (changed(G2R, "rubric", 0, "criterion", to=...), r"rubric\[0\]: fields .* hold no criterion"),
    "criterion blank": (changed(G2R, "rubric", 0, "criterion", to=" "), r"rubric\[0\].criterion is ' '"),
    "weight a word": (changed(G2R, "rubric", 0, "weight", to="much"), "weight is 'much'.*essential, important"),
    "weight a list": (changed(G2R, "rubric", 0, "weight", to=[3]), r"weight is \[3\]"),
    "weight NaN": (changed(G2R, "rubric", 0, "weight", to=float("nan")), "weight is nan"),
    "weight infinite": (changed(G2R, "rubric", 0, "weight", to=float("inf")), "weight is inf"),
    "weight too large": (changed(G2R, "rubric", 0, "weight", to=10**400), "weight is 1000"),
    "weight true": (changed(G2R, "rubric", 0, "weight", to=True), "weight is True"),
    "verl rubrics missing": (changed(VERL, "reward_model", "rubrics", to=...), "hold no rubric"),
    "rubric_item missing": (changed(RESEARCHQA, "rubric", 0, "rubric_item", to=...), "hold no criterion"),
    "no positive weight": (changed(G2R, "rubric", 0, "weight", to=0), "positive weight"),
    "tags a number": (changed(G2R, "rubric", 0, "tags", to=3), "tags is 3"),
    "check broken": (changed(G2R, "rubric", 0, "check", to="(x"), r"check is '\(x'.*regular expression"),
    "check a number": (changed(G2R, "rubric", 0, "check", to=1), "check is 1"),
    "prompt blank": (changed(G2R, "prompt", to="  "), "prompt is '  '"),
    "prompt empty": (changed(G2R, "prompt", to=[]), r"prompt is \[\]"),
    "prompt a number": (changed(G2R, "prompt", to=3), "prompt is 3"),
    "surrogate": (changed(G2R, "prompt", to="a\ud800"), "valid Unicode"),
    "message a text": (changed(G2R, "prompt", to=["x"]), r"prompt\[0\] is 'x'"),
    "role unknown": (changed(HEALTHBENCH, "prompt", 0, "role", to="doctor"), r"prompt\[0\].role is 'doctor'"),
    "role missing": (changed(HEALTHBENCH, "prompt", 0, "role", to=...), r"prompt\[0\].role is missing"),
    "content blank": (changed(HEALTHBENCH, "prompt", 2, "content", to=""), r"prompt\[2\].content is ''"),
    "ends with assistant": (changed(HEALTHBENCH, "prompt", to=TURNS[:2]), "last message"),
    "id a list": (changed(G2R, "id", to=["a"]), "id is"),
    "reference a number": (changed(G2R, "reference", to=3), "reference is 3"),
}


@pytest.mark.parametrize("row, found", BAD_ROWS.values(), ids=BAD_ROWS.keys())
def test_bad_rows(tmp_path, row, found):
    """Each kind of bad row is one line that names file:line, the field and its value."""
    good = [_good_like(row)]
    with pytest.raises(UserError, match=found) as error:
        read_queries([write(tmp_path / "x.jsonl", *good, row)], "auto", "raw")
    assert str(error.value).startswith(f"{tmp_path}/x.jsonl:{len(good) + 1}: ") and "\n" not in str(error.value)


def _good_like(row: dict) -> dict:
    formats = {"reward_model": VERL, "rubrics": HEALTHBENCH, "question": RAR, "query": RESEARCHQA}
    good = next((good for field, good in formats.items() if field in row), G2R)
    return good | {"id": "good", "prompt": "another"} if "prompt" in good else good | {"id": "good"}


def test_bad_files(tmp_path):
    """Missing and empty files, unknown extensions, broken JSON, encoding or parquet: each names file (and line)."""
    good = json.dumps(G2R).encode() + b"\n"
    cases = {
        "not JSON": ("a.jsonl", good + b"\n{oops\n", ":3: "),
        "not UTF-8": ("b.jsonl", good + b'{"id": "\xff"}\n', ":2: "),
        "not an object": ("c.jsonl", good + b"[1]\n", ":2: "),
        "no rows": ("d.jsonl", b"\n", ": "),
        "unknown extension": ("e.txt", good, ": "),
        "not a readable parquet": ("f.parquet", good, ": "),
    }
    for found, (name, content, place) in cases.items():
        (tmp_path / name).write_bytes(content)
        with pytest.raises(UserError, match=found) as error:
            read_queries([str(tmp_path / name)], "auto", "raw")
        assert str(error.value).startswith(f"{tmp_path}/{name}{place}") and "\n" not in str(error.value)
    with pytest.raises(UserError, match="no such file"):
        read_queries([str(tmp_path / "none.jsonl")], "auto", "raw")
    bad = changed(RAR, "rubric", 0, "weight", to=float("nan"))
    with pytest.raises(UserError, match="parquet:row 2: .*weight is nan"):
        read_queries([write(tmp_path / "g.parquet", RAR | {"question": "other"}, bad)], "auto", "raw")


def test_format_mismatch_and_duplicates(tmp_path):
    """A format that the fields contradict names the right one; one id twice names both places, also across files."""
    first, second = write(tmp_path / "x.jsonl", G2R), write(tmp_path / "y.jsonl", G2R)
    with pytest.raises(UserError, match="data.format is rar.*g2r"):
        read_queries([first], "rar", "raw")
    with pytest.raises(UserError, match=r"y.jsonl:1: id 'a' is also at .*x.jsonl:1"):
        read_queries([first, second], "auto", "raw")
    for paths in ([first, first], [write(tmp_path / "z.jsonl", RAR, RAR)]):
        with pytest.raises(UserError, match="also at"):
            read_queries(paths, "auto", "raw")
    assert len(read_queries([first, write(tmp_path / "z.jsonl", RAR)], "auto", "raw")) == 2


RUBRICS = {"rubric", "rubrics", "rubric_list", "rubric_count"}


@pytest.mark.parametrize(
    "row", [G2R, HEALTHBENCH, VERL, RAR, RESEARCHQA], ids=["g2r", "healthbench", "verl", "rar", "researchqa"]
)
@pytest.mark.parametrize("format", ["auto", "named"])
def test_rows_without_a_rubric(tmp_path, row, format):
    """Where a reward model judges they are queries all the same, with an empty rubric; elsewhere the error is as ever."""
    names = {id(G2R): "g2r", id(HEALTHBENCH): "healthbench", id(VERL): "healthbench", id(RAR): "rar"}
    name = "auto" if format == "auto" else names.get(id(row), "researchqa")
    bare = {key: value for key, value in row.items() if key not in RUBRICS}
    if "reward_model" in bare:
        bare["reward_model"] = {"ground_truth": "42"}
    (query,) = read_queries([write(tmp_path / "x.jsonl", bare)], name, "raw", require_rubric=False)
    (whole,) = read_queries([write(tmp_path / "y.jsonl", row)], "auto", "raw", require_rubric=False)
    assert query.rubric == () and query.messages == whole.messages and whole.rubric
    with pytest.raises(UserError, match="hold no rubric"):
        read_queries([write(tmp_path / "x.jsonl", bare)], name, "raw")


@pytest.mark.parametrize("shuffle", [True, False])
@pytest.mark.parametrize("num, batch", [(10, 3), (7, 5), (5, 5), (6, 4), (9, 1), (100, 32)])
def test_order(num, batch, shuffle):
    """Every epoch holds every query once, no batch repeats a query, and any step can be asked for first."""
    steps = [epoch_batch(num, batch, step, 1, shuffle) for step in range(3 * num)]
    assert all(len(set(indices)) == batch for indices in steps)
    stream = [index for indices in steps for index in indices]
    for start in range(0, len(stream), num):
        assert sorted(stream[start : start + num]) == list(range(num))
    epoch_batch.__globals__["_epoch_order"].cache_clear()
    assert all(epoch_batch(num, batch, step, 1, shuffle) == steps[step] for step in reversed(range(3 * num)))


def test_order_depends_on_seed_and_epoch_only_when_shuffled():
    """Seeds and epochs differ when shuffled, file order otherwise; more prompts a step than queries is an error."""
    assert epoch_batch(50, 50, 0, 1, True) != epoch_batch(50, 50, 0, 2, True)
    assert epoch_batch(50, 50, 0, 1, True) != epoch_batch(50, 50, 1, 1, True)
    assert epoch_batch(5, 3, 1, 1, False) == [3, 4, 0]
    with pytest.raises(UserError, match="prompts_per_step"):
        epoch_batch(5, 6, 0, 1, True)
