"""Unit tests of the report: derived numbers, grouping of seeds, the terminal table, and a page that is safe and complete.

Leaves out how the page looks; the script in it runs in a browser only.
"""

import json
import math
import random
import re
from html.parser import HTMLParser

import pytest
import yaml

from g2r_megatron.config.options import LogConfig
from g2r_megatron.errors import UserError
from g2r_megatron.records.heartbeat import Heartbeat, described, read_heartbeat
from g2r_megatron.records.metrics_log import MetricsLog
from g2r_megatron.report import summary_table, write_report
from g2r_megatron.report.charts import Chart, Curve, line_chart, nice_ticks
from g2r_megatron.report.heatmap import attributed, pick_samples
from g2r_megatron.report.runs import load_groups, load_run
from g2r_megatron.report.text import visible

NOTE = (
    "I am sorry about the sore throat and the runny nose . Gargle with warm salt water twice a day . "
    "Please do not take penicillin because of the allergy . Keep taking metformin as before ."
)
CRITERIA = (
    ("Acknowledges the pharyngitis", 3, True, (5, 6)),
    ("Advises a saline gargle", 5, True, (12, 15)),
    ("Warns against amoxicillin-type antibiotics", 5, True, (20, 25)),
    ("Continues the biguanide", 4, True, (32, 35)),
    ("Suggests the allergen", -5, False, ()),
    ("Raises alarm", -4, True, (1, 4)),
)
VOID_TAGS = ("meta", "link", "img", "br", "hr", "input")
CURVES = {"grpo": (0.69, 18.0), "paper": (0.62, 26.0), "robust": (0.70, 8.0)}  # (final score, steps of the rise)
HOSTILE = "</script><script>alert(1)</script><img src=x onerror=alert(2)>\"'&\u202e\x00\ud83d"


def make_run(directory, preset, seed=1, steps=50, truth=True, options=None, sample_text=NOTE):
    """A run directory as training leaves it, with curves of the shape that training has."""
    rng = random.Random(f"{preset}{seed}")
    config = {"output_dir": str(directory), "steps": steps, "seed": seed, "grpo": {"preset": preset, **(options or {})}}
    log = MetricsLog(directory, LogConfig(tensorboard=False), {})
    (directory / "config.yaml").write_text(yaml.safe_dump(config))
    for step in range(steps + 1):
        metrics = _train_metrics(preset, step, steps, rng, truth) if step else {}
        if step % 10 == 0:
            metrics |= _eval_metrics(preset, step, rng, truth)
        log.log(step, metrics)
        if step % 10 == 0:
            log.sample(_sample(preset, max(step, 1), sample_text, random.Random(step), truth))
    return directory


def _score(preset, step, rng, noise):
    final, rise = CURVES.get(preset, (0.6, 20.0))
    return 0.41 + (final - 0.41) * (1 - math.exp(-step / rise)) / (1 - math.exp(-50 / rise)) + rng.gauss(0, noise)


def _eval_metrics(preset, step, rng, truth):
    score = _score(preset, step, rng, 0.006)
    metrics = {"eval/judge_score": score + 0.015, "eval/length_mean": 30.0 + step / 10}
    return metrics | ({"eval/true_score": score} if truth else {})


