"""What alarms do to a run: measured, recorded, told once, and with stop_on its end; the best checkpoint is kept.

Runs of a few steps on the quickstart's task, whose judge is a good one: thresholds are set so that a good judge is past them.
Leaves out the rules (tests/unit/test_alarms.py) and whether they find real exploits (benchmarks/alarms.py).
"""

import pytest
import torch
from safetensors.torch import load_file

from g2r_megatron.cli import main
from real_runs import checkpoints, forked, quickstart_options, records, train_command
from test_bad_input import run
from test_convert import tool_here


@pytest.fixture(scope="module")
def options(tmp_path_factory) -> list[str]:
    return [
        *quickstart_options(tmp_path_factory.mktemp("data")),
        *("--alarms.every", "2", "--alarms.window", "2", "--alarms.one_sided", "0.5", "--checkpoint.save_every", "1"),
        *("--checkpoint.export_hf", "false"),
    ]


def test_an_alarm_is_told_and_recorded_once(options, tmp_path):
    """Two ranks, one of them the judge's, under torchrun, which keeps the store: the checks run there too. The run exports.

    The report draws the alarm.
    """
    arguments = [*options, "--judge.ranks", "1", "--checkpoint.export_hf", "true"]
    done = train_command([*arguments, "--output_dir", str(tmp_path / "run")], ranks=2)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("step 6/6") == 1 and (tmp_path / "run" / "hf" / "model.safetensors").exists()
    assert (done.stdout + done.stderr).count("alarm one_sided: judge/true_share") == 1
    (alarm,) = [a for a in records(tmp_path / "run", "alarms.jsonl") if a["alarm"] == "one_sided"]
    assert (alarm["step"], alarm["alarm"], alarm["threshold"]) == (2, "one_sided", 0.5)
    steps = {r["step"]: r for r in records(tmp_path / "run", "metrics.jsonl")}
    assert [step for step, record in steps.items() if "alarms/master_keys" in record] == [1, 3, 5]
    assert all(0 <= steps[step]["alarms/master_keys"] <= 1 for step in (1, 3, 5))
    assert all("alarms/internalization_gap" in steps[step] for step in (1, 3, 5))
    assert main(["report", str(tmp_path / "run"), "--output", str(tmp_path / "report.html")]) == 0
    page = (tmp_path / "report.html").read_text()
    assert "alarm one_sided" in page and "Criteria met by empty responses" in page


def test_stop_on_ends_the_run_and_names_a_checkpoint(options, tmp_path):
    """Exit code 3, one line; the checkpoint before the alarm is named. Started again with another threshold, it goes on."""
    arguments = [*options, "--alarms.stop_on", "[one_sided]", "--output_dir", str(tmp_path / "run")]
    code, said = forked(["train", *arguments], tmp_path / "log")
    assert code == 3, said
    (line,) = [line for line in said.splitlines() if "error" in line]
    assert "alarms.stop_on: step 2: alarm one_sided" in line and "the last checkpoint before it is of step 1" in line
    assert records(tmp_path / "run", "metrics.jsonl")[-1]["step"] == 2
    code, said = forked(["train", *arguments, "--alarms.one_sided", "1", "--steps", "3"], tmp_path / "log")
    assert code == 0, said
    assert [r["step"] for r in records(tmp_path / "run", "metrics.jsonl")] == [0, 1, 2, 3]


