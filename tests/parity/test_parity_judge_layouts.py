"""The judge under context, expert and virtual pipeline parallelism equals Hugging Face autograd; routing is replayed.

The reference, the ways to judge and the tolerances are those of test_parity_judge.py. A mixture of experts takes its
gradient with the routing of the verdict's forward, in the reference too: at the contracted embedding, and with routers
that change between the two passes, another routing would be chosen. Leaves out prefix sharing by several items and
pooling, which test_shared_prefix.py holds on these layouts, and FlexAttention (test_packing.py, tests/gpu).
"""

from contextlib import contextmanager
from functools import cache

import pytest
import torch
from transformers import AutoModelForCausalLM

from distributed import ALL_LAYOUTS, CONTEXT_LAYOUTS, EXPERT_LAYOUTS, groups_of
from g2r_megatron.config.options import Layout, Precision
from g2r_megatron.data.tokenizer import load_tokenizer
from g2r_megatron.judge.prompt import JudgePrompt
from test_parity_judge import (
    QUERIES,
    RESPONSES,
    VARIANTS,
    Variant,
    bodies,
    compare,
    hf_judge,
    judge,
    reference_alpha,
    relative,
)
from tiny_models import build_tiny_hf

MOE = ("qwen3_moe", "mixtral")
THREE = ("paper", "robust", "one_each_full_recompute")

CASES = [
    *(("cp2", "qwen3", way) for way in VARIANTS),
    *((layout, "qwen3", way) for layout in ("cp2_tp2sp", "cp2_pp2") for way in THREE),
    ("cp4", "qwen3", "l1_selective_recompute"),
    ("cp2_tp2", "qwen2", "paper"),
    ("cp2_dp2", "llama3", "l2_full_recompute"),
    *(("cp2_tp2sp", "mistral", way) for way in ("robust", "l1_selective_recompute")),
    ("tp2_pp2_uneven", "qwen2", "paper"),
    *(("pp3_vpp2_uneven", "qwen3", way) for way in THREE),
    *((layout, "qwen3_moe", way) for layout in ("tp1pp1", "cp2_ep2") for way in (*THREE, "contracted_log_prob")),
    *((layout, "mixtral", "robust") for layout in ("ep2", "cp2_ep2", "cp2_tp2sp_ep2_etp2", "pp2_uneven_etp2")),
    *((layout, "qwen3_moe", "robust") for layout in (*EXPERT_LAYOUTS, *CONTEXT_LAYOUTS) if "e" in layout),
    *((layout, "qwen3_moe", "l2_full_recompute") for layout in ("pp2_ep2", "tp2sp_ep2_dp2", "cp2_tp2sp_ep2_etp2")),
    *(("pp3_vpp2_uneven", "qwen3_moe", way) for way in ("robust", "l2_full_recompute")),
]


# In the ranks.


def judge_model(layout: Layout, path: str, recompute: str):
    """Built once a layout; kept with its process groups, which do not live for ever."""
    from g2r_megatron.model.build import build_model
    from g2r_megatron.model.hf import open_hf_model

    groups = groups_of(layout)
    models = vars(groups).setdefault("models", {})
    if (path, recompute) not in models:
        hf = open_hf_model(path, "judge.model")
        models[path, recompute] = build_model("judge", hf, groups, Precision(), recompute)
    return models[path, recompute]


def stage_of(layout: Layout, path: str, variant: str):
    from g2r_megatron.judge.frozen import FrozenJudge
    from g2r_megatron.judge.stage import JudgeStage

    config = VARIANTS[variant].config()
    prompt = JudgePrompt(load_tokenizer(path), config)
    judge = FrozenJudge(
        judge_model(layout, path, config.recompute), config, prompt.true_ids, prompt.false_ids, prompt.null_id
    )
    return JudgeStage(judge, prompt, config)


def judge_on(layout: Layout, path: str, variant: str) -> dict:
    return judge(stage_of(layout, path, variant))


# The reference.