def _train_metrics(preset, step, steps, rng, truth):
    score = _score(preset, step, rng, 0.03)
    uses = preset == "paper" or (preset == "robust" and step < 0.6 * steps)
    judge, ramp = (0.55 if uses else 0.3), (1.3 if preset == "paper" else 0.0)
    metrics = {
        "reward/mean": score + 0.02, "reward/std": 0.2, "group/zero_variance_share": abs(rng.gauss(0.05, 0.03)),
        "response/length_mean": 30 + (9 * step / steps if preset == "paper" else 0) + rng.gauss(0, 0.5),
        "response/finished_share": 0.97, "judge/true_share": 0.5, "loss/policy": rng.gauss(0, 0.01), "loss/kl": 0.004 * math.sqrt(step),
        "ratio/mean": 1.0, "ratio/clip_share": abs(rng.gauss(0.08, 0.02)), "optimizer/grad_norm": 1 + rng.random(), "optimizer/lr": 5e-4,
        "time/sample": 0.5 + 0.02 * rng.random(), "time/judge": judge, "time/update": 0.42, "time/step": 0.97 + judge,
        "advantage/stop_token": -1.1 * ramp + rng.gauss(0, 0.04),
    }  # fmt: skip
    metrics |= {f"advantage/position_{d}": ramp * (4.5 - d) / 4.5 + rng.gauss(0, 0.05) for d in range(10)}
    if truth:
        metrics |= {"reward/true_mean": score, "judge/gap": rng.gauss(0.02, 0.01), "judge/agreement": 0.988}
    if uses:
        ess, cos, key = (0.97, 0.009, 0.08) if preset == "paper" else (0.45, 0.21, 0.36)
        metrics |= {
            "attribution/ess_share": ess + rng.gauss(0, 0.01), "attribution/flat_share": 0.8 if preset == "paper" else 0.02,
            "attribution/max_alpha": 0.05 if preset == "paper" else 0.16, "attribution/cos_median": cos + rng.gauss(0, 0.001),
            "attribution/key_token_mass": key, "attribution/key_token_chance": 0.07, "attribution/passes": 180.0,
            "attribution/zero_or_nonfinite": 0.0,
        }  # fmt: skip
    return metrics


def _sample(preset, step, text, rng, truth):
    tokens = re.findall(r"\S+\s*", text)
    items = []
    for criterion, weight, verdict, (*span,) in CRITERIA:
        alpha = None
        if verdict and preset != "grpo":
            sharpness = 0.2 if preset == "paper" else 2.6
            inside = [bool(span) and span[0] - 1 <= t <= span[1] for t in range(len(tokens))]
            raw = [math.exp(sharpness * (rng.random() * 0.5 + near)) for near in inside]
            alpha = [value / sum(raw) for value in raw]
        items.append(
            {"criterion": criterion, "weight": weight, "verdict": verdict, "p_true": 0.97 if verdict else 0.02,
             "truth": (verdict if weight > -4 else False) if truth else None, "alpha": alpha}
        )  # fmt: skip
    rewards = [sum(i["weight"] * i["alpha"][t] for i in items if i["alpha"]) / 17 for t in range(len(tokens))]
    advantages = [rng.gauss(0, 0.2) + 30 * reward - 0.6 for reward in rewards]
    return {
        "step": step, "query_id": "note-17", "prompt": "My throat hurts and my nose runs. I take Glucophage; Amoxil gave me a rash.",
        "response": text, "reward": 0.76, "true_reward": 0.76 if truth else None, "tokens": tokens,
        "advantages": [*advantages, -0.3], "token_rewards": [*rewards, 0.0], "items": items,
    }  # fmt: skip


@pytest.fixture
def runs(tmp_path):
    return [make_run(tmp_path / f"{preset}-{seed}", preset, seed) for preset in CURVES for seed in (1, 2)]


class PageParser(HTMLParser):
    """Tags, attributes and text of a page; fails on a tag that is closed out of order."""

    def __init__(self):
        super().__init__()
        self.tags, self.attributes, self.text, self._open = [], [], [], []

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += attrs
        if tag not in VOID_TAGS:
            self._open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += attrs

    def handle_endtag(self, tag):
        assert self._open.pop() == tag, f"</{tag}> out of order"

    def handle_data(self, data):
        self.text.append(data)


def parse(path):
    parser = PageParser()
    parser.feed(path.read_text(encoding="utf-8"))
    parser.close()
    assert parser._open == []
    return parser


