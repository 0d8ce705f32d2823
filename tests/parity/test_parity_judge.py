"""The judge's verdicts, attributions and token rewards equal Hugging Face autograd's, on every layout.

The reference is plain transformers in this process: embeddings as a leaf, one sequence at a time, its own softmax.
Tolerances (fp32): token rewards 1e-5 of their norm, attributions 1e-4 of their norm and 1e-6 of |g_t||e_t| (g.e is a
cancellation). Other layouts and mixtures of experts: test_parity_judge_layouts.py. Leaves out bf16, and the prompt:
``JudgePrompt`` builds both sides'.
"""

import json
import random
import shutil
from dataclasses import dataclass, replace
from functools import cache

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from distributed import LAYOUTS, groups_of
from g2r_megatron.config.options import (
    GrpoConfig,
    JudgeConfig,
    Layout,
    OptimizerConfig,
    PolicyConfig,
    Precision,
    RolloutConfig,
    TrainConfig,
)
from g2r_megatron.config.presets import PRESETS
from g2r_megatron.credit.attribution import token_rewards
from g2r_megatron.credit.hazards import attribution_metrics
from g2r_megatron.credit.sentences import sentence_ids
from g2r_megatron.data.tokenizer import encode_text, load_tokenizer
from g2r_megatron.data.types import Query, RubricItem
from g2r_megatron.errors import UserError
from g2r_megatron.judge.prompt import JudgePrompt
from tiny_models import DENSE_FAMILIES

SHORT = "{conversation} | {response} | {criterion} =>"
QUERIES = [
    Query(
        "a",
        ({"role": "user", "content": "write a note on fever"},),
        (RubricItem("sees a doctor", 5.0), RubricItem("is longer than three days", -3.0), RubricItem("rest", 2.0)),
    ),
    Query(
        "b",
        ({"role": "system", "content": "be short"}, {"role": "user", "content": "rash, and what helps against it?"}),
        (RubricItem("drink water", 4.0), RubricItem("answers in a conversation", 1.0)),
    ),
]
# (query, response): lengths differ, so that micro-batches are padded
RESPONSES = [
    (0, "A note on fever: rest and see a doctor."),
    (0, "drink water, if it lasts longer than three days see a doctor, a doctor, a doctor"),
    (1, "rash"),
    (1, "A conversation on rash.\nTrue or False, rest!"),
]
CONTRACTION = 0.15


@dataclass(frozen=True)
class Variant:
    """One way to judge; together they cover every option that changes how the gradient is taken."""

    attribution: str
    target: str
    recompute: str
    micro_batch_tokens: int  # 1: a sequence each; 150: a few; 8192: all in one
    standardize: bool
    smoothing: str
    tau: float = 1.0  # of the size of b's spread, so that an error in b's scale shows in the rewards
    normalize: str = "softmax"
    verdict: str = "sample"  # these models mostly answer False; sampling gives both verdicts
    chat: bool = False  # the default template in the tokenizer's chat template, instead of SHORT

    def config(self) -> JudgeConfig:
        template = {} if self.chat else dict(template=SHORT)
        return JudgeConfig(
            **template,
            chat_template=self.chat,
            attribution=self.attribution,
            target=self.target,
            recompute=self.recompute,
            micro_batch_tokens=self.micro_batch_tokens,
            normalize=self.normalize,
            standardize=self.standardize,
            smoothing=self.smoothing,
            tau=self.tau,
            verdict=self.verdict,
            contraction=CONTRACTION,
        )


