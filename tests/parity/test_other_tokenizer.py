"""Training with a judge of another tokenizer: a step's token weights equal transformers' gradient moved byte by byte.

A tiny Qwen3 policy, judged by a tiny Llama with a sentencepiece or another byte-level vocabulary, through the real
training step on one rank and on four. The random policy samples special ids and bytes that are no UTF-8. The reference:
one sequence at a time in transformers, its autograd, and loops over the bytes of the response. Leaves out the tokenizers
themselves (test_alignment.py) and the update, which does not know how credit came about.
"""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from g2r_megatron.config import parsing
from g2r_megatron.config.options import TrainConfig
from g2r_megatron.config.presets import resolve_preset
from g2r_megatron.credit.advantages import GroupScores, group_advantages
from g2r_megatron.data.readers import read_queries
from g2r_megatron.data.tokenizer import load_tokenizer, neutral_ids, token_texts
from g2r_megatron.judge.prompt import JudgePrompt
from g2r_megatron.policy.checkpoint import Checkpointer
from g2r_megatron.records.heartbeat import Heartbeat
from g2r_megatron.run import Run
from g2r_megatron.train import train_step
from g2r_megatron.workers import build_workers, read_inputs
from test_alignment import byte_bpe, owners_of, piece_bytes
from test_parity_judge import Variant, hf_judge, reference_alpha
from test_tokenizer_files import KINDS, train
from test_train_loop import metrics_of, samples_of, train_here
from tiny_models import build_model, build_tokenizer

GROUP = 6
TEMPLATE = "{conversation}\nResponse: {response}\nCriterion: {criterion}\nTrue or False:"
VARIANTS = {
    "paper": Variant("grad_x_embed", "log_prob", "none", 400, False, "none", tau=0.05),
    "robust": Variant("contracted", "logit_margin", "none", 8192, True, "smear"),
    "sentences": Variant("l1", "log_prob", "none", 150, False, "sentence", tau=0.2),
}


@pytest.fixture(scope="module")
def judge_directory(tmp_path_factory):
    """``judge_directory("bpe" | "unigram" | "large" | "more")`` -> a tiny Llama with that tokenizer."""
    made: dict[str, Path] = {}

    def get(name: str) -> Path:
        if name not in made:
            path = tmp_path_factory.mktemp(name)
            if name in KINDS:
                tokenizer = load_tokenizer(train(path, **KINDS[name]))
            else:
                tokenizer = byte_bpe(460) if name == "large" else build_tokenizer()
                if name == "more":
                    tokenizer.add_tokens(["<more>"])
                tokenizer.save_pretrained(path)
            build_model("llama3", len(tokenizer), seed=3).save_pretrained(path)
            made[name] = path
        return made[name]

    return get


@pytest.fixture(scope="module")
def task(tiny_hf, tmp_path_factory) -> list[str]:
    data = tmp_path_factory.mktemp("task") / "train.jsonl"
    rubric = [{"criterion": "mentions water", "weight": 2}, {"criterion": "is unkind", "weight": -1}]
    prompts = ["What helps against fever?", "What helps against a rash?"]
    data.write_text("".join(json.dumps({"id": p, "prompt": p, "rubric": rubric}) + "\n" for p in prompts))
    return [
        *("--policy.model", str(tiny_hf("qwen3")), "--data.train", f'["{data}"]', "--steps", "2"),
        *("--rollout.prompts_per_step", "2", "--rollout.responses_per_prompt", str(GROUP)),
        *("--rollout.max_response_tokens", "24", "--judge.template", TEMPLATE, "--judge.chat_template", "false"),
        *("--judge.true_words", '["True", "1", "T"]', "--judge.false_words", '["False", "0", "F"]'),
        *("--judge.verdict", "sample", "--log.tensorboard", "false", "--grpo.mix_anneal", "0"),
    ]


def arguments_of(task: list[str], judge: Path, name: str, output: Path) -> list[str]:
    v = VARIANTS[name]
    return [
        *(*task, "--judge.model", str(judge), "--output_dir", str(output)),
        *("--grpo.preset", "robust" if name == "robust" else "paper", "--judge.tau", str(v.tau)),
        *("--judge.attribution", v.attribution, "--judge.target", v.target, "--judge.smoothing", v.smoothing),
        *("--judge.normalize", "softmax"),
        *("--judge.standardize", str(v.standardize).lower(), "--judge.micro_batch_tokens", str(v.micro_batch_tokens)),
    ]