def test_steps_to_target_is_the_first_three_step_mean_that_reaches_it(tmp_path):
    """The trailing mean of three batches decides, seconds are summed up to that step. Leaves out other window sizes."""
    scores = [0.9, 0.1, 0.1, 0.64, 0.66, 0.65, 0.9]
    log = MetricsLog(tmp_path, LogConfig(tensorboard=False), {})
    (tmp_path / "config.yaml").write_text("seed: 1\n")
    for step, score in enumerate(scores, 1):
        log.log(step, {"reward/true_mean": score, "time/step": 2.0})
    run = load_run(tmp_path)
    assert (run.steps_to_target, run.seconds_to_target) == (6, 12.0)
    log.truncate_after(5)
    assert (load_run(tmp_path).steps_to_target, load_run(tmp_path).seconds_to_target) == (None, None)


def test_before_after_and_gap_come_from_the_first_and_last_evaluation(tmp_path):
    """A line that adds evaluation to a step already logged is merged; null values count as not logged."""
    log = MetricsLog(tmp_path, LogConfig(tensorboard=False), {})
    (tmp_path / "config.yaml").write_text("grpo: {preset: robust}\n")
    log.log(0, {"eval/true_score": 0.4, "eval/judge_score": 0.5})
    log.log(1, {"reward/mean": float("nan")})
    log.log(1, {"eval/true_score": 0.7, "eval/judge_score": 0.72})
    run = load_run(tmp_path)
    assert len(run.rows) == 2 and run.series("reward/mean") == []
    assert run.change("eval/true_score") == (0.4, 0.7)
    assert run.judge_gap == pytest.approx(0.02)


def test_seeds_are_grouped_and_variants_are_told_apart(runs, tmp_path):
    """Runs that differ in the seed alone form a group with mean and spread; other options make a named variant."""
    variant = make_run(tmp_path / "variant", "paper", 1, options={"clip_low": 0.3})
    groups = load_groups([*runs, variant, runs[0]])
    assert [(group.label, len(group.runs)) for group in groups[:1] + groups[2:3]] == [("grpo", 2), ("robust", 2)]
    assert len({group.slot for group in groups}) == 4
    assert groups[3].label == "paper (grpo.clip_low=0.3)" and groups[1].label.startswith("paper")
    points = groups[0].curve(lambda run: run.series("eval/true_score"))
    ends = [run.change("eval/true_score")[1] for run in groups[0].runs]
    assert points[-1] == (50, pytest.approx(sum(ends) / 2), min(ends), max(ends))


def test_a_preset_keeps_its_colour(tmp_path):
    """Alone or among others, in any order, a preset has the same slot."""
    robust, grpo = (make_run(tmp_path / name, name) for name in ("robust", "grpo"))
    assert [g.slot for g in load_groups([robust])] == [2]
    assert [g.slot for g in load_groups([robust, grpo])] == [2, 0]


def test_terminal_table_says_what_was_measured(runs):
    """Plain text, no control codes: a line a preset and a seed, with spread, and failures named."""
    table = summary_table(runs)
    assert all(character.isprintable() for line in table.splitlines() for character in line)
    lines = {line.split()[0]: line for line in table.splitlines() if line.strip()}
    assert re.search(r"0\.4\d\d \(0\.\d{3}–0\.\d{3}\)", lines["grpo"]) and "not in 50" in lines["paper"]
    assert table.count("seed 1") == 3 and "+0.015" in lines["robust"]


def test_table_without_truth_shows_the_judge_score(tmp_path):
    """A task without checks has no true score: judge scores, and no column that would be empty."""
    table = summary_table([make_run(tmp_path / "a", "robust", truth=False)])
    assert "judge score, held-out prompts" in table and "0.65" not in table


def test_page_stands_alone_and_is_well_formed(runs, tmp_path):
    """Tags nest, nothing is fetched, one script whose hash the page's policy names. Leaves out the script's behaviour."""
    write_report(runs, tmp_path / "report.html")
    page = parse(tmp_path / "report.html")
    assert page.tags.count("script") == 1 and not {"link", "img", "iframe", "object"} & set(page.tags)
    assert not any(name in ("src", "href", "action") or name.startswith("on") for name, _ in page.attributes)
    text = (tmp_path / "report.html").read_text()
    assert not re.search(r"https?:|url\(|@import", text) and "default-src 'none'" in text.replace("&#x27;", "'")
    assert "nan" not in " ".join(value or "" for name, value in page.attributes if name in ("points", "x1", "y", "cy"))
    for heading in (
        "Learning",
        "Where the credit goes",
        "Hazards and attribution health",
        "Position ramp",
        "Seconds a step",
    ):
        assert heading in page.text


