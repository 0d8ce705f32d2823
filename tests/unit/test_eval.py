"""Scores of evaluations against the published definition, written down a second time here, on verdicts made up by us.

Rows of real HealthBench lend their points and tags where they are there. Leaves out sampling, judging and the command
(test_eval_command.py).
"""

import json
import random
from pathlib import Path

import numpy as np
import pytest

from g2r_megatron.cli import main
from g2r_megatron.config.options import VerdictJudgeConfig
from g2r_megatron.credit.judgements import ItemJudgement
from g2r_megatron.data.readers import read_queries
from g2r_megatron.data.types import Query, RubricItem
from g2r_megatron.eval.compare import RESAMPLES, compared, most_different
from g2r_megatron.eval.held_out import gold_metrics
from g2r_megatron.eval.records import Answer, data_key, judge_facts, record_of, write_results
from g2r_megatron.eval.scoring import Estimate, estimate, summary, tag_scores
from g2r_megatron.eval.table import summary_table
from g2r_megatron.records.evaluations import read_results

REAL = Path(__file__).parents[3] / "shared" / "data" / "healthbench_100.jsonl"
SEED = 7


def made_up(rows: int) -> list[Query]:
    """Rubrics with pitfalls, fractions, criteria of several tags and tags of pitfalls alone; rows with themes."""
    draw = random.Random(5)
    found = []
    for number in range(rows):
        items = [RubricItem("always", draw.choice([1.0, 3.0, 0.1]), ("axis:accuracy", "level:example"))]
        items += [
            RubricItem(
                f"c{k}", draw.choice([-9.0, -5.0, 0.3, 7.0]), tuple(draw.sample(["axis:a", "axis:b", "level:x"], k % 3))
            )
            for k in range(draw.randint(1, 12))
        ]
        items.append(RubricItem("pitfall", -8.0, ("axis:pitfalls",)))
        tags = (f"theme:{number % 3}", "group:all")
        found.append(
            Query(
                str(number),
                ({"role": "user", "content": f"q{number}"},),
                tuple(items),
                tags=tags,
                dataset="healthbench",
            )
        )
    return found


def judged(queries: list[Query], share: float) -> list[dict]:
    """Records with verdicts drawn at random."""
    draw = random.Random(11)
    answer = Answer("text", 5, True)
    rows = [[ItemJudgement(0.6, 0.3, draw.random() < share) for _ in query.rubric] for query in queries]
    return [record_of(query, 0, answer, row) for query, row in zip(queries, rows, strict=True)]


# ---- the published definition, a second time: plain loops, numpy's global generator ----------------------------------


def published_score(points: list[float], met: list[bool]) -> float | None:
    possible = sum(p for p in points if p > 0)
    return None if possible == 0 else sum(p for p, m in zip(points, met, strict=True) if m) / possible


def published(queries: list[Query], verdicts: list[list[bool]]) -> dict[str, tuple[float, float, int]]:
    """Metric -> (clipped mean, bootstrap standard deviation, count); "score" is the overall one."""
    values: dict[str, list[float]] = {}
    for query, met in zip(queries, verdicts, strict=True):
        points = [item.weight for item in query.rubric]
        metrics = {"score": published_score(points, met)} | dict.fromkeys(query.tags, published_score(points, met))
        for tag in {tag for item in query.rubric for tag in item.tags}:
            own = [k for k, item in enumerate(query.rubric) if tag in item.tags]
            score = published_score([points[k] for k in own], [met[k] for k in own])
            if score is not None:
                metrics[tag] = score
        for name, value in metrics.items():
            values.setdefault(name, []).append(value)
    found = {}
    for name, own in values.items():
        np.random.seed(SEED)
        means = [np.clip(np.mean(list(np.random.choice(own, len(own)))), 0, 1) for _ in range(1000)]
        found[name] = (float(np.clip(np.mean(own), 0, 1)), float(np.std(means)), len(own))
    return found


def assert_as_published(queries: list[Query], share: float) -> dict:
    records = judged(queries, share)
    expected = published(queries, [[item["verdict"] for item in record["items"]] for record in records])
    own = summary(records, SEED)["datasets"]["healthbench"]
    found = {"score": own["score"], **own["tags"]}
    assert {name: (e["mean"], e["error"], e["count"]) for name, e in found.items()} == expected  # to the last bit
    return expected


