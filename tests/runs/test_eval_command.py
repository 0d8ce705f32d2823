"""``g2r eval`` with the quickstart's model as policy and judge: sampled or from files, stopped and continued, on other layouts.

Leaves out the scores' definition (unit/test_eval.py), vLLM (test_vllm_training.py), and evaluations of a
training (test_train_loop.py).
"""

import json
import shutil
from pathlib import Path

import pytest

from g2r_megatron.eval.ledger import NAME
from test_bad_input import assert_refused, run

ROOT = Path(__file__).parents[2]
MODEL = str(ROOT / "examples" / "quickstart" / "model")
JUDGE = ["--judge.model", MODEL, "--judge.template", "{conversation} | {response} | {criterion} =>"]
JUDGE += ["--judge.chat_template", "false", "--judge.max_length", "128"]
POLICY = ["--policy.model", MODEL, "--rollout.chat_template", "false", "--rollout.max_prompt_tokens", "64"]
POLICY += ["--rollout.max_response_tokens", "12", "--rollout.batch_size", "4"]


@pytest.fixture(scope="module")
def rows(tmp_path_factory) -> Path:
    """The first rows of the quickstart's held-out ones."""
    path = tmp_path_factory.mktemp("rows") / "rows.jsonl"
    held_out = (ROOT / "examples" / "quickstart" / "data" / "eval.jsonl").read_text().splitlines(keepends=True)
    path.write_text("".join(held_out[:4]))
    return path


def sampled(rows: Path, output: Path, *options: str) -> list[str]:
    return ["eval", *POLICY, *JUDGE, "--data", str(rows), "--output", str(output), *options]


def records(output: Path) -> list[dict]:
    return [json.loads(line) for line in (output / "responses.jsonl").read_text().splitlines()]


def test_sampled_stopped_and_on_other_layouts(worlds, rows, tmp_path):
    """The same responses and verdicts after a stop, and on two ranks, where the policy is data parallel and the judge tensor parallel."""
    one = tmp_path / "one"
    [(code, out, err)] = worlds[1].run(run, sampled(rows, one, "--samples", "2"))
    assert code == 0 and "g2r, 4 rows" in out and "sampled 8/8" in err and "judged 8/8" in err, err
    found = records(one)
    assert [(r["id"], r["sample"]) for r in found][:3] == [
        (found[0]["id"], 0),
        (found[0]["id"], 1),
        (found[2]["id"], 0),
    ]
    assert all(r["items"] for r in found) and found[0]["response"] != found[1]["response"]
    summary = json.loads((one / "eval.json").read_text())
    own = summary["datasets"]["g2r"]["score"]
    assert own["count"] == 8 and own["mean"] == pytest.approx(sum(r["score"] for r in found) / 8) and own["error"] > 0

    lines = (one / NAME).read_text().splitlines(keepends=True)
    (one / NAME).write_text("".join(lines[:6]) + lines[6][:20])  # 5 responses and a line cut short
    [(code, _, err)] = worlds[1].run(run, sampled(rows, one, "--samples", "2", "--batch_rows", "5"))
    assert code == 0 and "sampled 8/8" in err and "judged 5/8" in err and records(one) == found
    [(code, _, err)] = worlds[1].run(run, sampled(rows, one, "--samples", "2"))
    assert code == 0 and err == "" and records(one) == found  # nothing is left to do

    results = worlds[2].run(run, sampled(rows, tmp_path / "two", "--samples", "2", "--judge.layout.tp", "2"))
    assert [code for code, _, _ in results] == [0, 0] and results[1][1] == ""
    for mine, other in zip(found, records(tmp_path / "two"), strict=True):
        assert other["response"] == mine["response"] and other["score"] == mine["score"]
    [result] = worlds[1].run(run, sampled(rows, one, "--samples", "3"))
    assert_refused(result, "output", NAME, "other options")


