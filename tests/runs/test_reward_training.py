"""A reward model as judge from end to end: a training step, a run and its report, ``g2r judge``, and bad input.

A tiny Qwen3 policy and a tiny Qwen2 reward model with the same tokenizer; rows have no rubric. The step's scores and
credit are held against transformers on the token ids that were sampled. Leaves out layouts and other tokenizers
(test_reward_model.py), and what does not depend on the judge.
"""

import json
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForSequenceClassification

from g2r_megatron.cli import main
from g2r_megatron.config import parsing
from g2r_megatron.config.command_options import OfflineJudgeConfig
from g2r_megatron.config.options import JudgeConfig, TrainConfig
from g2r_megatron.config.presets import PRESETS, fill_from_preset, resolve_preset
from g2r_megatron.data.tokenizer import encode_text, load_tokenizer, token_texts
from g2r_megatron.data.types import Query
from g2r_megatron.judge.offline import judge_file
from g2r_megatron.judge.reward_prompt import RewardPrompt
from test_bad_input import assert_refused, run
from test_own_ranks import assert_same_run
from test_reward_model import hf_reference, reference_alpha
from test_train_loop import metrics_of, samples_of, train_here
from tiny_models import build_tiny_reward_model

GROUP = 4
PROMPTS = ["What helps against fever?", "What helps against a rash?"]
CHECKED = {"criterion": "mentions water", "weight": 1, "check": "water"}


@pytest.fixture(scope="module")
def judge(tmp_path_factory) -> Path:
    return build_tiny_reward_model("qwen2", tmp_path_factory.mktemp("reward") / "model")


def write_rows(file: Path, *rows: dict) -> Path:
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


@pytest.fixture(scope="module")
def task(tiny_hf, judge, tmp_path_factory) -> list[str]:
    data = tmp_path_factory.mktemp("task")
    train = write_rows(data / "train.jsonl", *({"id": p, "prompt": p} for p in PROMPTS))
    held_out = write_rows(data / "eval.jsonl", {"prompt": "Fever?", "rubric": [CHECKED]}, {"prompt": "Rash?"})
    return [
        *("--policy.model", str(tiny_hf("qwen3")), "--judge.model", str(judge), "--steps", "2"),
        *("--data.train", f'["{train}"]', "--eval.data", f'["{held_out}"]'),
        *("--rollout.prompts_per_step", "2", "--rollout.responses_per_prompt", str(GROUP)),
        *("--rollout.max_response_tokens", "16", "--log.tensorboard", "false", "--grpo.mix_anneal", "0"),
        *("--grpo.kl_coef", "0.1", "--log.samples_every", "1"),
    ]


# In the ranks.


def step_of(arguments: list[str]) -> dict:
    """The first training step: what was sampled, its scores and credit, and whether the KL reference is the judge."""
    from g2r_megatron.records.heartbeat import Heartbeat
    from g2r_megatron.run import Run
    from g2r_megatron.train import train_step
    from g2r_megatron.workers import build_workers, read_inputs

    config = resolve_preset(parsing.parse(TrainConfig, "g2r train", arguments))
    inputs = read_inputs(config)
    workers = build_workers(config, inputs)
    kept = []
    output = Path(config.output_dir)
    run = Run(config, output, 0, Heartbeat(output, config.steps), checkpointer=None)  # a step saves nothing
    run.sample = lambda step, batch, inputs: kept.append(batch)
    metrics = train_step(config, inputs, workers, run, 1)
    (batch,) = kept
    return {
        "metrics": metrics,
        "reference": workers.reference.hf.architecture,
        "queries": [query.id for query in batch.queries],
        "bodies": [response.body_ids for response in batch.responses],
        "finished": [response.finished for response in batch.responses],
        "scores": [row[0].score for row in batch.judgements],
        "alphas": [None if row[0] is None else row[0].tolist() for row in batch.alphas],
        "advantages": [a.tolist() for a in batch.advantages],
    }


# The reference.

CONTRACTED = dict(attribution="contracted", normalize="softmax", standardize=True, smoothing="smear")