VARIANTS = {
    "paper": Variant("grad_x_embed", "log_prob", "none", 150, False, "none", tau=0.05),
    "robust": Variant("contracted", "logit_margin", "none", 8192, True, "smear", verdict="compare", chat=True),
    "one_each_full_recompute": Variant("grad_x_embed", "logit_margin", "full", 1, False, "none", tau=0.05),
    "l1_selective_recompute": Variant("l1", "log_prob", "selective", 150, False, "sentence", verdict="compare"),
    "l2_full_recompute": Variant("l2", "logit_margin", "full", 8192, False, "smear", tau=0.3),
    "contracted_log_prob": Variant("contracted", "log_prob", "selective", 150, False, "none", tau=0.2),
    "null_token": Variant("null_token", "log_prob", "none", 150, False, "none", tau=0.05),
    "grad_norm_product": Variant(
        "grad_norm_product", "logit_margin", "full", 150, False, "smear", normalize="positive"
    ),
}
IN_ONE_FAMILY = ("null_token", "grad_norm_product")  # they differ from the others after the backward pass only


# In the ranks.


@cache
def megatron_model(path: str, tp: int, pp: int, sp: bool, recompute: str):
    from g2r_megatron.model.build import build_model
    from g2r_megatron.model.hf import open_hf_model

    groups = groups_of(Layout(tp=tp, pp=pp, sp=sp))
    return build_model("judge", open_hf_model(path, "judge.model"), groups, Precision(), recompute)


def judge_stage(layout: Layout, path: str, config: JudgeConfig):
    from g2r_megatron.judge.frozen import FrozenJudge
    from g2r_megatron.judge.stage import JudgeStage

    model = megatron_model(path, layout.tp, layout.pp, layout.sp, config.recompute)
    prompt = JudgePrompt(load_tokenizer(path), config)
    return JudgeStage(FrozenJudge(model, config, prompt.true_ids, prompt.false_ids, prompt.null_id), prompt, config)


def bodies(tokenizer) -> list[list[int]]:
    return [encode_text(tokenizer, text) for _, text in RESPONSES]


def judge(stage) -> dict:
    """Everything that the stage says of RESPONSES, as plain numbers; every item gets a backward pass."""
    queries, texts = [QUERIES[q] for q, _ in RESPONSES], bodies(stage.prompt.tokenizer)
    inputs = stage.inputs(queries, texts)
    judgements = stage.verdicts(inputs, [str(i) for i in range(len(texts))])
    weights = [[item.weight for item in query.rubric] for query in queries]
    stage.attribute(inputs, judgements, [[True] * len(row) for row in judgements], weights)
    rewards, alphas = [], []
    for query, body, row in zip(queries, texts, judgements):
        alphas.append(stage.alphas(body, row))
        verdicts, weights = [item.verdict for item in row], [item.weight for item in query.rubric]
        rewards.append(token_rewards(verdicts, weights, alphas[-1], query.positive_weight, len(body)).tolist())
    parameters = list(stage.judge.model.chunks[0].parameters())
    return {
        "items": [
            [
                (item.p_true, item.p_false, item.verdict, item.attribution.tolist(), item.grad_norm, item.cos)
                for item in row
            ]
            for row in judgements
        ],
        "alphas": [[alpha.tolist() for alpha in row] for row in alphas],
        "rewards": rewards,
        "trainable": sum(p.requires_grad for p in parameters),
        "gradients": sum(p.grad is not None for p in parameters),
    }


def judge_on(layout: Layout, path: str, variant: str) -> dict:
    return judge(judge_stage(layout, path, VARIANTS[variant].config()))


# The reference.


@dataclass
class Reference:
    """Of one (response, item): verdict probabilities, b_t [T], and |g_t||d_t| [T] that its error is held against."""

    p_true: float
    p_false: float
    verdict: bool
    b: torch.Tensor
    size: torch.Tensor
    grad_norm: float