class WithReplay:
    """A transformers model whose pass with gradients takes the experts that the pass without them chose."""

    def __init__(self, model):
        self.model, self.chosen, self.replays = model, {}, True
        self.get_input_embeddings = model.get_input_embeddings
        for name, module in model.named_modules():
            if name.endswith("mlp.gate"):
                module.register_forward_hook(self.hook(name))

    def __call__(self, **inputs):
        return self.model(**inputs)

    def hook(self, name: str):
        def replay(gate, inputs, output):
            logits, _, indices = output
            if not torch.is_grad_enabled():
                self.chosen[name] = indices
            if not (torch.is_grad_enabled() and self.replays):
                return None
            # both families weigh the chosen experts by the softmax of their logits alone
            indices = self.chosen[name]
            return logits, logits.float().gather(-1, indices).softmax(-1), indices

        return replay


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    """``directory(family, layers)`` -> a tiny random Hugging Face directory; read only."""

    @cache
    def build(family: str, layers: int) -> str:
        path = tmp_path_factory.mktemp(f"{family}_{layers}")
        return str(build_tiny_hf(family, path, num_hidden_layers=layers))

    return build


def judged_by_hf(model, path: str, name: str) -> tuple[list, list]:
    """(rows of Reference, token rewards [T] a response) of test_parity_judge.py's cases."""
    variant, tokenizer = VARIANTS[name], load_tokenizer(path)
    prompt, rows, rewards = JudgePrompt(tokenizer, variant.config()), [], []
    ids = prompt.true_ids, prompt.false_ids
    for i, ((q, _), body) in enumerate(zip(RESPONSES, bodies(tokenizer))):
        query, texts = QUERIES[q], [tokenizer.decode([token]) for token in body]
        row = [
            hf_judge(model, prompt.build(query, item, body), *ids, variant, f"{i}/{k}")
            for k, item in enumerate(query.rubric)
        ]
        earned = torch.zeros(len(body), dtype=torch.float64)
        for item, found in zip(query.rubric, row):
            if found.verdict:
                earned += item.weight * reference_alpha(found.b, variant, texts)
        rows.append(row)
        rewards.append(earned / query.positive_weight)
    return rows, rewards


def hf_model(path: str):
    return AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval().requires_grad_(False)


@pytest.fixture(scope="module")
def reference(directory):
    """``reference(family, layers, variant)``: with the verdict's routing in the gradient."""

    @cache
    def compute(family: str, layers: int, name: str):
        path = directory(family, layers)
        return judged_by_hf(WithReplay(hf_model(path)), path, name)

    return compute


@pytest.mark.parametrize(("layout", "family", "variant"), sorted(set(CASES)))
def test_judge_equals_hugging_face_autograd(worlds, directory, reference, layout, family, variant):
    """Verdicts, b_t and token rewards: rows split over ranks, experts anywhere, stages uneven and virtual."""
    layers = 8 if ALL_LAYOUTS[layout][1].vpp else 4
    results = worlds.on(layout, judge_on, directory(family, layers), variant)
    compare(results, reference(family, layers, variant), VARIANTS[variant].attribution)
    assert results[0]["trainable"] == results[0]["gradients"] == 0


@pytest.mark.parametrize("family", MOE)
def test_contracted_embeddings_would_be_routed_otherwise(directory, reference, family):
    """Without replay the attributions at the contracted embedding are far from those that the cases above ask for."""
    path = directory(family, 4)
    replayed, natural = reference(family, 4, "robust")[0], judged_by_hf(hf_model(path), path, "robust")[0]
    distances = [relative(b.b, a.b) for row, other in zip(replayed, natural) for a, b in zip(row, other)]
    assert min(distances) > 1e-2


# Routers that change between the passes.


NOISE = 0.02  # of router weights of 0.25


def _noise(layer: int, shape) -> torch.Tensor:
    """What is added to the router of ``layer`` (from 0), the same everywhere."""
    return NOISE * torch.randn(shape, generator=torch.Generator().manual_seed(layer))


@contextmanager
def shaken(weights: dict[int, torch.Tensor]):
    """The router ``weights`` (by layer) with noise, for a while."""
    with torch.no_grad():
        before = {layer: weight.clone() for layer, weight in weights.items()}
        for layer, weight in weights.items():
            weight += _noise(layer, weight.shape)
    try:
        yield
    finally:
        with torch.no_grad():
            for layer, weight in weights.items():
                weight.copy_(before[layer])