def paper_advantages(scores: list[float], alphas: list[torch.Tensor], finished: list[bool]) -> list[torch.Tensor]:
    """docs/method.md step 8 with return-to-go and a z-score over all tokens, token by token."""
    returns = []
    for score, alpha, done in zip(scores, alphas, finished, strict=True):
        rewards = [score * float(a) for a in alpha] + [0.0] * done
        rewards[-1] += score
        returns.append([sum(rewards[t:]) for t in range(len(rewards))])
    tokens = torch.tensor([value for row in returns for value in row], dtype=torch.float64)
    return [(torch.tensor(row) - tokens.mean()) / tokens.std(unbiased=False) for row in returns]


def robust_advantages(scores: list[float], alphas: list[torch.Tensor], finished: list[bool]) -> list[torch.Tensor]:
    """The z-score of V, above the mean times m T alpha + (1 - m) with m = 0.5; alone on the stop token."""
    values = torch.tensor(scores, dtype=torch.float64)
    levels = ((values - values.mean()) / values.std(unbiased=False)).tolist()
    result = []
    for level, alpha, done in zip(levels, alphas, finished, strict=True):
        weights = 0.5 * len(alpha) * alpha + 0.5 if level > 0 else torch.ones(len(alpha))
        result.append(torch.cat([level * weights, torch.tensor([level] * done)]))
    return result


@pytest.mark.parametrize(("preset", "expected"), [("paper", paper_advantages), ("robust", robust_advantages)])
def test_a_step_equals_hugging_face(worlds, task, judge, tmp_path, preset, expected):
    """Scores of what was sampled, and the advantages that follow from them; the KL reference is the policy, not the judge."""
    arguments = [*task, "--grpo.preset", preset, "--output_dir", str(tmp_path / "run")]
    if preset == "robust":
        arguments += [text for name, value in CONTRACTED.items() for text in (f"--judge.{name}", str(value).lower())]
    (found,) = worlds[1].run(step_of, arguments)
    config = resolve_preset(parsing.parse(TrainConfig, "g2r train", arguments)).judge
    model = AutoModelForSequenceClassification.from_pretrained(judge, dtype=torch.float32).eval().requires_grad_(False)
    prompt = RewardPrompt(load_tokenizer(judge), config, None, 0)
    scores, alphas = [], []
    for id, body in zip(found["queries"], found["bodies"], strict=True):
        (built,) = prompt.build_items(Query(id, ({"role": "user", "content": id},), ()), body)
        wanted = hf_reference(model, built.input_ids, slice(built.response_start, built.response_end), config)
        scores.append(wanted.score)
        alphas.append(reference_alpha(wanted.b, config))
    torch.testing.assert_close(torch.tensor(found["scores"]), torch.tensor(scores), rtol=1e-5, atol=1e-6)
    attributed = 0
    for start in range(0, len(scores), GROUP):
        group = slice(start, start + GROUP)
        mean = sum(scores[group]) / GROUP
        for i in range(start, start + GROUP):  # no backward where it could change nothing
            wants = bool(found["bodies"][i]) and (preset == "paper" or scores[i] > mean)
            assert (found["alphas"][i] is not None) == wants
            attributed += wants
        wanted = expected(scores[group], alphas[group], found["finished"][group])
        for ours, theirs in zip(found["advantages"][group], wanted, strict=True):
            torch.testing.assert_close(torch.tensor(ours).double(), theirs.double(), rtol=1e-4, atol=1e-4)
    metrics = found["metrics"]
    assert found["reference"] == "Qwen3ForCausalLM" and metrics["attribution/passes"] == attributed
    assert metrics["attribution/zero_or_nonfinite"] == 0 and metrics["optimizer/grad_norm"] > 0
    assert metrics["reward/mean"] == pytest.approx(sum(scores) / len(scores), rel=1e-4)
    assert not {"judge/true_share", "judge/agreement", "judge/gap", "reward/true_mean"} & metrics.keys()