def test_responses_of_a_file(worlds, rows, tmp_path):
    """A file of g2r eval is judged as it was, with its lengths; a file of ids needs the rows, whole rows need nothing."""
    first, again, whole = tmp_path / "first", tmp_path / "again", tmp_path / "whole"
    [(code, _, err)] = worlds[1].run(run, sampled(rows, first, "--greedy"))
    assert code == 0, err
    given = ["--responses", str(first / "responses.jsonl")]
    [(code, out, err)] = worlds[1].run(run, ["eval", *JUDGE, *given, "--data", str(rows), "--output", str(again)])
    assert code == 0 and "finished" in out and "sampled" not in err, err
    assert records(again) == records(first)
    own = tmp_path / "own.jsonl"
    lines = [json.loads(line) for line in rows.read_text().splitlines()[:2]]
    own.write_text("".join(json.dumps({**line, "response": "patient is stable."}) + "\n" for line in lines))
    [(code, out, err)] = worlds[1].run(run, ["eval", *JUDGE, "--responses", str(own), "--output", str(whole)])
    assert code == 0 and "finished" not in out and "g2r, 2 rows" in out, err


def test_bad_input(rows, tmp_path):
    """One line each, before any weight is read."""
    bare = tmp_path / "bare.jsonl"
    bare.write_text(json.dumps({"id": "a", "prompt": "q"}) + "\n")
    out = tmp_path / "out"
    refused = {
        tuple(sampled(bare, out)): ["bare.jsonl:1", "hold no rubric"],
        tuple(sampled(rows, out, "--responses", str(rows))): ["policy.model", "responses too"],
        ("eval", *JUDGE, "--data", str(rows), "--output", str(out)): ["policy.model", "missing"],
        ("eval", *POLICY, "--data", str(rows), "--output", str(out)): ["judge.model", "missing"],
        ("eval", *POLICY, *JUDGE, "--output", str(out)): ["data", "missing"],
        tuple(sampled(rows, out, "--greedy", "--samples", "2")): ["samples", "2 with greedy", "all the same"],
        tuple(sampled(rows, out, "--samples", "0")): ["samples", "0", "at least 1"],
        tuple(sampled(rows, out, "--rollout.correction", "tis")): ["rollout.correction", "tis in g2r eval"],
        tuple(sampled(rows, out, "--rollout.max_prompt_tokens", "3")): ["rollout.max_prompt_tokens", "more than 3"],
        tuple(sampled(rows, out, "--judge.max_length", "9")): ["judge.max_length", "more than 9"],
        tuple(sampled(rows, out, "--judge.layout.tp", "3")): ["judge.layout", "3"],
    }
    for argv, said in refused.items():
        assert_refused(run(list(argv)), *said)
    assert not out.exists()


def test_a_training_evaluates_in_the_same_way(worlds, rows, tmp_path):
    """With a gold judge, under old option names, and ``g2r eval`` of the run's weights finds the same responses and scores.

    The gold judge is a copy of the judge, so both must agree on everything.
    """
    gold = tmp_path / "gold"
    shutil.copytree(MODEL, gold)
    output = tmp_path / "run"
    small = ["--rollout.prompts_per_step", "2", "--rollout.responses_per_prompt", "2", "--steps", "1", "--seed", "1234"]
    judge = [option.replace("--judge.", "--eval.judge.") for option in JUDGE]
    judge[1] = str(gold)
    train = ["train", *POLICY, *JUDGE, *small, *judge, "--data.train", f'["{rows}"]', "--data.eval", f'["{rows}"]']
    train += ["--eval_responses", "2", "--output_dir", str(output), "--optimizer.lr", "1e-3"]
    [(code, _, err)] = worlds[1].run(run, train)
    assert code == 0 and "warning: data.eval is called eval.data now" in err, err
    lines = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    for line in lines:
        assert line["eval/gold_score"] == pytest.approx(line["eval/judge_score"])
        assert line["eval/gold_agreement"] == 1 and line.get("eval/exploitation_rate", 0) == 0
    kept = records(output / "eval" / "step_00000001")
    assert len(kept) == 8 and all(record["gold_score"] == record["score"] for record in kept)
    assert kept != records(output / "eval" / "step_00000000")

    options = ["--samples", "2", "--policy.model", str(output)]
    [(code, _, err)] = worlds[1].run(run, sampled(rows, tmp_path / "again", *options))
    assert code == 0 and f"judge.model {MODEL} has trained {output}" in err, err
    for mine, other in zip(kept, records(tmp_path / "again"), strict=True):
        assert (other["id"], other["response"], other["score"]) == (mine["id"], mine["response"], mine["score"])