@pytest.mark.parametrize("truth", [True, False])
def test_hostile_text_stays_text(tmp_path, truth):
    """Markup, NUL, direction overrides and lone surrogates in a response add no tag and lose no visible character."""
    plain = make_run(tmp_path / "plain", "robust", sample_text="x " + NOTE, truth=truth)
    hostile = make_run(tmp_path / "hostile", "robust", sample_text=HOSTILE + " " + NOTE, truth=truth)
    config = hostile / "config.yaml"
    config.write_text(config.read_text() + "note: '<script>alert(3)</script>'\n")
    write_report([plain], tmp_path / "plain.html")
    write_report([hostile], tmp_path / "hostile.html")
    page = parse(tmp_path / "hostile.html")
    assert set(page.tags) == set(parse(tmp_path / "plain.html").tags) and page.tags.count("script") == 1
    assert "</script><script>alert(1)</script>" in "".join(page.text)
    assert not set("\u202e\x00") & set((tmp_path / "hostile.html").read_text(encoding="utf-8"))
    assert visible("a\u200b<b>\n") == "a\ufffd&lt;b&gt;\n"


def test_heat_map_prefers_the_response_that_presets_share(runs):
    """One sample for each preset with attributions, the same response where both drew it, the sharpest first."""
    picked = pick_samples(load_groups(runs))
    assert [p.group.label for p in picked] == ["robust", "paper"]
    assert picked[0].sample["response"] == picked[1].sample["response"] and picked[0].sample["step"] == 1
    assert picked[0].ess_share < picked[1].ess_share
    assert [item["weight"] for item in attributed(picked[0].sample)] == [3, 5, 5, 4, -4]


def test_unusable_attributions_are_left_out():
    """No alpha, one with a value that was not finite, an empty and an all-zero one are not drawn."""
    alphas = [None, [0.5, None], [], [0.0, 0.0], [0.5, 0.5]]
    assert attributed({"items": [{"alpha": alpha} for alpha in alphas]}) == [{"alpha": [0.5, 0.5]}]


def test_a_run_of_one_step_and_one_without_samples_are_drawn(tmp_path):
    """The report works from the first line on: few numbers, no samples, no evaluation."""
    directory = make_run(tmp_path / "short", "robust", steps=1)
    (directory / "samples.jsonl").unlink()
    write_report([directory], tmp_path / "report.html")
    assert "No attribution was logged" in (tmp_path / "report.html").read_text()
    (directory / "metrics.jsonl").write_text('{"step": 0, "reward/mean": null}\n')
    write_report([directory], tmp_path / "report.html")
    assert "Too few steps" in (tmp_path / "report.html").read_text() and "–" in summary_table([directory])


@pytest.mark.parametrize(("value", "flagged"), [(0.002, False), (0.3, True)])
def test_a_sampler_far_from_the_trainer_is_marked(tmp_path, value, flagged):
    """A vLLM engine's metrics; the table has no row of them where no run logged any."""
    log = MetricsLog(make_run(tmp_path / "run", "robust", steps=1), LogConfig(tensorboard=False), {})
    write_report([tmp_path / "run"], tmp_path / "report.html")
    assert "Corrected tokens" not in (tmp_path / "report.html").read_text()
    log.log(2, {"rollout/kl": value, "rollout/corrected_share": value})
    log.close()
    write_report([tmp_path / "run"], tmp_path / "report.html")
    page = (tmp_path / "report.html").read_text()
    for label in ("Sampler and trainer", "Corrected tokens"):
        (shown,) = re.findall(rf"<td>{label} <span.*?</span></td><td(.*?)>(.*?)</td></tr>", page)
        assert (shown[0], float(shown[1])) == (" class=flag" if flagged else "", value)


