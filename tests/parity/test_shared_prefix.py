"""Items of a response that share its prefix are judged as if each had a sequence of its own, on every layout.

The reference is plain transformers, one sequence an item, one autograd call each; where the template puts the criterion
does not matter. Tolerances (fp32): verdict probabilities 1e-5, attributions 1e-4 of their norm and 1e-6 of |g||e|.
Leaves out what test_parity_judge.py varies (targets, attributions, standardising), which shares prefixes too.
"""

from dataclasses import dataclass, replace
from functools import cache
from weakref import ref

import pytest
import torch
from transformers import AutoModelForCausalLM

from distributed import ALL_LAYOUTS, fits, groups_of
from g2r_megatron.config.options import JudgeConfig, Layout, Precision
from g2r_megatron.credit.attribution import pooled_weights, token_rewards
from g2r_megatron.credit.judgements import backward_passes
from g2r_megatron.data.tokenizer import encode_text, load_tokenizer
from g2r_megatron.data.types import Query, RubricItem
from g2r_megatron.errors import UserError
from g2r_megatron.judge.packing import shared_length, tree_tokens
from g2r_megatron.judge.prompt import JudgePrompt
from tiny_models import build_tiny_hf

TEMPLATES = {
    "criterion_last": "{conversation} | {response} | {criterion} =>",
    "response_first": "{response} | {conversation} | {criterion} =>",
    "criterion_first": "{criterion} ? {conversation} | {response} =>",
    "criterion_between": "{conversation} | {criterion} | {response} =>",
}
WEIGHTS = (5.0, -3.0, 2.0)
CRITERIA = ("sees a doctor", "is longer than three days", "rest")
QUERY = Query(
    "a",
    ({"role": "user", "content": "write a note on fever, and what helps against a rash that lasts longer"},),
    tuple(RubricItem(text, weight) for text, weight in zip(CRITERIA, WEIGHTS)),
)
RESPONSES = ["rest", "A note on fever: rest and see a doctor if it lasts longer than three days.", ""]
FAMILIES = ("qwen3", "mistral", "qwen3_moe")  # mistral's window of 24 is shorter than the prefix
CASES = ("tp1pp1", "tp2pp1sp", "tp1pp2", "tp1pp1dp2", "ep2", "pp4_vpp2", "cp2")


@dataclass(frozen=True)
class Way:
    """How the judge is run. ``budget`` 1: a tree a row; 90: rows of a few and of one; 8192: everything in one row."""

    template: str = "criterion_last"
    credit: str = "per_item"
    recompute: str = "none"
    budget: int = 8192
    attribution: str = "grad_x_embed"

    def config(self) -> JudgeConfig:
        return JudgeConfig(
            template=TEMPLATES[self.template],
            chat_template=False,
            credit=self.credit,
            recompute=self.recompute,
            micro_batch_tokens=self.budget,
            attribution=self.attribution,
            target="log_prob",
            verdict="sample",
            normalize="softmax",
            standardize=False,
            smoothing="none",
        )


WAYS = {
    "one_row": Way(),
    "few_a_row_full_recompute": Way(budget=90, recompute="full"),
    "one_a_row_selective_recompute": Way(budget=1, recompute="selective"),
    "pooled": Way(credit="per_response", budget=90),
    "pooled_l2_full_recompute": Way(credit="per_response", recompute="full", attribution="l2"),
}


# In the ranks.


@cache
def judge_model(path: str, name: str, recompute: str):
    from g2r_megatron.model.build import build_model
    from g2r_megatron.model.hf import open_hf_model

    groups = groups_of(ALL_LAYOUTS[name][1])
    return build_model("judge", open_hf_model(path, "judge.model"), groups, Precision(), recompute)


def stage_of(path: str, name: str, config: JudgeConfig):
    from g2r_megatron.judge.frozen import FrozenJudge
    from g2r_megatron.judge.stage import JudgeStage

    prompt = JudgePrompt(load_tokenizer(path), config)
    judge = FrozenJudge(judge_model(path, name, config.recompute), config, prompt.true_ids, prompt.false_ids)
    return JudgeStage(judge, prompt, config)