@pytest.mark.parametrize("share", [0.0, 0.2, 0.9])
def test_healthbench_to_the_last_digit(share):
    """Also where rows, and their mean, are below 0."""
    found = assert_as_published(made_up(37), share)
    assert "axis:pitfalls" not in found and found["theme:1"][2] == 12 and found["axis:a"][2] < 37
    assert 0 <= found["score"][0] <= 1


@pytest.mark.skipif(not REAL.is_file(), reason="needs the real rubric data in ../shared/data")
def test_points_and_tags_of_real_rows():
    queries = read_queries([str(REAL)], "auto", "raw")
    assert {query.dataset for query in queries} == {"healthbench"}
    found = assert_as_published(queries, 0.4)
    assert found["score"][2] == 100 and found["axis:completeness"][2] > 50


def test_a_row_is_not_clipped_but_the_mean_is():
    bad = Query("a", (), (RubricItem("good", 2.0), RubricItem("bad", -5.0)), dataset="healthbench")
    record = record_of(bad, 0, Answer("", 1, None), [ItemJudgement(0.1, 0.9, False), ItemJudgement(0.9, 0.1, True)])
    assert record["score"] == -2.5
    assert summary([record], SEED)["datasets"]["healthbench"]["score"] == {"mean": 0.0, "error": 0.0, "count": 1}
    other = {**record, "dataset": "rar"}
    assert summary([record, other], SEED)["datasets"]["rar"]["score"]["mean"] == -2.5


def test_tags_without_positive_points_have_no_score():
    assert tag_scores([True, True, False], [2.0, -1.0, 4.0], [["a"], ["a", "b"], ["c"]]) == {"a": 0.5, "c": 0.0}


def test_the_error_follows_the_seed():
    """Seed by seed it is that of the published draws, one sample after another."""
    values = [random.Random(n).random() for n in range(30)]
    long = [random.Random(n).gauss(0.2, 1) for n in range(301)]
    np.random.seed(SEED)
    draws = [float(np.mean(np.random.choice(long, len(long)))) for _ in range(1000)]
    assert estimate(long, False, SEED) == Estimate(float(np.mean(long)), float(np.std(draws)), 301)
    assert estimate(values, False, 1) == estimate(values, False, 1) != estimate(values, False, 2)
    assert estimate(values, False, 1).error == pytest.approx(np.std(values) / 30**0.5, rel=0.1)


ROWS = {
    "healthbench": {
        "prompt": [{"role": "user", "content": "q"}],
        "rubrics": [{"criterion": "c", "points": 2, "tags": ["axis:a"]}],
    },
    "rar": {"question": "q", "rubric": [{"description": "c", "title": "t", "weight": 2}]},
    "researchqa": {"query": "q", "rubric": [{"rubric_item": "c"}]},
    "g2r": {"prompt": "q", "rubric": [{"criterion": "c", "weight": 2}]},
}


@pytest.mark.parametrize("format", ["auto", "own"])
@pytest.mark.parametrize("dataset", ROWS)
def test_fields_tell_the_data_set(dataset, format, tmp_path):
    """And the tags of a HealthBench row come with it."""
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps({**ROWS[dataset], "example_tags": ["theme:hedging"]}))
    (query,) = read_queries([str(path)], format if format == "auto" else dataset, None)
    assert (query.dataset, query.tags) == (dataset, ("theme:hedging",))


def results(directory: Path, share: float = 0.5) -> dict:
    queries = made_up(6)
    facts = {"policy": "<i>p", "judge": judge_facts(VerdictJudgeConfig(model="m")), "data": data_key(queries)}
    return write_results(directory, facts, judged(queries, share), SEED)


def test_files_and_page(tmp_path):
    """What is written is read back; texts of rows and models cannot act in the page, which asks nothing of the network."""
    found = results(tmp_path / "a")
    kept, records = read_results(tmp_path / "a")
    assert kept == json.loads(json.dumps(found)) and len(records) == 6
    text = summary_table(found)
    assert (
        "healthbench, 6 rows" in text and "theme:1" in text and "level:example" not in text and "100% finished" in text
    )
    hostile = {
        **records[0],
        "response": "<script>alert(1)</script>\u202e",
        "prompt": [{"role": "user", "content": "<img src=x>"}],
    }
    hostile["items"] = [{**records[0]["items"][0], "criterion": "<b>c"}]
    write_results(tmp_path / "b", {name: found[name] for name in ("policy", "judge", "data")}, [hostile], SEED)
    page = (tmp_path / "b" / "eval.html").read_text()
    assert page.count("<script>") == 1 and "<img" not in page and "<i>p" not in page and "<b>c" not in page
    assert "http" not in page.replace("http-equiv", "") and "\u202e" not in page and "&lt;img src=x&gt;" in page