def shaken_between(layout: Layout, path: str, variant: str) -> dict:
    """b of every item when routers change after the verdicts, and what the routers were asked to do."""
    stage = stage_of(layout, path, variant)
    model, seen = stage.judge.model, []
    routers = {layer.layer_number - 1: layer.mlp.router for chunk in model.chunks for layer in chunk.decoder.layers}
    texts = bodies(stage.prompt.tokenizer)
    inputs = stage.inputs([QUERIES[q] for q, _ in RESPONSES], texts)
    judgements = stage.verdicts(inputs, [str(i) for i in range(len(texts))])
    for router in routers.values():
        router.register_forward_hook(lambda r, *_: seen.append((r.training, r.is_aux_loss_enabled())))
    with shaken({number: router.weight for number, router in routers.items()}):
        # the first item of each response: fewer branches, other rows, other ranks than the verdicts had
        marks = [[k == 0 for k in range(len(row))] for row in judgements]
        stage.attribute(inputs, judgements, marks, [[1.0] * len(row) for row in judgements])
    for router in routers.values():
        router._forward_hooks.clear()
    replays = [router.router_replay for router in routers.values()]
    return {
        "verdicts": [row[0].verdict for row in judgements],
        "b": [row[0].attribution.tolist() for row in judgements],
        "seen": sorted(set(seen)),
        "left": [r.router_replay_action is None and not r.replay_backward_list for r in replays],
    }


def attribute_unseen(layout: Layout, path: str) -> str:
    """What is said when an attribution asks for items that no verdict pass has seen, of two responses."""
    stage = stage_of(layout, path, "paper")
    seen, unseen = (stage.inputs([QUERIES[1]], [body]) for body in ([40, 41], [42, 43]))
    judgements = [*stage.verdicts(seen, ["0"]), *stage.verdicts(seen, ["0"])]
    try:
        stage.attribute(seen + unseen, judgements, [[True, True]] * 2, [[1.0, 1.0]] * 2)
    except ValueError as error:
        return str(error)
    return "nothing was raised"


def test_attribution_without_a_verdict_is_an_error(worlds, directory):
    """Of a mixture of experts: there is no routing to replay."""
    for said in worlds.on("cp2_ep2", attribute_unseen, directory("mixtral", 4)):
        assert said.startswith("inputs [2, 3] were not in the verdict passes")


def expected_when_shaken(path: str, way: Variant, verdicts: list[bool]) -> tuple[list, list]:
    """b of each response's first item with routers that change after its verdict: by the verdict's routing, by their own."""
    model, tokenizer = hf_model(path), load_tokenizer(path)
    prompt, found = JudgePrompt(tokenizer, way.config()), ([], [])
    gates = {int(n.split(".")[2]): m.weight for n, m in model.named_modules() if n.endswith("mlp.gate")}
    wrapped = WithReplay(model)
    for (q, _), body, verdict in zip(RESPONSES, bodies(tokenizer), verdicts, strict=True):
        item = prompt.build(QUERIES[q], QUERIES[q].rubric[0], body)
        span = slice(item.response_start, item.response_end)
        e = model.get_input_embeddings().weight[torch.tensor(item.input_ids)]
        with torch.no_grad():
            wrapped(inputs_embeds=e[None])
        with shaken(gates):
            for wrapped.replays, b in zip((True, False), found):
                leaf = e.clone().requires_grad_()
                logits = wrapped(inputs_embeds=leaf[None]).logits[0, item.verdict_position].log_softmax(-1)
                true, false = logits[prompt.true_ids].logsumexp(0), logits[prompt.false_ids].logsumexp(0)
                target = true - false if way.target == "logit_margin" else (true if verdict else false)
                g = torch.autograd.grad(target, leaf)[0][span]
                b.append(g.norm(dim=-1) if way.attribution == "l2" else (g * e[span]).sum(-1))
    return found


@pytest.mark.parametrize("family", MOE)
@pytest.mark.parametrize(
    ("layout", "variant"),
    [
        ("cp2_ep2", "paper"),
        ("tp2sp_ep2_dp2", "one_each_full_recompute"),
        ("pp2_ep2", "one_each_full_recompute"),
        ("cp2_tp2sp_ep2_etp2", "paper"),
        ("cp2_pp2_uneven_ep2", "l2_full_recompute"),
    ],
)
def test_attribution_takes_the_verdicts_routing(worlds, directory, layout, variant, family):
    """Routers with noise of 8% after the verdicts: the gradient is of their weights over the verdicts' experts.

    It is taken in train mode, where auxiliary losses would join it, and none is on. Afterwards the routers choose freely.
    """
    path = directory(family, 4)
    results = worlds.on(layout, shaken_between, path, variant)
    replayed, free = expected_when_shaken(path, VARIANTS[variant], results[0]["verdicts"])
    for result in results:
        assert max(relative(b, wanted) for b, wanted in zip(result["b"], replayed, strict=True)) <= 1e-4
        assert result["seen"] == [(True, False)] and all(result["left"])
    assert max(relative(b, wanted) for b, wanted in zip(free, replayed)) > 1e-2  # by the shaken routers' own choice