def test_a_run_and_its_report(worlds, task, tmp_path):
    """Two steps, the judge on TP 2; the truth is evaluated where a row's rubric has checks; the report draws the scores."""
    layout = ["--judge.layout.tp", "2", "--judge.layout.sp", "true"]
    worlds[2].run(train_here, [*task, *layout, "--output_dir", str(tmp_path / "run")])
    rows = metrics_of(tmp_path / "run")
    assert [row["step"] for row in rows] == [0, 1, 2]
    assert {"eval/judge_score", "eval/true_score"} <= rows[0].keys() and "eval/agreement" not in rows[0]
    samples = samples_of(tmp_path / "run")
    assert len(samples) == 4 and any(sample["items"][0]["alpha"] for sample in samples)
    for sample in samples:
        (item,) = sample["items"]
        assert item["score"] == sample["reward"] and sample["true_reward"] is None
        assert sum(sample["token_rewards"]) == pytest.approx(2 * item["score"], rel=1e-5)
    assert main(["report", str(tmp_path / "run"), "--output", str(tmp_path / "report.html")]) == 0
    assert "score of the reward model" in (tmp_path / "report.html").read_text()


def test_a_run_on_answers(worlds, task, tmp_path):
    """A verifier, here a command, gives the rewards; the score gives its credit where it ranks a response as the verifier does.

    The same bits with the reward model on a rank of its own.
    """
    check = "import json, sys; sys.exit(len(json.load(sys.stdin)['response']) % 2)"
    rows = [{"id": p, "prompt": p, "answer": "1"} for p in PROMPTS]
    data = str(write_rows(tmp_path / "rows.jsonl", *rows))
    task = [*task, "--data.train", f'["{data}"]', "--eval.data", f'["{data}"]', "--data.format", "verifiable"]
    task += ["--verifier.kind", "command", "--verifier.command", json.dumps([sys.executable, "-c", check])]
    worlds[1].run(train_here, [*task, "--output_dir", str(tmp_path / "shared")])
    worlds[2, 1].run(
        train_here, [*task, "--judge.ranks", "1", "--judge.parts", "1", "--output_dir", str(tmp_path / "own")]
    )
    assert_same_run(tmp_path / "own", tmp_path / "shared")
    samples = samples_of(tmp_path / "shared")
    assert {sample["reward"] for sample in samples} == {0.0, 1.0}
    assert all(sample["reward"] == 1 - len(sample["response"]) % 2 for sample in samples)
    assert all(0 <= row["judge/verifier_agreement"] <= 1 for row in metrics_of(tmp_path / "shared")[1:])


def test_on_ranks_of_its_own(worlds, task, tmp_path):
    """The same run, bit for bit, with the reward model beside the policy and on a rank of its own."""
    task = [*task, "--judge.parts", "2"]  # parts of a batch are packed on their own
    worlds[1].run(train_here, [*task, "--output_dir", str(tmp_path / "shared")])
    worlds[2, 1].run(train_here, [*task, "--judge.ranks", "1", "--output_dir", str(tmp_path / "own")])
    assert_same_run(tmp_path / "own", tmp_path / "shared")


@pytest.mark.parametrize("preset", ["paper", "robust"])
def test_offline(worlds, judge, tmp_path, preset):
    """Every number of ``g2r judge`` against transformers on the inputs it dumps; the rows need no rubric."""
    texts = ["Rest, drink water.", "A doctor can tell! <|im_end|> See one.", "No"]
    rows = [{"id": f"r{i}", "prompt": "What helps?", "response": text} for i, text in enumerate(texts)]
    known = CONTRACTED if preset == "robust" else {}  # gates: tests/parity/test_parity_gates.py
    options = fill_from_preset(JudgeConfig(model=str(judge), **known), PRESETS[preset]["judge"])
    file, output = write_rows(tmp_path / "rows.jsonl", *rows), tmp_path / "out.jsonl"
    config = OfflineJudgeConfig(input=str(file), output=str(output), preset=preset, judge=options, dump_inputs=True)
    worlds[1].run(judge_file, config)
    model = AutoModelForSequenceClassification.from_pretrained(judge, dtype=torch.float32).eval().requires_grad_(False)
    tokenizer = load_tokenizer(judge)
    records = [json.loads(line) for line in output.read_text().splitlines()]
    assert [record["id"] for record in records] == ["r0", "r1", "r2"]
    for record, text in zip(records, texts, strict=True):
        keys = ["id", "reward", "tokens", "token_rewards", "attribution", "alpha"]
        assert list(record) == [*keys, "input_ids", "response_start", "response_end", "score_position"]
        assert record["tokens"] == token_texts(tokenizer, encode_text(tokenizer, text))
        span = slice(record["response_start"], record["response_end"])
        assert record["score_position"] == len(record["input_ids"]) - 1
        wanted = hf_reference(model, record["input_ids"], span, options)
        rewards = wanted.score * reference_alpha(wanted.b, options)
        rewards[-1] += wanted.score
        assert record["reward"] == pytest.approx(wanted.score, rel=1e-5)
        assert ((torch.tensor(record["attribution"]) - wanted.b).abs() <= 1e-6 * wanted.size).all()
        torch.testing.assert_close(torch.tensor(record["token_rewards"]).double(), rewards, rtol=1e-4, atol=1e-6)