def judge_all(layout: Layout, path: str, name: str, way: Way) -> list[list[tuple]]:
    """(p_true, p_false, verdict, b) of every item of every response, all items marked."""
    stage = stage_of(path, name, way.config())
    bodies = [encode_text(stage.prompt.tokenizer, text) for text in RESPONSES]
    inputs = stage.inputs([QUERY] * len(bodies), bodies)
    judgements = stage.verdicts(inputs, [str(i) for i in range(len(bodies))])
    stage.attribute(inputs, judgements, [[True] * len(row) for row in judgements], [WEIGHTS] * len(bodies))
    return [
        [(j.p_true, j.p_false, j.verdict, None if j.attribution is None else j.attribution.tolist()) for j in row]
        for row in judgements
    ]


# The reference.


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    """``directory(family, layers)`` -> a tiny random Hugging Face directory; read only."""

    @cache
    def build(family: str, layers: int) -> str:
        path = tmp_path_factory.mktemp(f"{family}_{layers}")
        return str(build_tiny_hf(family, path, num_hidden_layers=layers))

    return build


@pytest.fixture(scope="module")
def gradients(directory):
    """``gradients(family, layers, template, response)`` -> of each item (log p [2], gradients [2, T, h]), and e [T, h]."""

    @cache
    def model_of(path: str):
        return AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval().requires_grad_(False)

    @cache
    def compute(family: str, layers: int, template: str, response: str):
        path = directory(family, layers)
        model, tokenizer = model_of(path), load_tokenizer(path)
        prompt = JudgePrompt(tokenizer, Way(template=template).config())
        table, body, items = model.get_input_embeddings().weight, encode_text(tokenizer, response), []
        for item in QUERY.rubric:
            judged = prompt.build(QUERY, item, body)
            leaf = table[torch.tensor(judged.input_ids)].clone().requires_grad_()
            logits = model(inputs_embeds=leaf[None]).logits[0, judged.verdict_position].log_softmax(-1)
            spelled = [logits[ids].logsumexp(0) for ids in (prompt.true_ids, prompt.false_ids)]
            span = slice(judged.response_start, judged.response_end)
            slopes = [torch.autograd.grad(value, leaf, retain_graph=True)[0][span] for value in spelled]
            items.append((torch.stack(spelled).detach(), torch.stack(slopes)))
        return items, table[torch.tensor(body, dtype=torch.int64)]

    return compute


def check(found: list[list[tuple]], gradients, way: Way, family: str, layers: int) -> None:
    """Verdicts and b of every response against the reference; prints the worst errors (pytest -s)."""
    worst = dict.fromkeys(("probability", "attribution", "cancellation"), 0.0)
    for row, response in zip(found, RESPONSES, strict=True):
        items, e = gradients(family, layers, way.template, response)
        factors = pooled_weights(list(WEIGHTS)) if way.credit == "per_response" else None
        own = [slopes[0 if verdict else 1] for (_, _, verdict, _), (_, slopes) in zip(row, items, strict=True)]
        for k, ((p_true, p_false, _, b), (log_probs, _)) in enumerate(zip(row, items, strict=True)):
            expected = log_probs.exp().tolist()
            worst["probability"] = max(
                worst["probability"], abs(p_true / expected[0] - 1), abs(p_false / expected[1] - 1)
            )
            if not response:
                assert b is None
                continue
            g = own[k] if factors is None else sum(c * slope for c, slope in zip(factors, own, strict=True))
            wanted = g.norm(dim=-1) if way.attribution == "l2" else (g * e).sum(-1)
            errors = (torch.tensor(b) - wanted).abs()
            worst["attribution"] = max(worst["attribution"], (errors.norm() / wanted.norm()).item())
            size = (g.norm(dim=-1) * e.norm(dim=-1)).clamp(min=1e-30)
            if way.attribution == "grad_x_embed":
                worst["cancellation"] = max(worst["cancellation"], (errors / size).max().item())
    print({name: f"{error:.1e}" for name, error in worst.items()})
    assert worst["probability"] <= 1e-5 and worst["attribution"] <= 1e-4 and worst["cancellation"] <= 1e-6, worst


def on(worlds, name: str, function, *args) -> list:
    """Every rank's answer, which is the same everywhere."""
    results = worlds.on(name, function, *args)
    assert all(result == results[0] for result in results)
    return results[0]