def hf_judge(model, judge_input, true_ids, false_ids, variant: Variant, key: str, null_id: int = 0) -> Reference:
    """docs/method.md steps 1 to 3 (and the contracted embedding) by transformers' forward and autograd."""
    table = model.get_input_embeddings().weight.detach()
    embeddings, span = (
        table[torch.tensor(judge_input.input_ids)],
        slice(judge_input.response_start, judge_input.response_end),
    )

    def verdict_log_probs(inputs):
        log_probs = model(inputs_embeds=inputs[None]).logits[0, judge_input.verdict_position].log_softmax(-1)
        return log_probs[true_ids].logsumexp(0), log_probs[false_ids].logsumexp(0)

    with torch.no_grad():
        true, false = verdict_log_probs(embeddings)
    verdict = bool(true > false)
    if variant.verdict == "sample":
        verdict = random.Random(key).random() < true.exp() / (true.exp() + false.exp())
    leaf, direction = embeddings.clone(), embeddings[span]
    if variant.attribution == "contracted":
        direction = direction - table.mean(0)
        leaf[span] = table.mean(0) + CONTRACTION * direction
    elif variant.attribution == "null_token":
        direction = direction - table[null_id]
    leaf.requires_grad_()
    a, b = verdict_log_probs(leaf)
    target = a - b if variant.target == "logit_margin" else (a if verdict else b)
    gradient = torch.autograd.grad(target, leaf)[0][span]
    product = gradient * direction
    norms = {"l1": gradient.abs().sum(-1), "l2": gradient.norm(dim=-1), "grad_norm_product": product.norm(dim=-1)}
    scores = norms.get(variant.attribution, product.sum(-1))
    size = gradient.norm(dim=-1) * direction.norm(dim=-1)
    return Reference(true.exp().item(), false.exp().item(), bool(verdict), scores, size, gradient.norm().item())


def reference_alpha(b: torch.Tensor, variant: Variant, texts: list[str]) -> torch.Tensor:
    """docs/method.md step 4, token by token in Python; of ``positive`` for a b that is positive."""
    b = b.double()
    if variant.normalize == "positive":
        return reference_alpha(
            (b / b.sum()).log(), replace(variant, normalize="softmax", standardize=False, tau=1.0), texts
        )
    if variant.standardize:
        b = (b - b.mean()) / b.std(unbiased=False)
    alpha = (b / variant.tau).softmax(0)
    if variant.smoothing == "smear":
        for t in range(len(alpha) - 2, -1, -1):
            alpha[t] = alpha[t] + 0.7 * alpha[t + 1]
        alpha = alpha / alpha.sum()
    elif variant.smoothing == "sentence":
        ids = sentence_ids(texts)
        for sentence in range(int(ids[-1]) + 1):
            alpha[ids == sentence] = alpha[ids == sentence].mean()
    return alpha


@pytest.fixture(scope="module")
def reference(tiny_hf):
    """``reference(family, variant)`` -> (rows of Reference, token rewards [T] a response), computed once."""

    @cache
    def compute(family: str, name: str):
        variant, path = VARIANTS[name], tiny_hf(family)
        model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
        model.requires_grad_(False)
        tokenizer = load_tokenizer(str(path))
        prompt, rows, rewards = JudgePrompt(tokenizer, variant.config()), [], []
        assert len(prompt.true_ids) > 1 and len(prompt.false_ids) > 1  # several spellings are summed
        ids = prompt.true_ids, prompt.false_ids
        for i, ((q, _), body) in enumerate(zip(RESPONSES, bodies(tokenizer))):
            row = [
                hf_judge(model, prompt.build(QUERIES[q], item, body), *ids, variant, f"{i}/{k}", tokenizer.pad_token_id)
                for k, item in enumerate(QUERIES[q].rubric)
            ]
            texts = [tokenizer.decode([token]) for token in body]
            earned = torch.zeros(len(body), dtype=torch.float64)
            for item, found in zip(QUERIES[q].rubric, row):
                if found.verdict:
                    earned += item.weight * reference_alpha(found.b, variant, texts)
            rows.append(row)
            rewards.append(earned / sum(max(item.weight, 0) for item in QUERIES[q].rubric))
        return rows, rewards

    return compute


def relative(found, expected: torch.Tensor) -> float:
    found = torch.as_tensor(found, dtype=torch.float64)
    assert found.shape == expected.shape
    return ((found - expected).norm() / expected.norm().clamp(min=1e-30)).item()


