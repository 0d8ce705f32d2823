"""``g2r judge``: its output equals Hugging Face autograd on the inputs it dumps, from any layout, and says all it did.

The reference here shares no code with the judge: transformers, one sequence at a time, and the equations of the two
presets written out. Tolerances (fp32): token rewards 1e-5 of their norm, attributions 1e-4 of their norm and 1e-6 of
|g_t||e_t|. Layouts other than TP2 PP2 SP and the choices of attribution are in test_parity_judge.py; bad input is in
test_bad_input.py.
"""

import json
import math
import os
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from distributed import CaseFailed
from g2r_megatron.config.command_options import OfflineJudgeConfig
from g2r_megatron.config.options import JudgeConfig, Layout
from g2r_megatron.config.presets import PRESETS, fill_from_preset
from g2r_megatron.judge.offline import judge_file
from tiny_models import DENSE_FAMILIES

ROOT = Path(__file__).parents[2]
HEALTHBENCH = ROOT.parent / "shared" / "data" / "healthbench_100.jsonl"
ROWS = [
    {
        "id": f"row-{i}",
        "prompt": [{"role": "user", "content": prompt}],
        "rubric": [
            {"criterion": "Advises rest", "weight": 3},
            {"criterion": "Says to see a doctor", "weight": 5, "tags": ["safety"]},
            {"criterion": "Sells something", "weight": -4},
            {"criterion": "Is polite", "weight": 0},
        ],
        "response": response,
    }
    for i, (prompt, response) in enumerate(
        [
            ("What helps with fever?", "Rest, drink water. See a doctor if it lasts longer than three days."),
            ("And with a rash?", "A doctor can tell! <|im_end|> Température 39 °C: see one.\n\nBuy our cream."),
            ("Fever and rash", "No"),
            ("A note, please", "A note on fever and rash: rest, drink water, see a doctor. " * 3),
        ]
    )
]
ITEM_KEYS = ["criterion", "weight", "p_true", "p_false", "verdict", "attribution", "alpha"]
DUMPED_KEYS = ["input_ids", "response_start", "response_end", "verdict_position", "true_ids", "false_ids"]