MATRIX = [
    (layout, family, 8 if ALL_LAYOUTS[layout][1].vpp else 4)
    for layout in CASES
    for family in FAMILIES
    if fits(layout, layers=8 if ALL_LAYOUTS[layout][1].vpp else 4, moe=family == "qwen3_moe")
]


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize(("layout", "family", "layers"), MATRIX)
def test_shared_prefixes_equal_separate_sequences(worlds, directory, gradients, layout, family, layers, way):
    """Windows, experts and virtual stages; rows of one tree and of many; items alone and pooled."""
    found = on(worlds, layout, judge_all, directory(family, layers), layout, WAYS[way])
    check(found, gradients, WAYS[way], family, layers)


@pytest.mark.parametrize("template", TEMPLATES)
@pytest.mark.parametrize("family", FAMILIES)
def test_any_order_of_the_template_gives_its_own_sequences(worlds, directory, gradients, family, template):
    """Also where the criterion stands before the response and nothing can be shared."""
    for layout in ("tp1pp1", "tp2pp1sp"):
        way = Way(template=template, budget=200)
        check(on(worlds, layout, judge_all, directory(family, 4), layout, way), gradients, way, family, 4)


# What sharing is for.


def matrix_flops(function) -> int:
    """FLOPs of the matrix products in ``function()``, attention left out."""
    from torch.utils.flop_counter import FlopCounterMode

    with FlopCounterMode(display=False) as counter:
        function()
    products = (torch.ops.aten.mm, torch.ops.aten.addmm, torch.ops.aten.bmm)
    return sum(counter.get_flop_counts()["Global"].get(operation, 0) for operation in products)


def costs(layout: Layout, path: str) -> dict[str, float]:
    """FLOPs of a verdict pass over shared prefixes, over separate sequences, and of backward passes; tokens of each."""
    from g2r_megatron.judge.frozen import Pass

    stage = stage_of(path, "tp1pp1", Way().config())
    bodies = [encode_text(stage.prompt.tokenizer, text) for text in RESPONSES[:2]]
    rows = stage.inputs([QUERY] * 2, bodies)
    flat = [item for row in rows for item in row]
    passes = [Pass([item], [True], [1.0]) for item in flat]
    judge = stage.judge
    return {
        "shared": matrix_flops(lambda: judge.verdict_log_probs(rows)),
        "separate": matrix_flops(lambda: judge.verdict_log_probs([[item] for item in flat])),
        "backward": matrix_flops(lambda: judge.token_gradients(passes)),
        "logits": 2 * judge.model.chunks[0].output_layer.weight.numel() * len(flat),
        "shared_tokens": sum(tree_tokens(row) for row in rows),
        "separate_tokens": sum(len(item.input_ids) for item in flat),
    }


def test_a_shared_prefix_is_computed_once_and_frozen_weights_get_no_gradient(worlds, directory):
    """Matrix products: in proportion to the tokens (logits apart), and a backward that costs what its forward costs."""
    found = on(worlds, "tp1pp1", costs, directory("qwen3", 4))
    shared, separate = found["shared"] - found["logits"], found["separate"] - found["logits"]
    assert shared * found["separate_tokens"] == separate * found["shared_tokens"]
    assert found["shared_tokens"] < 0.6 * found["separate_tokens"]
    assert found["backward"] == 2 * found["separate"]  # with weight gradients it would be three times


def kept_activations(layout: Layout, path: str, recompute: str) -> list[int]:
    """Activations alive that earlier micro-batches saved: when each micro-batch begins, and at the end."""
    stage = stage_of(path, "tp1pp1", Way(budget=1, recompute=recompute).config())
    body = encode_text(stage.prompt.tokenizer, RESPONSES[1])
    inputs = stage.inputs([QUERY], [body])
    judgements = stage.verdicts(inputs, ["0"])
    saved, alive = [], []

    class Saved:
        def __init__(self, tensor):
            self.tensor = tensor

    def pack(tensor):
        holder = Saved(tensor)
        saved.append(ref(holder))
        return holder

    def count(*_):
        alive.append(sum(holder() is not None for holder in saved))

    hook = stage.judge.model.modules[0].register_forward_pre_hook(count)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda holder: holder.tensor):
        stage.attribute(inputs, judgements, [[True] * 3], [WEIGHTS])
    hook.remove()
    count()
    assert saved
    return alive