def compare(results: list[dict], expected, attribution: str) -> None:
    """Every rank holds the same numbers, and they are the reference's. Prints the worst error (pytest -s)."""
    rows, rewards = expected
    assert all(json.dumps(result) == json.dumps(results[0]) for result in results)  # nan == nan as text
    result = results[0]
    worst = dict.fromkeys(("probability", "attribution", "cancellation", "grad_norm", "rewards"), 0.0)
    for found_row, row in zip(result["items"], rows, strict=True):
        for (p_true, p_false, verdict, b, grad_norm, cos), item in zip(found_row, row, strict=True):
            assert verdict == item.verdict
            errors = {
                "probability": max(abs(p_true / item.p_true - 1), abs(p_false / item.p_false - 1)),
                "attribution": relative(b, item.b),
                "grad_norm": abs(grad_norm / item.grad_norm - 1),
            }
            if attribution in ("grad_x_embed", "contracted", "null_token"):
                errors["cancellation"] = ((torch.tensor(b) - item.b).abs() / item.size).max().item()
                assert cos == pytest.approx((item.b.abs() / item.size).median().item(), rel=1e-3)
            worst |= {name: max(worst[name], error) for name, error in errors.items()}
    for found, wanted in zip(result["rewards"], rewards, strict=True):
        worst["rewards"] = max(worst["rewards"], relative(found, wanted))
    print({name: f"{error:.1e}" for name, error in worst.items()})
    assert worst["rewards"] <= 1e-5 and worst["attribution"] <= 1e-4 and worst["cancellation"] <= 1e-6, worst
    assert worst["probability"] <= 1e-5 and worst["grad_norm"] <= 1e-5, worst


CASES = [
    (layout, family, variant)
    for layout in LAYOUTS
    for family in DENSE_FAMILIES
    for variant in VARIANTS
    # the slowest way by far: on four ranks with one family only
    if variant != "one_each_full_recompute" or LAYOUTS[layout][0] < 4 or family == "qwen3"
    if variant not in IN_ONE_FAMILY or family == "qwen3"
]


@pytest.mark.parametrize(("layout", "family", "variant"), CASES)
def test_judge_equals_hugging_face_autograd(worlds, tiny_hf, reference, layout, family, variant):
    """Verdicts, b_t and token rewards on every layout, family and way to judge; no weight gets a gradient."""
    results = worlds.on(layout, judge_on, str(tiny_hf(family)), variant)
    compare(results, reference(family, variant), VARIANTS[variant].attribution)
    assert results[0]["trainable"] == results[0]["gradients"] == 0


@pytest.mark.parametrize("variant", VARIANTS)
def test_cases_have_teeth(reference, variant):
    """Among the cases are both verdicts and rewards that are far from flat; a wrong scale of b would change them.

    A gradient summed over TP ranks twice is a factor of 2 in b: alpha must notice, where it is not standardised.
    """
    for family in DENSE_FAMILIES:
        rows, rewards = reference(family, variant)
        if VARIANTS[variant].verdict == "sample":
            assert {item.verdict for row in rows for item in row} == {True, False}
            assert max(r.std() / r.abs().mean() for r in rewards if r.any()) > 0.1
        b = max((item.b for row in rows for item in row), key=lambda b: b.std())
        once, twice = (
            reference_alpha(scale * b, VARIANTS[variant], ["word"] * (len(b) - 1) + ["."]) for scale in (1, 2)
        )
        if VARIANTS[variant].smoothing == "none":
            assert relative(twice, once) > 0.05