# In the ranks.


class Keeper(Run):
    """A run that keeps the batch of its latest step."""

    def sample(self, step, batch, inputs) -> None:
        self.batch = batch


def step_of(arguments: list[str]) -> dict:
    """The first training step: what was sampled and what credit it got."""
    config = resolve_preset(parsing.parse(TrainConfig, "g2r train", arguments))
    inputs = read_inputs(config)
    workers = build_workers(config, inputs)
    output = Path(config.output_dir)
    output.mkdir(exist_ok=True)
    checkpointer = Checkpointer(workers.trainer, output / "checkpoints", keep_last=1)
    run = Keeper(config, output, 0, Heartbeat(output, config.steps), checkpointer)
    metrics = train_step(config, inputs, workers, run, 1)
    return {
        "metrics": metrics,
        "queries": [query.id for query in run.batch.queries],
        "bodies": [response.body_ids for response in run.batch.responses],
        "finished": [response.finished for response in run.batch.responses],
        "keys": run.batch.keys,
        "verdicts": [[j.verdict for j in row] for row in run.batch.judgements],
        "alphas": [[None if a is None else a.tolist() for a in row] for row in run.batch.alphas],
        "advantages": [a.tolist() for a in run.batch.advantages],
    }


# The reference.


def moved(alpha: torch.Tensor, name: str, judge, ids: list[int], owners: list[list[int]], length: int) -> torch.Tensor:
    """Byte by byte: a judge token divides its alpha evenly among its bytes, a byte among the six sixths it is made of."""
    result, place = torch.zeros(length, dtype=torch.float64), 0
    for share, token in zip(alpha.tolist(), ids, strict=True):
        size = len(piece_bytes(judge, name, token))
        for owner in owners[place : place + size]:
            for t in owner:
                result[t] += share / size / 6
        place += size
    assert place == len(owners)
    return result


def expected_alphas(found: dict, config: TrainConfig, name: str, variant: Variant) -> list[list[torch.Tensor]]:
    """Every item's alpha over the policy's tokens, also where the run needed none; checks the verdicts."""
    judge, policy = load_tokenizer(config.judge.model), load_tokenizer(config.policy.model)
    model = AutoModelForCausalLM.from_pretrained(config.judge.model, dtype=torch.float32).eval().requires_grad_(False)
    prompt = JudgePrompt(judge, config.judge, policy)
    queries = {query.id: query for query in read_queries(config.data.train, "auto", "raw")}
    rows = []
    for i, body in enumerate(found["bodies"]):
        text, owners = owners_of(policy, "small", neutral_ids(policy, body))
        row = []
        for k, item in enumerate(queries[found["queries"][i]].rubric):
            built = prompt.build(queries[found["queries"][i]], item, body)
            ids = built.input_ids[built.response_start : built.response_end]
            assert judge.decode(built.input_ids, skip_special_tokens=True).strip() == (
                f"user: {found['queries'][i]}\nResponse: {text}\nCriterion: {item.criterion}\nTrue or False:"
            )
            key = f"{found['keys'][i]}/{k}"
            reference = hf_judge(model, built, prompt.true_ids, prompt.false_ids, variant, key)
            assert reference.verdict == found["verdicts"][i][k]
            unpooled = reference_alpha(reference.b, replace(variant, smoothing="none"), [])
            alpha = moved(unpooled, name, judge, ids, owners, len(body))
            row.append(smoothed(alpha, variant.smoothing, token_texts(policy, body)))
        rows.append(row)
    return rows


def smoothed(alpha: torch.Tensor, smoothing: str, texts: list[str]) -> torch.Tensor:
    """As ``reference_alpha`` does it, of a distribution: docs/method.md step 4 without the softmax."""
    as_it_is = Variant("l1", "log_prob", "none", 1, False, smoothing)
    return reference_alpha(alpha.clamp(min=1e-300).log(), as_it_is, texts)