def test_the_digest_of_the_rows_knows_no_order():
    queries = made_up(4)
    assert data_key(queries) == data_key(queries[::-1]) == data_key([*queries, queries[0]]) != data_key(queries[:3])


def test_what_a_gold_judge_says():
    """Exploited: items that count for the response now and not before, and that the gold judge does not count."""
    rubric = (RubricItem("a", 2.0), RubricItem("b", 3.0), RubricItem("pitfall", -1.0), RubricItem("d", 4.0))

    def record(verdicts: list[bool], gold: list[bool]) -> dict:
        rows = [[ItemJudgement(0.5, 0.5, verdict) for verdict in own] for own in (verdicts, gold)]
        return record_of(Query("q", (), rubric), 0, Answer("", 1, True), *rows)

    before = record([False, True, True, False], [False, True, True, False])
    now = record([True, True, False, True], [False, True, True, True])
    metrics = gold_metrics([now], [before])
    assert metrics["eval/exploitation_rate"] == pytest.approx((2 + 1) / (2 + 1 + 4))
    assert metrics["eval/gold_agreement"] == 0.5 and metrics["eval/gold_score"] == pytest.approx((3 - 1 + 4) / 9)
    assert "eval/exploitation_rate" not in gold_metrics([now], [])


def test_comparison(tmp_path, capsys):
    """Against pairs drawn here one by one; A against itself has no difference, and the page no text that acts."""
    results(tmp_path / "a", 0.2), results(tmp_path / "b", 0.8)
    rows = [read_results(tmp_path / name)[1] for name in "ab"]
    own = compared(*rows, 3)["healthbench"]
    x, y = (np.array([record["score"] for record in side]) for side in rows)
    draws = np.random.RandomState(3)
    picked = [draws.choice(6, 6) for _ in range(RESAMPLES)]
    differences = [np.clip(y[i].mean(), 0, 1) - np.clip(x[i].mean(), 0, 1) for i in picked]
    assert own["difference"] == np.clip(y.mean(), 0, 1) - np.clip(x.mean(), 0, 1)
    assert (own["low"], own["high"]) == pytest.approx(tuple(np.quantile(differences, [0.025, 0.975])))
    assert (own["wins"], own["losses"]) == (sum(y > x), sum(x > y)) and own["wins"] and own["losses"]
    against = [d <= 0 if own["difference"] >= 0 else d >= 0 for d in differences]
    assert own["p"] == pytest.approx(min(1.0, 2 * np.mean(against)))
    same = compared(rows[0], rows[0], 3)["healthbench"]
    assert (same["difference"], same["low"], same["high"], same["p"], same["wins"], same["losses"]) == (
        0,
        0,
        0,
        1,
        0,
        0,
    )
    changes = [difference for difference, _, _ in most_different(*rows)]
    assert changes and sorted(map(abs, changes), reverse=True) == [abs(change) for change in changes]
    assert (
        main(["eval", "compare", str(tmp_path / "a"), str(tmp_path / "b"), "--output", str(tmp_path / "c.html")]) == 0
    )
    said = capsys.readouterr().out
    assert "healthbench, 6 rows" in said and f"{changes[0]:+.3f}" in said
    assert (tmp_path / "c.html").read_text().count("<script>") == 1


def test_only_results_on_the_same_rows_are_compared(tmp_path, capsys):
    found = results(tmp_path / "a")
    other = {name: found[name] for name in ("policy", "judge", "data")}
    records = read_results(tmp_path / "a")[1]
    write_results(tmp_path / "b", other | {"data": "another"}, records, SEED)
    write_results(tmp_path / "c", other | {"judge": {**found["judge"], "template": "?"}}, records, SEED)
    for name, said in (
        ("b", "results on different rows"),
        ("c", "judge.template differs"),
        ("d", "no eval.json in it"),
    ):
        assert main(["eval", "compare", str(tmp_path / "a"), str(tmp_path / name)]) == 2
        error = capsys.readouterr().err
        assert said in error and error.count("\n") == 1
