"""Gate attributions equal Hugging Face's autograd under a float mask of log m that requires grad, on every layout.

The reference runs every item as a sequence of its own, with one mask for every layer (or kind of layer, where some have a
window), and differentiates the target by m. Tolerance (fp32): 1e-4 of b's norm, verdict probabilities 1e-5. Leaves out bf16
and GPUs; attention alone, with chunks and bf16, is in tests/unit/test_suffix_attention.py.
"""

from dataclasses import dataclass, replace
from functools import cache

import pytest
import torch
from transformers import AutoModelForCausalLM

from distributed import ALL_LAYOUTS, fits
from g2r_megatron.config.options import JudgeConfig, Layout
from g2r_megatron.credit.attribution import pooled_weights
from g2r_megatron.data.tokenizer import encode_text, load_tokenizer
from g2r_megatron.judge.prompt import JudgePrompt
from test_shared_prefix import QUERY, RESPONSES, TEMPLATES, WEIGHTS, on, stage_of
from tiny_models import build_tiny_hf

# qwen2: windows in some layers; mistral: in all, of 24 positions, shorter than the prefix
FAMILIES = ("qwen2", "qwen3", "llama3", "mistral", "qwen3_moe", "mixtral")
WINDOW = 24


@dataclass(frozen=True)
class Way:
    """How the judge is run. ``budget`` 1: an item a micro-batch; 90: rows of a few; 8192: everything in one row."""

    queries: str = "branch"
    levels: tuple[float, ...] = (1.0,)
    target: str = "logit_margin"
    template: str = "criterion_last"
    credit: str = "per_item"
    recompute: str = "none"
    budget: int = 8192

    def config(self) -> JudgeConfig:
        return JudgeConfig(
            template=TEMPLATES[self.template],
            chat_template=False,
            attribution="gate",
            gate_queries=self.queries,
            gate_levels=list(self.levels),
            target=self.target,
            credit=self.credit,
            recompute=self.recompute,
            micro_batch_tokens=self.budget,
            verdict="sample",
            standardize=False,
            smoothing="none",
        )


LEVELS = (1.0, 0.5, 0.1)
WAYS = {
    "branch": Way(),
    "branch_log_prob_levels_full_recompute": Way(target="log_prob", levels=LEVELS, recompute="full", budget=90),
    "branch_one_each_selective_recompute": Way(target="log_prob", budget=1, recompute="selective"),
    "branch_pooled_without_level_1": Way(levels=(0.5,), credit="per_response", budget=300),
    "all": Way("all", target="log_prob"),
    "all_levels_full_recompute": Way("all", levels=LEVELS, recompute="full", budget=90),
    "all_pooled": Way("all", credit="per_response", budget=90),
    "all_pooled_levels_selective_recompute": Way(
        "all", levels=(0.3, 0.7), credit="per_response", target="log_prob", recompute="selective"
    ),
}
CASES = ("tp1pp1", "tp2pp1", "tp2pp2sp", "tp1pp1dp2", "ep2", "pp2_ep2", "pp4_vpp2", "cp2", "cp2_tp2sp")
# In experts, a level chooses its own in the reference, and those of m = 1 in `all`: compared where there are none.
SPARSE = ("branch", "branch_one_each_selective_recompute", "branch_full_recompute", "all", "all_full_recompute")
WAYS |= {
    "branch_full_recompute": Way(recompute="full", budget=90),
    "all_full_recompute": Way("all", recompute="full", budget=90),
}


# In the ranks.


def judge_all(layout: Layout, path: str, name: str, way: Way, twice: bool = False) -> list[list[tuple]]:
    """(p_true, p_false, verdict, b) of every item of every response, all items marked."""
    stage = stage_of(path, name, way.config())
    bodies = [encode_text(stage.prompt.tokenizer, text) for text in RESPONSES]
    inputs = stage.inputs([QUERY] * len(bodies), bodies)
    keys = [str(i) for i in range(len(bodies))]

    def judged():
        judgements = stage.verdicts(inputs, keys)
        stage.attribute(inputs, judgements, [[True] * len(row) for row in judgements], [WEIGHTS] * len(bodies))
        return [
            [(j.p_true, j.p_false, j.verdict, None if j.attribution is None else j.attribution.tolist()) for j in row]
            for row in judgements
        ]

    found = judged()
    assert not twice or judged() == found
    return found


# The reference.


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    """``directory(family, layers)`` -> a tiny random Hugging Face directory; read only."""

    @cache
    def build(family: str, layers: int = 4) -> str:
        windows = dict(use_sliding_window=True, sliding_window=WINDOW, max_window_layers=2) if family == "qwen2" else {}
        path = tmp_path_factory.mktemp(f"{family}_{layers}")
        return str(build_tiny_hf(family, path, num_hidden_layers=layers, **windows))

    return build


