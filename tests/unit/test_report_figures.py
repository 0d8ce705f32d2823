"""Unit tests of the report's figures: alarms on curves, curves by criterion and tag, the most credited texts, and their files.

Runs are written as training writes them. Leaves out how a figure looks, and resvg, which draws the PNG.
"""

import csv
import json
import re
from importlib.util import find_spec
from xml.etree import ElementTree

import pytest

from g2r_megatron.cli import main
from g2r_megatron.errors import UserError
from g2r_megatron.records.evaluations import step_directory
from g2r_megatron.report import write_figures, write_report
from g2r_megatron.report.credited import character_credit, credit_by_criterion, most_credited
from g2r_megatron.report.criteria import criterion_figures, ranked_criteria
from g2r_megatron.report.export import file_name
from g2r_megatron.report.figures import alarm_figures
from g2r_megatron.report.runs import load_groups, load_run
from test_report import HOSTILE, make_run, parse

ALARM = {
    "step": 20,
    "alarm": "gold_down",
    "curve": "eval/true_score",
    "value": 0.05,
    "threshold": 0.03,
    "advice": "stop",
}


def add_evaluation(run, step, met, gold, criterion="Advises a saline gargle", responses=4):
    """An evaluation of ``responses`` responses, of which the first ``met`` meet ``criterion``, and ``gold`` by the gold judge."""
    directory = step_directory(run, step)
    directory.mkdir(parents=True)
    rows = [
        {"items": [{"criterion": criterion, "weight": 5.0, "verdict": i < met, "gold": i < gold}]}
        for i in range(responses)
    ]
    (directory / "responses.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    tags = {"axis:accuracy": {"mean": met / responses, "error": 0.0, "count": responses}}
    (directory / "eval.json").write_text(json.dumps({"datasets": {"g2r": {"tags": tags}}}))


def add_alarm(run, **changes):
    with (run / "alarms.jsonl").open("a") as file:
        file.write(json.dumps(ALARM | changes) + "\n")


@pytest.fixture
def runs(tmp_path):
    """Two seeds; the second one has an alarm, and both have evaluations in which the judge is more pleased than the gold judge."""
    found = [make_run(tmp_path / f"seed{seed}", "robust", seed) for seed in (1, 2)]
    for number, run in enumerate(found):
        add_evaluation(run, 0, met=1, gold=1)
        add_evaluation(run, 50, met=3 + number, gold=2)
    add_alarm(found[1])
    return found


def test_an_alarm_is_a_mark_on_the_curve_it_watches(runs, tmp_path):
    """At its step, on its own run's curve; the page names it, its value and its threshold, and text in it cannot act."""
    (figure,) = [figure for figure in alarm_figures(load_groups(runs)) if "true_score" in figure.name]
    value = dict(load_run(runs[1]).series("eval/true_score"))[20]
    assert figure.curves[0].marks == [(20.0, value, "gold_down")]
    write_report(runs, tmp_path / "plain.html")
    page = (tmp_path / "plain.html").read_text()
    assert "seed 2: step 20 (0.05, threshold 0.03)" in page and page.count('class="alarm"') == 1
    add_alarm(runs[0], alarm=HOSTILE, advice=HOSTILE)
    write_report(runs, tmp_path / "hostile.html")
    assert set(parse(tmp_path / "hostile.html").tags) == set(parse(tmp_path / "plain.html").tags)


def test_a_run_without_alarms_says_so(tmp_path):
    """Silence is a result too."""
    write_report([make_run(tmp_path / "run", "robust", steps=3)], tmp_path / "report.html")
    assert "No alarm went on." in (tmp_path / "report.html").read_text()


def test_curves_by_criterion_are_shares_with_a_band_over_seeds(runs, tmp_path):
    """Mean and range of the judge's share over the seeds, the gold judge's as circles; the table has first and last."""
    (figure,) = criterion_figures(load_groups(runs))
    assert figure.chart.title == "Advises a saline gargle (+5)"
    assert figure.curves[0].points == [(0, 0.25, 0.25, 0.25), (50, 0.875, 0.75, 1.0)]
    assert figure.curves[0].dots == [(0, 0.25), (50, 0.5)]
    write_report(runs, tmp_path / "report.html")
    page = (tmp_path / "report.html").read_text()
    assert "0.25 → 0.88<small>gold 0.25 → 0.50</small>" in page and "Score of axis:accuracy" in page


def test_criteria_that_moved_the_score_come_first_and_rare_ones_have_no_curve(tmp_path):
    """By |weight| x responses x change. Evaluations after the last step of the metrics are another run's and left out."""
    run = make_run(tmp_path / "run", "robust", steps=10)
    for step, many, few in ((0, 1, 0), (10, 2, 3), (20, 0, 0)):
        add_evaluation(run, step, many, many, "many", responses=8)
        rows = step_directory(run, step) / "responses.jsonl"
        rare = [{"items": [{"criterion": "rare", "weight": -5.0, "verdict": i < few}]} for i in range(3)]
        rows.write_text(rows.read_text() + "".join(json.dumps(row) + "\n" for row in rare))
    groups = load_groups([run])
    assert ranked_criteria(groups) == ["rare", "many"]  # 5 x 3 x 1 against 5 x 8 x 1/8
    (figure,) = criterion_figures(groups)
    assert figure.chart.title == "many (+5)" and [x for x, *_ in figure.curves[0].points] == [0, 10]


def test_a_broken_evaluation_is_named(runs):
    """One line that names the directory, for JSON that another program wrote."""
    (step_directory(runs[0], 50) / "responses.jsonl").write_text('{"id": "a"}\n')
    with pytest.raises(UserError, match="step_00000050: not as an evaluation writes it") as error:
        load_run(runs[0])
    assert "\n" not in str(error.value)


def test_credit_of_a_token_lies_on_its_letters():
    """Blanks carry none beside letters; a blank token carries its own; a stop token's alpha has no text. Sums are kept."""
    credit = character_credit([" ab", "\n"], [0.5, 0.25, 0.25])
    assert credit == [0.0, 0.25, 0.25, 0.25]


def test_the_most_credited_words_are_those_the_attribution_names(runs):
    """The criterion's own words and sentence come first, with times of what a flat attribution would give them."""
    (group,) = load_groups(runs)
    own = {found.criterion: found for found in credit_by_criterion(group)}["Advises a saline gargle"]
    best = most_credited(own.words, 4)
    assert {word.text for word in best} <= {"gargle", "with", "warm", "salt", "water", "twice", "a"}
    assert all(word.credit > word.even > 0 and word.responses == own.responses for word in best)
    (first, *_) = most_credited(own.sentences, 3)
    assert first.text.startswith("Gargle with warm salt water")
    for table in (own.sentences, own.words):
        assert sum(entry.credit for entry in table.values()) <= own.responses + 1e-9


def test_figures_are_written_as_svg_and_csv(runs, tmp_path):
    """SVG is well-formed XML, loads nothing and has no markup of a criterion; CSV has the curve's numbers and the alarm."""
    add_evaluation(runs[0], 30, 2, 2, HOSTILE)
    names = write_figures(runs, tmp_path / "figures", ["svg", "csv"])
    files = {path.name for path in (tmp_path / "figures").iterdir()}
    assert files == {f"{file_name(name)}.{form}" for name in names for form in ("svg", "csv")}
    assert len(files) == 2 * len(names) and all(re.fullmatch(r"[a-z0-9_]+\.(svg|csv)", name) for name in files)
    for path in (tmp_path / "figures").glob("*.svg"):
        tags = {element.tag.split("}")[1] for element in ElementTree.parse(path).iter()}
        assert tags <= {"svg", "style", "rect", "text", "g", "path", "line", "circle", "polyline", "polygon"}
        assert not re.search(r"var\(|light-dark|href|url\(", path.read_text())
    with (tmp_path / "figures" / "criterion_1_advises_a_saline_gargle.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert rows[1] == {"curve": "robust", "kind": "line", "x": "50", "mean": "0.875", "low": "0.75", "high": "1.0"}
    assert "robust,alarm gold_down,20.0," in (tmp_path / "figures" / "alarms_eval_true_score.csv").read_text()


@pytest.mark.skipif(find_spec("resvg_py") is None, reason="resvg-py is not installed")
def test_figures_are_written_as_png(runs, tmp_path):
    """By the command line; each is a PNG of two pixels a unit."""
    figures = tmp_path / "figures"
    arguments = ["report", str(runs[0]), "--output", str(tmp_path / "report.html"), "--figures", str(figures)]
    assert main([*arguments, "--format", "png"]) == 0
    image = (figures / "learning.png").read_bytes()
    assert image.startswith(b"\x89PNG") and int.from_bytes(image[16:20], "big") == 2 * 630


def test_figures_that_cannot_be_written_are_refused(runs, tmp_path, monkeypatch, capsys):
    """A format without a place, and PNG without its package: one line, before anything is written."""
    assert main(["report", str(runs[0]), "--format", "png"]) == 2
    assert "--format: png; give --figures DIR" in capsys.readouterr().err
    monkeypatch.setattr("g2r_megatron.report.export.find_spec", lambda name: None)
    with pytest.raises(UserError, match="--format: png, but the package resvg-py is not installed"):
        write_figures(runs, tmp_path / "figures", ["png"])
    assert not (tmp_path / "figures").exists()