def policy_and_judge(path: str) -> dict:
    """Policy TP1 DP4 in training and judge TP2 PP2 SP on the same four ranks, in turn."""
    import torch.distributed as dist

    from g2r_megatron.model.build import build_model
    from g2r_megatron.model.hf import open_hf_model
    from g2r_megatron.policy.log_probs import TokenSequence
    from g2r_megatron.policy.trainer import PolicyTrainer

    model = build_model("policy", open_hf_model(path, "policy.model"), groups_of(Layout()), Precision())
    trainer = PolicyTrainer(
        model,
        TrainConfig(
            policy=PolicyConfig(micro_batch_tokens=60),
            grpo=GrpoConfig(),
            rollout=RolloutConfig(),
            optimizer=OptimizerConfig(distributed=False),
        ),
    )
    sequences = [TokenSequence([5, 6, 7], body) for body in bodies(load_tokenizer(path))]
    advantages = [torch.linspace(-1, 1, len(s.response_ids)) for s in sequences]
    everything = list(range(len(sequences)))
    before = trainer.log_probs(sequences, [everything])
    trainer.gradients(sequences, everything, advantages, before, None)
    gradients = [p.main_grad.clone() for p in model.chunks[0].parameters()]
    judged = judge(judge_stage(Layout(tp=2, pp=2, sp=True), path, VARIANTS["paper"].config()))
    after = trainer.log_probs(sequences, [everything])
    dist.barrier()
    return {
        "judged": judged,
        "ids": [s.ids for s in sequences],
        "log_probs": [x.tolist() for x in before],
        "log_probs_unchanged": all(torch.equal(a, b) for a, b in zip(before, after)),
        "gradients_unchanged": all(
            torch.equal(g, p.main_grad) for g, p in zip(gradients, model.chunks[0].parameters())
        ),
        "trainable": all(p.requires_grad for p in model.chunks[0].parameters()),
    }


@pytest.mark.parametrize("family", DENSE_FAMILIES)
def test_judge_layout_may_differ_from_the_policy_layout(worlds, tiny_hf, reference, family):
    """In one world, a TP2 PP2 judge gives the reference's numbers beside a DP4 policy, and leaves the policy alone."""
    results = worlds[4].run(policy_and_judge, str(tiny_hf(family)))
    compare([result["judged"] for result in results], reference(family, "paper"), "grad_x_embed")
    model = AutoModelForCausalLM.from_pretrained(tiny_hf(family), dtype=torch.float32).eval()
    for result in results:
        assert result["log_probs_unchanged"] and result["gradients_unchanged"] and result["trainable"]
        for ids, found in zip(result["ids"], result["log_probs"], strict=True):
            with torch.no_grad():
                log_probs = model(torch.tensor([ids])).logits[0, 2:-1].log_softmax(-1)
            assert relative(found, log_probs.gather(1, torch.tensor(ids[3:])[:, None])[:, 0]) <= 1e-5


def changed_copy(path, directory, change) -> str:
    """A copy of a Hugging Face directory with ``change(tensors)`` applied to its weights in place."""
    shutil.copytree(path, directory)
    tensors = load_file(directory / "model.safetensors")
    change(tensors)
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
    return str(directory)


def health(result: dict) -> dict[str, float]:
    """The step's attribution metrics, as training computes them."""
    raw = [torch.tensor(item[3]) for row in result["items"] for item in row]
    alphas = [torch.tensor(alpha) for row in result["alphas"] for alpha in row]
    return attribution_metrics(raw, alphas, [item[5] for row in result["items"] for item in row], 0.95)


@pytest.mark.parametrize("layout", ["tp1pp1", "tp1pp1dp2", "tp2pp2sp"])
def test_zero_gradient_is_counted_and_weighs_all_tokens_alike(worlds, tiny_hf, tmp_path, layout):
    """An output layer of zeros makes every gradient 0: each pass is counted, alpha is uniform, cos is no number."""
    path = changed_copy(tiny_hf("qwen3"), tmp_path / "zero", lambda tensors: tensors["lm_head.weight"].zero_())
    result = worlds.on(layout, judge_on, path, "paper")[0]
    passes = sum(len(row) for row in result["items"])
    metrics = health(result)
    assert metrics["attribution/zero_or_nonfinite"] == metrics["attribution/passes"] == passes
    assert metrics["attribution/flat_share"] == 1.0 and "attribution/cos_median" not in metrics
    for row in result["alphas"]:
        for alpha in row:
            assert torch.equal(torch.tensor(alpha), torch.full((len(alpha),), 1 / len(alpha)))