def test_a_running_job_is_reported_with_its_state(tmp_path):
    """A torn last line of the records is left out; the heartbeat says where it is, and for how long it has been silent."""
    run = make_run(tmp_path / "run", "paper", steps=9)
    with (run / "metrics.jsonl").open("a") as file:
        file.write('{"step": 10, "rew')
    beat = Heartbeat(run, steps=50)
    beat.beat(state="running", phase="judge", step=9, saved_step=5)
    assert f"{run}: running, phase judge, step 9 of 50, checkpoint of step 5, heard of 0:0" in summary_table([run])
    write_report([run], tmp_path / "report.html")
    said = read_heartbeat(run)
    assert described(said, said["time"] + 3700).endswith("heard of 1:01:40 ago")
    failed = said | {"state": "failed", "error": "rank 1, phase judge, step 10: gone", "attempt": 3, "saved_step": 0}
    assert described(failed, said["time"]) == (
        "failed, step 9 of 50, no checkpoint yet, start 3, heard of 0:00 ago: rank 1, phase judge, step 10: gone"
    )


def spoil(directory, name, content):
    """A run directory with one file replaced, or removed for None."""
    make_run(directory, "robust", steps=1)
    (directory / name).unlink() if content is None else (directory / name).write_text(content)
    return directory


@pytest.mark.parametrize(
    "name, content, message",
    [
        ("metrics.jsonl", None, "no metrics.jsonl"),
        ("metrics.jsonl", "", "is empty"),
        ("config.yaml", None, "config.yaml: no such file"),
        ("config.yaml", "a: [", "broken YAML"),
        ("config.yaml", "[]", "not a mapping"),
        ("samples.jsonl", '{"step": 1, "query_id": "a"}\n', "samples.jsonl:1: no advantages"),
        ("samples.jsonl", "{\n", "samples.jsonl:1: broken JSON"),
    ],
)
def test_broken_run_directories_are_named_and_nothing_is_written(tmp_path, name, content, message):
    """Each kind of broken run directory is one line that names the file; no page is left behind."""
    directory = spoil(tmp_path / "run", name, content)
    with pytest.raises(UserError, match=message) as error:
        write_report([directory], tmp_path / "report.html")
    assert "\n" not in str(error.value) and not (tmp_path / "report.html").exists()


def test_no_run_and_an_unwritable_output_are_named(tmp_path):
    """No directory given, a missing one, and an output in a folder that does not exist are one-line errors."""
    with pytest.raises(UserError, match="none given"):
        summary_table([])
    with pytest.raises(UserError, match="no such run directory"):
        summary_table([tmp_path / "absent"])
    with pytest.raises(UserError, match="--output: cannot write"):
        write_report([make_run(tmp_path / "run", "grpo", steps=1)], tmp_path / "absent" / "report.html")


@pytest.mark.parametrize("low, high", [(0.31, 0.74), (0, 1), (5, 5), (0, 0), (-1.3, 1.2), (1e-6, 3e-6), (2e5, 9e5)])
def test_ticks_enclose_the_data_and_are_few(low, high):
    """Two to eight evenly spaced ticks from below the lowest to above the highest value."""
    ticks = nice_ticks(low, high, 4)
    assert ticks[0] <= low and ticks[-1] >= high and 2 <= len(ticks) <= 8


def test_chart_of_nothing_is_empty_and_names_are_escaped():
    """A chart without a point draws nothing; a label with markup stays text and the hover data stays JSON."""
    assert line_chart(Chart("t", "x"), [Curve("a", 0, [])]) == ""
    drawn = line_chart(Chart("t", "x", end_labels=True), [Curve('<b>"', 0, [(1, 2, 2, 2), (2, 3, 2, 4)])])
    parser = PageParser()
    parser.feed(drawn)
    assert "b" not in parser.tags and '<b>"' in parser.text
    assert json.loads(dict(parser.attributes)["data-chart"])["lines"][0]["text"] == ["2.00", "3.00 (2.00–4.00)"]