@pytest.mark.parametrize(
    ("judge", "variant", "ranks"),
    [
        *(("bpe", "paper", 1), ("bpe", "robust", 1), ("bpe", "sentences", 1), ("large", "robust", 1)),
        *(("large", "paper", 1), ("unigram", "robust", 1), ("bpe", "robust", 4)),
    ],
)
def test_token_weights_equal_the_gradient_moved_byte_by_byte(
    worlds, task, judge_directory, tmp_path, judge, variant, ranks
):
    arguments = arguments_of(task, judge_directory(judge), variant, tmp_path / "run")
    if ranks == 4:
        arguments += ["--judge.layout.tp", "2", "--judge.layout.pp", "2", "--judge.layout.sp", "true"]
    results = worlds[ranks].run(step_of, arguments)
    assert all(result["alphas"] == results[0]["alphas"] for result in results)
    found, config = results[0], resolve_preset(parsing.parse(TrainConfig, "g2r train", arguments))
    expected = expected_alphas(found, config, judge, VARIANTS[variant])
    weights, worst, attributed = [2.0, -1.0], 0.0, 0
    for row, wanted in zip(found["alphas"], expected, strict=True):
        for alpha, reference in zip(row, wanted, strict=True):
            assert float(reference.sum()) == pytest.approx(1.0)
            if alpha is not None:
                attributed += 1
                alpha = torch.tensor(alpha, dtype=torch.float64)
                assert float(alpha.sum()) == pytest.approx(1.0, abs=1e-6)
                worst = max(worst, float((alpha - reference).norm() / reference.norm()))
    print(f"{attributed} items, worst error {worst:.1e}")
    assert attributed >= 3 and worst <= 1e-5
    for start in range(0, len(found["bodies"]), GROUP):
        group = slice(start, start + GROUP)
        alphas = [
            [None if a is None else w.float() for a, w in zip(*rows)]
            for rows in zip(found["alphas"][group], expected[group])
        ]
        lengths = [len(body) for body in found["bodies"][group]]
        verdicts = torch.tensor(found["verdicts"][group])
        scores = GroupScores(verdicts, torch.tensor(weights), alphas, lengths, found["finished"][group])
        for ours, theirs in zip(found["advantages"][group], group_advantages(scores, config.grpo, config.grpo.mix)):
            torch.testing.assert_close(torch.tensor(ours), theirs, rtol=1e-4, atol=1e-4)
    assert found["metrics"]["attribution/zero_or_nonfinite"] == 0 and found["metrics"]["optimizer/grad_norm"] > 0


def test_cases_have_teeth(worlds, task, judge_directory, tmp_path):
    """The bodies hold broken bytes, and the judge reads other tokens than the policy wrote, and more or fewer of them."""
    (found,) = worlds[1].run(step_of, arguments_of(task, judge_directory("bpe"), "paper", tmp_path / "run"))
    policy, judge = build_tokenizer(), load_tokenizer(judge_directory("bpe"))
    texts = [owners_of(policy, "small", neutral_ids(policy, body))[0] for body in found["bodies"]]
    assert any("\ufffd" in text for text in texts) and any(" " in text for text in texts)
    assert all(len(judge.tokenize(text)) != len(body) for text, body in zip(texts, found["bodies"]) if len(body) > 5)


def test_a_run_and_its_report(worlds, task, judge_directory, tmp_path, capsys):
    """Two steps from the command line's entry; what is drawn is over the policy's tokens."""
    from g2r_megatron.cli import main

    run = tmp_path / "run"
    worlds[1].run(train_here, arguments_of(task, judge_directory("unigram"), "robust", run))
    assert len(metrics_of(run)) == 2
    samples = samples_of(run)
    assert samples and any(item["alpha"] for sample in samples for item in sample["items"])
    for sample in samples:
        for item in sample["items"]:
            assert item["alpha"] is None or len(item["alpha"]) == len(sample["tokens"]) == len(sample["token_rewards"])
    assert main(["report", str(run), "--output", str(tmp_path / "report.html")]) == 0
    assert (tmp_path / "report.html").stat().st_size > 10000


def test_a_judge_with_a_few_tokens_more_reads_the_ids(task, judge_directory, tiny_hf, tmp_path):
    """Nothing moves where the policy's ids mean the same to the judge; fewer rows of embeddings than the policy: text."""
    same, more, other = tiny_hf("llama3"), judge_directory("more"), judge_directory("large")
    for judge, policy, reads_ids in ((same, None, True), (more, None, True), (other, None, False), (same, more, False)):
        arguments = [*arguments_of(task, judge, "paper", tmp_path / "run")]
        if policy is not None:
            arguments += ["--policy.model", str(policy)]
        inputs = read_inputs(resolve_preset(parsing.parse(TrainConfig, "g2r train", arguments)))
        assert (inputs.prompt.policy_tokenizer is None) == reads_ids
        assert len(inputs.prompt.tokenizer) == len(load_tokenizer(judge))