def test_the_best_checkpoint_is_kept_and_a_run_that_gets_no_better_ends(worlds, options, tmp_path):
    """By an evaluation metric, also by a resumed run, which finds it in its records; of equal steps the first.

    A run out of patience is finished: it exports the best weights, and the same command only says so.
    """
    place, scores = tmp_path / "run", {}
    arguments = [*options, "--eval.every", "1", "--checkpoint.keep_last", "1", "--checkpoint.save_every", "2"]
    arguments += ["--checkpoint.keep_best", "eval/judge_score", "--checkpoint.export_hf", "true"]
    arguments += ["--output_dir", str(place), "--optimizer.lr", "2e-3"]
    for more in (["--steps", "3"], ["--steps", "50", "--eval.patience", "2"]):
        code, said = forked(["train", *arguments, *more], tmp_path / "log")
        assert code == 0, said
        scores = {r["step"]: r["eval/judge_score"] for r in records(place, "metrics.jsonl")}
        best, last = max(scores, key=lambda step: (scores[step], -step)), max(scores)
        kept = checkpoints(place)
        assert f"step_{last:08d}" in kept and (not best or f"step_{best:08d}" in kept)
        assert len(kept) <= 3, kept  # the last, the best, and the best before, which goes with the next save
    assert last == max(3, best + 2) < 50 and best > 0, scores
    assert f"eval.patience 2: eval/judge_score {scores[best]:.4g} of step {best} was not exceeded" in said
    convert = ["--checkpoint", str(place / "checkpoints" / f"step_{best:08d}"), "--output", str(tmp_path / "best")]
    ((code, _, said),) = worlds[1].run(tool_here, "convert_megatron_to_hf.py", *convert)
    assert code == 0, said
    exported, expected = (load_file(path / "model.safetensors") for path in (place / "hf", tmp_path / "best"))
    assert exported.keys() == expected.keys() and all(torch.equal(exported[name], expected[name]) for name in exported)
    code, said = forked(["train", *arguments, "--steps", "50", "--eval.patience", "2"], tmp_path / "log")
    assert code == 0 and "finished already: eval.patience 2" in said
    assert max(r["step"] for r in records(place, "metrics.jsonl")) == last


def test_a_run_that_never_gets_better_exports_nothing(options, tmp_path):
    """The policy before training was the best one; it is where it was."""
    arguments = [*options, "--eval.every", "1", "--eval.patience", "2", "--eval.greedy", "true", "--eval.samples", "1"]
    arguments += ["--checkpoint.keep_best", "eval/true_score", "--checkpoint.export_hf", "true"]
    arguments += ["--optimizer.lr", "1e-12", "--output_dir", str(tmp_path / "run")]
    code, said = forked(["train", *arguments], tmp_path / "log")
    assert code == 0 and "up to step 2; the policy before training" in said, said
    assert [r["step"] for r in records(tmp_path / "run", "metrics.jsonl")] == [0, 1, 2]
    assert (
        checkpoints(tmp_path / "run") == ["step_00000001", "step_00000002"] and not (tmp_path / "run" / "hf").exists()
    )


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (["--alarms.stop_on", "[exploits]"], ["alarms.stop_on", "'exploits' is no alarm", "gold_down"]),
        (["--alarms.stop_on", "[flat]", "--alarms.flat", "null"], ["alarms.stop_on", "alarms.flat is null"]),
        (["--alarms.length", "0.5"], ["alarms.length", "0.5", "at least 1"]),
        (["--eval.patience", "2"], ["eval.patience", "2 without checkpoint.keep_best", "eval/judge_score"]),
        (["--eval.patience", "-1"], ["eval.patience", "-1", "at least 0"]),
        (["--eval.patience", "1", "--eval.every", "0"], ["eval.patience", "1 without eval.every"]),
        (["--checkpoint.keep_best", "eval/gold", "--eval.data", "[]"], ["checkpoint.keep_best", "without eval.data"]),
        (
            ["--checkpoint.keep_best", "eval/gold"],
            ["checkpoint.keep_best", "'eval/gold' is not measured", "eval/true_score"],
        ),
    ],
)
def test_what_cannot_be_watched_is_refused(options, tmp_path, more, said):
    found = run(
        [
            "train",
            *options,
            *(["--eval.every", "0"] if "[]" in more else []),
            *more,
            "--output_dir",
            str(tmp_path / "x"),
        ]
    )
    code, _, err = found
    assert code == 2 and err.count("error") == 1
    for text in said:
        assert text in err