@pytest.mark.parametrize("recompute", ["none", "full"])
def test_activations_are_freed_with_their_micro_batch(worlds, directory, recompute):
    """Three micro-batches: when the next one begins, nothing is left of those before it; nor after the last."""
    assert on(worlds, "tp1pp1", kept_activations, directory("qwen3", 4), recompute) == [0, 0, 0, 0]


def together(path: str) -> int:
    """Tokens of the longest response's tree."""
    tokenizer = load_tokenizer(path)
    inputs = JudgePrompt(tokenizer, Way().config()).build_items(QUERY, encode_text(tokenizer, RESPONSES[1]))
    assert max(len(item.input_ids) for item in inputs) < tree_tokens(inputs) - 1
    return tree_tokens(inputs)


def judge_within(layout: Layout, path: str, limit: int) -> list[float]:
    """p(True) and p(False) of the longest response's items when ``judge.max_length`` is ``limit``."""
    config = replace(Way().config(), max_length=limit)
    stage = stage_of(path, "tp1pp1", config)
    inputs = stage.inputs([QUERY], [encode_text(stage.prompt.tokenizer, RESPONSES[1])])
    return stage.judge.verdict_log_probs(inputs).exp().flatten().tolist()


def test_items_that_are_too_long_together_are_split(worlds, directory):
    """A judge.max_length that each item keeps but all of them do not changes nothing but the cost."""
    path = directory("qwen3", 4)
    whole = on(worlds, "tp1pp1", judge_within, path, together(path))
    split = on(worlds, "tp1pp1", judge_within, path, together(path) - 1)
    assert split == pytest.approx(whole, rel=1e-5)


def test_a_pooled_response_that_is_too_long_is_refused_with_the_numbers(directory):
    """Pooled items must be one sequence: a response that is too long as one is refused before anything is run."""
    path, way = directory("qwen3", 4), Way(credit="per_response").config()
    tokenizer, limit = load_tokenizer(path), together(path)
    body = encode_text(tokenizer, RESPONSES[1])
    inputs = JudgePrompt(tokenizer, replace(way, max_length=limit)).build_items(QUERY, body)
    with pytest.raises(UserError) as error:
        JudgePrompt(tokenizer, replace(way, max_length=limit - 1)).build_items(QUERY, body)
    for number in (f"3 judge inputs of query 'a' share {shared_length(inputs)}", f"{limit} in all", f"{limit - 1}"):
        assert number in str(error.value)


def pooled_and_alone(layout: Layout, path: str) -> dict:
    """One response judged by ``credit=per_response``: all items marked, then one; and that one by ``credit=per_item``."""
    found = {}
    for credit in ("per_item", "per_response"):
        stage = stage_of(path, "tp1pp1", Way(credit=credit).config())
        inputs = stage.inputs([QUERY], [encode_text(stage.prompt.tokenizer, RESPONSES[1])])
        for name, marks in (("all", [True] * 3), ("one", [False, True, False])):
            judgements = stage.verdicts(inputs, ["0"])
            for item in judgements[0]:
                item.verdict = True
            stage.attribute(inputs, judgements, [marks], [WEIGHTS])
            alphas = stage.alphas([0] * len(judgements[0][1].attribution), judgements[0])
            rewards = token_rewards([True] * 3, list(WEIGHTS), alphas, 7.0, len(alphas[1]))
            found[credit, name] = {
                "alphas": [None if alpha is None else alpha.tolist() for alpha in alphas],
                "b": judgements[0][1].attribution.tolist(),
                "passes": len(backward_passes(judgements[0])),
                "reward": rewards.sum().item(),
            }
    return found


def test_a_pool_has_one_alpha_and_a_pool_of_one_is_the_item(worlds, directory):
    """Marked items share b and alpha, counted as one pass; token rewards sum to the response's; one item is unchanged."""
    found = on(worlds, "tp1pp1", pooled_and_alone, directory("qwen3", 4))
    pooled, alone = found["per_response", "all"], found["per_item", "all"]
    assert pooled["passes"] == 1 and alone["passes"] == 3
    assert pooled["alphas"][0] == pooled["alphas"][1] == pooled["alphas"][2] != alone["alphas"][0]
    assert found["per_response", "one"] == found["per_item", "one"]
    assert found["per_response", "one"]["alphas"][0] is None
    assert all(result["reward"] == pytest.approx(4 / 7, rel=1e-6) for result in found.values())