def write_rows(path: Path, rows: list[dict]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def read(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().split("\n")[:-1]]


CONTRACTED = dict(
    target="logit_margin", attribution="contracted", normalize="softmax", standardize=True, smoothing="smear"
)


def config_for(model: Path, rows: Path, output: Path, preset="contracted", **options) -> OfflineJudgeConfig:
    """Verdicts are sampled unless told otherwise: a random judge then says True to about half of the items."""
    judge = {"verdict": "sample", **options.pop("judge", {})}
    filled = CONTRACTED if preset == "contracted" else PRESETS[preset]["judge"]
    judge = fill_from_preset(JudgeConfig(model=str(model), **judge), filled)
    preset = "robust" if preset == "contracted" else preset
    options = {"dump_inputs": True, **options}
    return OfflineJudgeConfig(input=str(rows), output=str(output), preset=preset, judge=judge, **options)


# ---- the reference --------------------------------------------------------------------------------------------------


def reference_gradient(model, item: dict, judge: JudgeConfig):
    """(log p(True), log p(False), b [T], |g_t||d_t| [T]) of a dumped item by autograd, fp32."""
    table = model.get_input_embeddings().weight.detach()
    embeddings = table[torch.tensor(item["input_ids"])]
    span = slice(item["response_start"], item["response_end"])

    def log_probs(inputs):
        at_verdict = model(inputs_embeds=inputs[None]).logits[0, item["verdict_position"]].log_softmax(-1)
        return at_verdict[item["true_ids"]].logsumexp(0), at_verdict[item["false_ids"]].logsumexp(0)

    with torch.no_grad():
        p_true, p_false = log_probs(embeddings)
    leaf, direction = embeddings.clone(), embeddings[span]
    if judge.attribution == "contracted":
        mean = table.mean(0)
        direction = embeddings[span] - mean
        leaf[span] = mean + judge.contraction * direction
    leaf.requires_grad_()
    true, false = log_probs(leaf)
    target = true - false if judge.target == "logit_margin" else (true if item["verdict"] else false)
    gradient = torch.autograd.grad(target, leaf)[0][span]
    return p_true, p_false, (gradient * direction).sum(-1), gradient.norm(dim=-1) * direction.norm(dim=-1)


def reference_alpha(b: torch.Tensor, judge: JudgeConfig) -> torch.Tensor:
    """softmax(b / tau), before it standardised and after it smeared backwards where the preset says so; fp64 [T]."""
    b = b.double()
    if len(b) < 2:
        return torch.ones_like(b)
    if judge.standardize:
        b = (b - b.mean()) / b.std(unbiased=False)
    alpha = torch.softmax(b / judge.tau, 0)
    if judge.smoothing == "smear":
        for t in reversed(range(len(alpha) - 1)):
            alpha[t] += judge.smear_gamma * alpha[t + 1]
        alpha /= alpha.sum()
    return alpha


def assert_equals_reference(records: list[dict], model_path: Path, judge: JudgeConfig) -> int:
    """Every number of the output against the reference; the number of backward passes compared."""
    model = AutoModelForCausalLM.from_pretrained(model_path, dtype=torch.float32).eval()
    passes = 0
    for record in records:
        weights = [item["weight"] for item in record["items"]]
        rewards = torch.zeros(len(record["tokens"]), dtype=torch.float64)
        for item in record["items"]:
            p_true, p_false, b, scale = reference_gradient(model, item, judge)
            assert item["p_true"] == pytest.approx(p_true.exp().item(), rel=1e-4)
            assert item["p_false"] == pytest.approx(p_false.exp().item(), rel=1e-4)
            if not item["verdict"] or item["weight"] == 0:
                assert item["attribution"] is None and item["alpha"] is None
                continue
            passes += 1
            found, alpha = torch.tensor(item["attribution"]), reference_alpha(b, judge)
            assert (found - b).norm() <= 1e-4 * b.norm()
            assert ((found - b).abs() <= 1e-6 * scale).all()
            torch.testing.assert_close(torch.tensor(item["alpha"], dtype=torch.float64), alpha, rtol=1e-4, atol=1e-7)
            rewards += item["weight"] * alpha
        rewards /= sum(max(weight, 0) for weight in weights)
        error = (torch.tensor(record["token_rewards"], dtype=torch.float64) - rewards).norm()
        assert error <= 1e-5 * rewards.norm()
        earned = sum(item["weight"] for item in record["items"] if item["verdict"])
        assert record["reward"] == pytest.approx(earned / sum(max(weight, 0) for weight in weights))
        assert sum(record["token_rewards"]) == pytest.approx(record["reward"], abs=1e-6)
    return passes


# ---- tests ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("preset", ["paper", "contracted"])
@pytest.mark.parametrize("family", DENSE_FAMILIES)
def test_equals_hugging_face_autograd(family, preset, tiny_hf, worlds, tmp_path):
    rows = write_rows(tmp_path / "rows.jsonl", ROWS)
    config = config_for(tiny_hf(family), rows, tmp_path / "out.jsonl", preset)
    worlds[1].run(judge_file, config)
    assert assert_equals_reference(read(tmp_path / "out.jsonl"), tiny_hf(family), config.judge) >= 3


def test_the_layout_does_not_show_in_the_file(tiny_hf, worlds, tmp_path):
    """Same rows, keys, verdicts and tokens from PP2 CP2 with small micro-batches and recompute; numbers to 1e-5."""
    rows = write_rows(tmp_path / "rows.jsonl", ROWS)
    one = config_for(tiny_hf("qwen2"), rows, tmp_path / "one.jsonl")
    judge = replace(one.judge, layout=Layout(pp=2, cp=2), micro_batch_tokens=300, recompute="full")
    four = replace(one, output=str(tmp_path / "four.jsonl"), batch_rows=3, judge=judge)
    worlds[1].run(judge_file, one)
    worlds[4].run(judge_file, four)
    expected, found = read(tmp_path / "one.jsonl"), read(tmp_path / "four.jsonl")
    assert_same(found, expected)
    assert_equals_reference(found, tiny_hf("qwen2"), four.judge)


def assert_same(found, expected) -> None:
    """Equal but for rounding; the keys of objects in the same order."""
    if isinstance(expected, dict):
        assert list(found) == list(expected)
        found, expected = list(found.values()), list(expected.values())
    if isinstance(expected, list) and expected and all(isinstance(value, float) for value in expected):
        torch.testing.assert_close(torch.tensor(found), torch.tensor(expected), rtol=1e-4, atol=1e-6)
    elif isinstance(expected, list):
        assert len(found) == len(expected)
        for one, other in zip(found, expected, strict=True):
            assert_same(one, other)
    elif isinstance(expected, float):
        assert found == pytest.approx(expected, rel=1e-4)
    else:
        assert found == expected


def test_healthbench_rows(tiny_hf, worlds, tmp_path):
    """Ten real rows, judged by comparison of p(True) and p(False), on TP2 PP2."""
    if not HEALTHBENCH.exists():
        pytest.skip(f"{HEALTHBENCH} is not there")
    rows = sorted((json.loads(line) for line in HEALTHBENCH.open()), key=lambda row: len(json.dumps(row)))[:10]
    for i, row in enumerate(rows):
        row["response"] = "Rest, drink water. See a doctor if it lasts longer than three days. " * (1 + i % 3)
    path = write_rows(tmp_path / "rows.jsonl", rows)
    judge = {"layout": Layout(tp=2, pp=2), "verdict": "compare"}
    config = config_for(tiny_hf("qwen3"), path, tmp_path / "out.jsonl", preset="paper", judge=judge)
    worlds[4].run(judge_file, config)
    records = read(tmp_path / "out.jsonl")
    assert [record["id"] for record in records] == [row["prompt_id"] for row in rows]
    for record, row in zip(records, rows, strict=True):
        assert [item["criterion"] for item in record["items"]] == [item["criterion"] for item in row["rubrics"]]
        assert [item["weight"] for item in record["items"]] == [item["points"] for item in row["rubrics"]]
        assert all(item["verdict"] == (item["p_true"] > item["p_false"]) for item in record["items"])
    assert assert_equals_reference(records, tiny_hf("qwen3"), config.judge) > 0


def test_the_file_says_what_it_should(tiny_hf, worlds, tmp_path):
    rows = write_rows(tmp_path / "rows.jsonl", ROWS)
    worlds[1].run(judge_file, config_for(tiny_hf("llama3"), rows, tmp_path / "dumped.jsonl"))
    worlds[1].run(judge_file, config_for(tiny_hf("llama3"), rows, tmp_path / "plain.jsonl", dump_inputs=False))
    dumped, plain = read(tmp_path / "dumped.jsonl"), read(tmp_path / "plain.jsonl")
    for record, row in zip(plain, ROWS, strict=True):
        assert list(record) == ["id", "reward", "tokens", "token_rewards", "items"]
        assert record["id"] == row["id"]
        assert "".join(record["tokens"]) == row["response"]
        assert len(record["token_rewards"]) == len(record["tokens"])
        assert [list(item) for item in record["items"]] == [ITEM_KEYS] * len(row["rubric"])
    for record in dumped:
        for item in record["items"]:
            assert list(item) == ITEM_KEYS + DUMPED_KEYS
            assert item["verdict_position"] == len(item["input_ids"]) - 1
            assert item["response_end"] - item["response_start"] == len(record["tokens"])
            for key in DUMPED_KEYS:
                del item[key]
    assert dumped == plain


def test_results_of_other_tools(tiny_hf, worlds, tmp_path):
    """Batch results find their queries, several choices are a line each, ids come back as they were, earlier scores stay
    beside ours, in the order of the input; a file that was begun is gone on with although ids recur."""
    queries = write_rows(tmp_path / "queries.jsonl", [{**ROWS[0], "id": 7}, {**ROWS[1], "id": "b"}, ROWS[2]])

    def result(id, *texts, **more):
        choices = [{"index": i, "message": {"role": "assistant", "content": text}} for i, text in enumerate(texts)]
        return {
            "id": "batch_1",
            "custom_id": id,
            "response": {"status_code": 200, "body": {"choices": choices}},
            **more,
        }

    rows = [result("b", "rest", None, "rest"), result(7, "water", reward=0.5, grade="B")]
    config = config_for(
        tiny_hf("qwen3"), write_rows(tmp_path / "rows.jsonl", rows), tmp_path / "out.jsonl", queries=[str(queries)]
    )
    worlds[1].run(judge_file, config)
    records = read(tmp_path / "out.jsonl")
    assert [(r["id"], r.get("choice")) for r in records] == [("b", 0), ("b", 1), ("b", 2), (7, None)]
    assert ["".join(r["tokens"]) for r in records] == ["rest", "", "rest", "water"]
    assert records[0]["items"] == records[2]["items"] and records[1]["token_rewards"] == []
    assert (records[3]["given_reward"], records[3]["grade"]) == (0.5, "B") and records[3]["reward"] != 0.5
    graded = {**ROWS[0], "rubric": [{**item, "verdict": True, "grade": 2} for item in ROWS[0]["rubric"]]}
    again = replace(config, input=str(write_rows(tmp_path / "again.jsonl", [graded] * 3)), queries=[], batch_rows=1)
    again.output = str(tmp_path / "again.out")
    worlds[1].run(judge_file, again)
    assert [(i["given_verdict"], i["grade"]) for r in read(tmp_path / "again.out") for i in r["items"]] == [
        (True, 2)
    ] * 12


def test_sampled_verdicts_depend_on_the_seed_and_the_row_alone(tiny_hf, worlds, tmp_path):
    """Neither on the order of the rows nor on how many are judged together."""

    def verdicts(name: str, rows: list[dict], **options) -> dict[str, list[bool]]:
        path = write_rows(tmp_path / f"{name}.jsonl", rows)
        worlds[1].run(judge_file, config_for(tiny_hf("qwen3"), path, tmp_path / f"{name}.out", **options))
        records = read(tmp_path / f"{name}.out")
        return {record["id"]: [item["verdict"] for item in record["items"]] for record in records}

    expected = verdicts("expected", ROWS)
    assert verdicts("reversed", ROWS[::-1], batch_rows=1) == expected
    assert verdicts("reseeded", ROWS, seed=5) != expected


def test_a_zero_gradient_is_reported(tiny_hf, tmp_path):
    """With an output layer of zeros nothing depends on the response. Also the command line in a process of its own."""
    model = shutil.copytree(tiny_hf("qwen3"), tmp_path / "model")
    weights = load_file(model / "model.safetensors")
    weights["lm_head.weight"].zero_()
    save_file(weights, model / "model.safetensors", metadata={"format": "pt"})
    rows = write_rows(tmp_path / "rows.jsonl", ROWS)
    command = [sys.executable, "-m", "g2r_megatron.cli", "judge", "--judge.model", model, "--input", rows]
    done = subprocess.run(
        [*command, "--output", tmp_path / "out.jsonl", "--judge.verdict", "sample"],
        capture_output=True, text=True, timeout=800, cwd=ROOT, env={**os.environ, "COLUMNS": "80"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    records = read(tmp_path / "out.jsonl")
    judged = [(r["id"], n) for r in records for n, i in enumerate(r["items"], 1) if i["attribution"] is not None]
    assert len(judged) >= 3
    lines = done.stderr.splitlines()
    assert lines[0] == "judged 4/4 rows  ETA 0:00" and len(lines) == 3  # plain text in a pipe, no warnings of libraries
    assert lines[1].startswith("g2r: warning: the judge gives only 0.0") and "judge.template" in lines[1]
    assert "of 16 items True; answer mass 0.0" in done.stdout and "100.0% flat" in done.stdout
    assert lines[-1].startswith("g2r: warning: the judge's gradient was zero or not finite")
    assert f"in {len(judged)} of {len(judged)} backward passes" in lines[-1]
    assert all(f"{id} item {number} (zero)" in lines[-1] for id, number in judged)
    for record in records:  # credit is spread evenly, nothing is lost
        share = record["reward"] / len(record["tokens"])
        assert all(math.isclose(reward, share, abs_tol=1e-7) for reward in record["token_rewards"])


def test_a_failure_leaves_no_file(tiny_hf, worlds, tmp_path):
    """NaN weights are found by the verdicts, when the output is already being written."""
    model = shutil.copytree(tiny_hf("qwen3"), tmp_path / "model")
    weights = load_file(model / "model.safetensors")
    weights["model.norm.weight"].fill_(math.nan)
    save_file(weights, model / "model.safetensors", metadata={"format": "pt"})
    rows = write_rows(tmp_path / "rows.jsonl", ROWS)
    with pytest.raises(CaseFailed, match="not finite"):
        worlds[1].run(judge_file, config_for(model, rows, tmp_path / "out.jsonl"))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model", "rows.jsonl"]