def mask_of(model, m: torch.Tensor, item, queries: str) -> torch.Tensor | dict:
    """What is added to the scores [1, 1, S, S]: log m of the gated pairs, -inf of what is not seen."""
    length, start, end = len(item.input_ids), item.response_start, item.response_end
    q, k = torch.arange(length)[:, None], torch.arange(length)
    gated = (k >= start) & (k < end) & (k < q) & (q >= (end if queries == "branch" else start))
    logs = torch.zeros(length).index_put((torch.arange(start, end),), m.log())
    added = torch.where(gated, logs, 0.0)

    def masked(seen):
        return added.masked_fill(~seen, torch.finfo(torch.float32).min)[None, None]

    seen = {"full_attention": k <= q, "sliding_attention": (k <= q) & (q - k < WINDOW)}
    kinds = set(getattr(model.config, "layer_types", None) or [])
    if len(kinds) > 1:
        return {kind: masked(seen[kind]) for kind in kinds}
    window = model.config.model_type == "mistral" or kinds == {"sliding_attention"}
    return masked(seen["sliding_attention" if window else "full_attention"])


@pytest.fixture(scope="module")
def reference(directory):
    """``reference(family, layers, way, response)`` -> of each item (log p [2], b [2, T]): of log p(True), log p(False)."""

    @cache
    def model_of(path: str):
        model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32, attn_implementation="eager")
        return model.eval().requires_grad_(False)

    @cache
    def of_item(family: str, layers: int, template: str, queries: str, level: float, response: str, k: int):
        path = directory(family, layers)
        model, tokenizer = model_of(path), load_tokenizer(path)
        prompt = JudgePrompt(tokenizer, replace(WAYS["branch"], template=template).config())
        item = prompt.build(QUERY, QUERY.rubric[k], encode_text(tokenizer, response))
        m = torch.full((item.response_end - item.response_start,), level, requires_grad=True)
        mask = mask_of(model, m, item, queries)
        logits = model(torch.tensor([item.input_ids]), attention_mask=mask, use_cache=False).logits
        log_probs = logits[0, item.verdict_position].log_softmax(-1)
        spelled = [log_probs[ids].logsumexp(0) for ids in (prompt.true_ids, prompt.false_ids)]
        b = [torch.autograd.grad(value, m, retain_graph=True)[0] for value in spelled]
        return torch.stack(spelled).detach(), torch.stack(b)

    def compute(family: str, layers: int, way: Way, response: str):
        items = []
        for k in range(len(QUERY.rubric)):
            log_probs = of_item(family, layers, way.template, way.queries, 1.0, response, k)[0]
            found = [of_item(family, layers, way.template, way.queries, m, response, k)[1] for m in way.levels]
            items.append((log_probs, torch.stack(found).mean(0)))
        return items

    return compute


def check(found: list[list[tuple]], reference, way: Way, family: str, layers: int) -> None:
    """Verdicts and b of every response against the reference; prints the worst errors (pytest -s)."""
    worst = dict.fromkeys(("probability", "attribution"), 0.0)
    for row, response in zip(found, RESPONSES, strict=True):
        items, wanted = reference(family, layers, way, response), []
        for (p_true, p_false, verdict, _), (log_probs, b) in zip(row, items, strict=True):
            expected = log_probs.exp().tolist()
            errors = abs(p_true / expected[0] - 1), abs(p_false / expected[1] - 1)
            worst["probability"] = max(worst["probability"], *errors)
            wanted.append(b[0] - b[1] if way.target == "logit_margin" else b[0 if verdict else 1])
        if way.credit == "per_response":
            wanted = [sum(c * b for c, b in zip(pooled_weights(list(WEIGHTS)), wanted, strict=True))] * len(row)
        for (*_, b), expected in zip(row, wanted, strict=True):
            if not response:
                assert b is None
                continue
            error = ((torch.tensor(b) - expected).norm() / expected.norm()).item()
            worst["attribution"] = max(worst["attribution"], error)
    print({name: f"{error:.1e}" for name, error in worst.items()})
    assert worst["probability"] <= 1e-5 and worst["attribution"] <= 1e-4, worst


def matrix():
    for layout in CASES:
        layers = 8 if ALL_LAYOUTS[layout][1].vpp else 4
        for family in FAMILIES:
            moe = family in ("qwen3_moe", "mixtral")
            if not fits(layout, layers=layers, moe=moe):
                continue
            for way in WAYS:
                # every family once, every layout with the families that differ most
                if (layout == "tp1pp1" or family in ("qwen2", "qwen3_moe")) and (way in SPARSE or not moe):
                    yield layout, family, layers, way


@pytest.mark.parametrize(("layout", "family", "layers", "way"), list(matrix()))
def test_gates_equal_a_float_mask_under_autograd(worlds, directory, reference, layout, family, layers, way):
    """Both kinds of queries, levels, targets, pooled or not, recomputed or not; windows, experts, virtual stages."""
    found = on(worlds, layout, judge_all, directory(family, layers), layout, WAYS[way])
    check(found, reference, WAYS[way], family, layers)
