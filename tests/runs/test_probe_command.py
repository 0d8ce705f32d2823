"""``g2r probe`` on the quickstart's judge, which really reads its responses: the table says so, and a stopped probe goes on.

Leaves out the numbers themselves (test_hiding.py, test_parity_gates.py), statistics and page (unit/test_probe.py), and a real
pretrained judge (test_smollm2.py).
"""

import json
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForSequenceClassification

from g2r_megatron.config.options import JudgeConfig
from g2r_megatron.data.tokenizer import encode_text, load_tokenizer
from g2r_megatron.data.types import Query
from g2r_megatron.judge.reward_prompt import RewardPrompt
from g2r_megatron.probe.ledger import NAME
from test_bad_input import assert_refused, run
from tiny_models import build_tiny_reward_model

ROOT = Path(__file__).parents[2]
QUICKSTART = ROOT / "examples" / "quickstart"
TEMPLATE = "{conversation} | {response} | {criterion} =>"
ROW = {"id": "a", "prompt": "room spins.", "rubric": [{"criterion": "advises slow turns", "weight": 1}]}


def argv(output: Path, *options: str, rows: Path = QUICKSTART / "data" / "responses.jsonl") -> list[str]:
    judge = ["--judge.model", str(QUICKSTART / "model"), "--judge.template", TEMPLATE, "--judge.chat_template", "false"]
    return ["probe", *judge, "--judge.max_length", "128", "--input", str(rows), "--output", str(output), *options]


def measured(output: Path) -> list[dict]:
    return [json.loads(line) for line in (output / NAME).read_text().splitlines()]


def test_a_judge_that_reads_its_responses(worlds, tmp_path):
    """Gates follow it and the placebo does not, occlusion is the truth; a continued probe, and two ranks, give the same."""
    small, options = tmp_path / "small", ["--sample", "12", "--false_sample", "3"]
    methods = '["gate_branch", "gate_all", "contracted", "occlusion"]'
    [(code, out, _)] = worlds[1].run(run, argv(small, *options, "--attributions", methods))
    assert code == 0 and "use `gate" in out, out
    found = json.loads((small / "probe.json").read_text())
    assert (found["pairs_true"], found["pairs_false"]) == (12, 3) and len(found["pairs"]) == 15
    score = {name: of["masked"]["spearman"] for name, of in found["true"]["attributions"].items()}
    assert list(score) == ["gate_branch", "gate_all", "contracted", "occlusion", "shuffled"]
    assert score["occlusion"] == pytest.approx([1, 1, 1]) and score["gate_all"][1] > 0.5 > score["shuffled"][2]
    assert found["judge"]["answer_mass"] > 0.9 and found["judge"]["swapped_same"] is None
    for pair in found["pairs"]:
        assert pair["credit"]["occlusion"] == pytest.approx(pair["masked"], abs=1e-4)
        assert sorted(pair["credit"]["shuffled"]) == pytest.approx(sorted(pair["credit"]["gate_branch"]))
        assert len(pair["sentences"]) == len(pair["masked"]) == len(pair["deleted"]) >= 3

    # two pairs and a line cut short are left of it
    lines = (small / NAME).read_text().splitlines(keepends=True)
    kept = [number for number, line in enumerate(lines) if '"pair"' in line][1] + 1
    (small / NAME).write_text("".join(lines[:kept]) + lines[kept][:40])
    [(code, _, err)] = worlds[1].run(run, argv(small, *options, "--attributions", methods))
    assert code == 0 and "measured 2/" not in err and "measured 3/15 pairs" in err
    again = json.loads((small / "probe.json").read_text())
    assert [pair["masked"] for pair in again["pairs"]] == [pair["masked"] for pair in found["pairs"]]
    assert len(measured(small)) == len(lines)

    results = worlds[2].run(run, argv(tmp_path / "two", *options, "--attributions", methods))
    assert [code for code, _, _ in results] == [0, 0] and results[1][1] == ""
    two = json.loads((tmp_path / "two" / "probe.json").read_text())
    assert [(pair["id"], pair["criterion"]) for pair in two["pairs"]] == [
        (p["id"], p["criterion"]) for p in found["pairs"]
    ]
    for one, other in zip(found["pairs"], two["pairs"], strict=True):
        for name in ("gate_branch", "occlusion"):
            assert other["credit"][name] == pytest.approx(one["credit"][name], abs=1e-4)

    [result] = worlds[1].run(run, argv(small, "--seed", "2"))
    assert_refused(result, "output", NAME, "other options")


def test_rows_without_a_response(worlds, tmp_path):
    """The policy answers them, and them alone; what it said is kept, and the same command measures it again."""
    lines = [json.loads(line) for line in (QUICKSTART / "data" / "responses.jsonl").read_text().splitlines()]
    asked = {row for row in range(len(lines)) if row % 3}
    rows = [
        {name: line[name] for name in line if row not in asked or name != "response"} for row, line in enumerate(lines)
    ]
    file, output = tmp_path / "rows.jsonl", tmp_path / "out"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    options = ["--sample", "3", "--attributions", "[attention]", "--policy.model", str(QUICKSTART / "model")]
    options += ["--rollout.chat_template", "false", "--rollout.max_response_tokens", "42"]
    [(code, _, err)] = worlds[1].run(run, argv(output, *options, rows=file))
    assert code == 0 and "sampled 3/3 responses" in err
    sampled = {line["row"]: line["response"] for line in measured(output) if "response" in line}
    assert set(sampled) == asked and all(text.count(".") > 1 for text in sampled.values())
    before = json.loads((output / "probe.json").read_text())

    kept = [line for line in (output / NAME).read_text().splitlines(keepends=True) if '"pair"' not in line]
    (output / NAME).write_text("".join(kept))
    [(code, _, err)] = worlds[1].run(run, argv(output, *options, rows=file))
    assert code == 0 and "sampled" not in err
    again = json.loads((output / "probe.json").read_text())
    assert [(p["masked"], p["tokens"]) for p in again["pairs"]] == [(p["masked"], p["tokens"]) for p in before["pairs"]]
    answered = {row["id"]: row["response"] if row.get("response") else sampled[n] for n, row in enumerate(rows)}
    assert all("".join(pair["tokens"]).strip() == answered[pair["id"]].strip() for pair in again["pairs"])