def judge_expecting_user_error(layout: Layout, path: str) -> str:
    try:
        judge_on(layout, path, "paper")
    except UserError as error:
        return str(error)
    return "nothing was raised"


@pytest.mark.parametrize("layout", ["tp1pp1", "tp1pp1dp2", "tp2pp2sp"])
def test_nan_weight_stops_the_judge_on_every_rank(worlds, tiny_hf, tmp_path, layout):
    """One NaN among the weights: verdict log-probs that are not numbers raise everywhere, so that no rank goes on."""

    def poison(tensors):
        tensors["model.layers.3.mlp.down_proj.weight"][5, 70] = float("nan")

    path = changed_copy(tiny_hf("qwen2"), tmp_path / "nan", poison)
    for message in worlds.on(layout, judge_expecting_user_error, path):
        assert "verdict log-probs of input 0 are not finite" in message


def judge_with_broken_backward(layout: Layout, path: str, factor: float) -> dict:
    """The gradient is multiplied by ``factor`` on its way through the last pipeline stage's last layer."""
    stage = judge_stage(layout, path, VARIANTS["paper"].config())
    gpt = stage.judge.model.chunks[0]

    def spoil(module, inputs, output):
        if output[0].requires_grad:
            output[0].register_hook(lambda gradient: gradient * factor)

    hook = gpt.decoder.layers[-1].register_forward_hook(spoil) if gpt.post_process else None
    try:
        return judge(stage)
    finally:
        if hook is not None:
            hook.remove()


@pytest.mark.parametrize("factor", [float("nan"), float("inf")])
def test_gradient_that_is_not_finite_is_counted_and_never_reaches_a_reward(worlds, tiny_hf, factor):
    """A backward pass that ends in NaN or infinity behind a healthy forward: counted, alpha uniform, rewards finite."""
    result = worlds.on("tp2pp2sp", judge_with_broken_backward, str(tiny_hf("qwen3")), factor)[0]
    metrics = health(result)
    assert metrics["attribution/zero_or_nonfinite"] == metrics["attribution/passes"] > 0
    assert all(torch.isfinite(torch.tensor(r)).all() for r in result["rewards"])


def attribute_nothing_and_little(layout: Layout, path: str) -> dict:
    """No item, then one item (fewer than replicas) attributed; an empty response judged."""
    stage = judge_stage(layout, path, VARIANTS["paper"].config())
    inputs = stage.inputs([QUERIES[0], QUERIES[1]], [bodies(stage.prompt.tokenizer)[0], []])
    judgements = stage.verdicts(inputs, ["0", "1"])
    weights = [[1.0] * 3, [1.0] * 2]
    stage.attribute(inputs, judgements, [[False] * 3, [True] * 2], weights)
    untouched = [item.attribution is None for row in judgements for item in row]
    stage.attribute(inputs, judgements, [[False, True, False], [False] * 2], weights)
    return {"untouched": untouched, "b": judgements[0][1].attribution.tolist()}


@pytest.mark.parametrize("layout", ["tp1pp1", "tp1pp1dp2", "tp2pp2sp", "tp1pp4"])
def test_replicas_without_work_and_empty_responses(worlds, tiny_hf, reference, layout):
    """No backward where none is asked for or the response is empty; one item on more replicas than items is right."""
    rows, _ = reference("qwen3", "paper")
    for result in worlds.on(layout, attribute_nothing_and_little, str(tiny_hf("qwen3"))):
        assert result["untouched"] == [True] * 5
        assert relative(result["b"], rows[0][1].b) <= 1e-4


def test_the_paper_is_among_the_variants():
    """What the preset asks of the judge is what "paper" tests above. The gates of `robust`: test_parity_gates.py."""
    asked = PRESETS["paper"]["judge"]
    assert asked == {key: getattr(VARIANTS["paper"], key) for key in asked}