# Bad input: what breaks the reward model's directory, further options, and what the line must say.


def edit_config(model: Path, **values) -> None:
    config = json.loads((model / "config.json").read_text()) | values
    (model / "config.json").write_text(json.dumps({key: value for key, value in config.items() if value is not None}))


def edit_weights(model: Path, edit: Callable[[dict], object]) -> None:
    weights = load_file(model / "model.safetensors")
    edit(weights)
    save_file(weights, model / "model.safetensors", metadata={"format": "pt"})


BAD = {
    "two labels": (lambda m: edit_config(m, id2label={"0": "a", "1": "b"}), [], ["id2label", "2 labels", "classifier"]),
    "no labels": (lambda m: edit_config(m, id2label=None, label2id=None), [], ["id2label", "missing", "2 labels"]),
    "no score": (
        lambda m: edit_weights(m, lambda w: w.pop("score.weight")),
        [],
        ["score.weight is missing", "config.json"],
    ),
    "a score of two rows": (
        lambda m: edit_weights(m, lambda w: w.update({"score.weight": torch.zeros(2, 64)})),
        [],
        ["score.weight", "shape (2, 64)", "(1, 64)"],
    ),
    "a template": (
        None,
        ["--judge.template", "{conversation}{response}{criterion}"],
        ["judge.template", "reward model", "leave it out"],
    ),
    "no chat template wanted": (None, ["--judge.chat_template", "false"], ["judge.chat_template", "reward model"]),
    "sampled verdicts": (None, ["--judge.verdict", "sample"], ["judge.verdict", "reward model"]),
    "no chat template there": (
        lambda m: (m / "chat_template.jinja").unlink(),
        [],
        ["judge.model", "no chat template", "trained with"],
    ),
    "a long row": (None, ["--judge.max_length", "10"], ["judge.max_length", "'r1'", "more than 10"]),
}


@pytest.mark.parametrize("name", BAD)
def test_refused(worlds, name, tmp_path):
    break_, options, said = BAD[name]
    model = build_tiny_reward_model("qwen2", tmp_path / "model")
    if break_ is not None:
        break_(model)
    rows = write_rows(tmp_path / "rows.jsonl", {"id": "r1", "prompt": "Fever?", "response": "Rest."})
    argv = ["judge", "--judge.model", str(model), "--input", str(rows), "--output", str(tmp_path / "out.jsonl")]
    [result] = worlds[1].run(run, [*argv, *options])
    assert_refused(result, *said)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model", "rows.jsonl"]


def test_a_policy_that_is_a_reward_model(task, judge, tmp_path):
    argv = ["train", *task, "--policy.model", str(judge), "--output_dir", str(tmp_path / "run")]
    assert_refused(run(argv), "policy.model", "Qwen2ForSequenceClassification", "language model")
    assert not list(tmp_path.iterdir())


def test_an_ordinary_judge_needs_a_rubric(task, tiny_hf, tmp_path):
    argv = ["train", *task, "--output_dir", str(tmp_path / "run"), "--judge.model", str(tiny_hf("qwen3"))]
    assert_refused(run(argv), "train.jsonl:1", "hold no rubric")
    assert_refused(run([*argv, "--data.format", "g2r"]), "train.jsonl:1", "hold no rubric")
    assert not list(tmp_path.iterdir())