def test_a_reward_model(worlds, tmp_path):
    """What its score loses without each sentence, hidden and deleted, equals transformers' (fp32, 1e-5); it has no verdicts."""
    model = build_tiny_reward_model("qwen2", tmp_path / "model")
    texts = [
        "Rest, and drink water. See a doctor! If it lasts, a doctor can tell.",
        "A rash can itch. Use cold water. Do not rub it. Rest.",
    ]
    rows, output = tmp_path / "rows.jsonl", tmp_path / "out"
    records = [{"id": f"r{n}", "prompt": "What helps?", "response": text} for n, text in enumerate([*texts, "No."])]
    rows.write_text("".join(json.dumps(record) + "\n" for record in records))
    argv = ["probe", "--judge.model", str(model), "--input", str(rows), "--output", str(output), "--sample", "2"]
    assert_refused(run([*argv, "--false_sample", "1"]), "false_sample", "reward model", "leave it out")
    [(code, out, err)] = worlds[1].run(run, [*argv, "--attributions", '["gate_branch", "gate_all", "occlusion"]'])
    assert code == 0 and "2 responses scored by a reward model" in out, out + err
    found = json.loads((output / "probe.json").read_text())
    assert list(found["score"]["attributions"]) == ["gate_branch", "gate_all", "occlusion", "shuffled"]
    assert "judge" not in found and "true" not in found and (output / "probe.html").exists()

    hf = AutoModelForSequenceClassification.from_pretrained(
        model, dtype=torch.float32, attn_implementation="eager"
    ).eval()
    prompt = RewardPrompt(load_tokenizer(model), JudgeConfig())
    assert sorted(pair["id"] for pair in found["pairs"]) == ["r0", "r1"]
    for pair in found["pairs"]:
        assert pair["verdict"] is None and pair["criterion"] == "the reward"
        body = encode_text(prompt.tokenizer, texts[int(pair["id"][1])])
        (item,) = prompt.build_items(Query("a", ({"role": "user", "content": "What helps?"},), ()), body)
        whole = score_of(hf, item.input_ids)
        spans = [(item.response_start + a, item.response_start + b) for a, b in pair["sentences"]]
        hidden = [whole - score_of(hf, item.input_ids, hide=span) for span in spans]
        deleted = [whole - score_of(hf, item.input_ids[:a] + item.input_ids[b:]) for a, b in spans]
        assert pair["masked"] == pytest.approx(hidden, abs=1e-5) and pair["deleted"] == pytest.approx(deleted, abs=1e-5)
        assert pair["credit"]["occlusion"] == pytest.approx(hidden, abs=1e-5) and max(map(abs, hidden)) > 1e-4
        assert pair["credit"]["gate_all"] != pair["credit"]["gate_branch"]

    (model / "chat_template.jinja").write_text("{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}{% endfor %}")
    assert_refused(run(argv), "judge.model", "reads its score at the response's last token")


@torch.no_grad()
def score_of(model, ids: list[int], hide: tuple[int, int] | None = None) -> float:
    """transformers' score at the last of ``ids``; no position after ``hide`` attends to what it spans, in any layer."""
    mask = torch.full((len(ids), len(ids)), -1e30).triu(1)
    if hide is not None:
        mask[hide[1] :, hide[0] : hide[1]] = -1e30
    hidden = model.model(torch.tensor([ids]), attention_mask=mask[None, None]).last_hidden_state
    return model.score(hidden[0, -1]).item()


def test_bad_input(worlds, tmp_path):
    """One line each; the last two are found after the weights were read."""
    refused = {
        ("--judge.attribution", "contracted"): ["judge.attribution", "contracted in g2r probe", "attributions"],
        ("--judge.credit", "per_response"): ["judge.credit", "per_response in g2r probe"],
        ("--attributions", "[]"): ["attributions", "missing"],
        ("--attributions", "[gate]"): ["attributions", "gate"],
        ("--sample", "0"): ["sample", "0", "at least 1"],
        ("--rollout.prompts_per_step", "2"): ["rollout.prompts_per_step", "2 in g2r probe"],
        ("--judge.ranks", "1"): ["judge.ranks", "1 in g2r probe"],
    }
    for options, said in refused.items():
        assert_refused(run(argv(tmp_path / "out", *options)), *said)
    assert not list(tmp_path.iterdir())

    unanswered = tmp_path / "unanswered.jsonl"
    unanswered.write_text(json.dumps(ROW) + "\n")
    assert_refused(run(argv(tmp_path / "out", rows=unanswered)), "policy.model", "1 of 1 rows have no response")
    short, false = tmp_path / "short.jsonl", tmp_path / "false.jsonl"
    short.write_text(json.dumps({**ROW, "response": "try slow turns. file updated."}) + "\n")
    assert_refused(run(argv(tmp_path / "out", rows=short)), "input", "none of 1 responses has 3 sentences")
    false.write_text(json.dumps({**ROW, "response": "file updated. patient is stable. review in one week."}) + "\n")
    [(code, _, err)] = worlds[1].run(run, argv(tmp_path / "out", rows=false))
    assert code == 2 and "0 verdicts True on 0 responses" in err
