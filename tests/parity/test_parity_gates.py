"""Gate attributions equal Hugging Face's autograd under a float mask of log m that requires grad, on every layout.

The reference runs every item as a sequence of its own, with one mask for every layer (or kind of layer, where some have a
window), and differentiates the target by m. Tolerance (fp32): 1e-4 of b's norm, verdict probabilities 1e-5. Leaves out bf16
and GPUs; attention alone, with chunks and bf16, is in tests/unit/test_suffix_attention.py.
"""

import json
from dataclasses import dataclass, replace
from functools import cache

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from distributed import ALL_LAYOUTS, fits
from g2r_megatron.config.options import JudgeConfig, Layout
from g2r_megatron.config.presets import PRESETS, fill_from_preset
from g2r_megatron.credit.attribution import pooled_weights
from g2r_megatron.data.tokenizer import encode_text, load_tokenizer
from g2r_megatron.errors import UserError
from g2r_megatron.judge.prompt import JudgePrompt
from g2r_megatron.judge.reward_prompt import RewardPrompt
from g2r_megatron.judge.suffixes import Suffix, SuffixUnit
from g2r_megatron.judge.types import JudgeInput
from test_alignment import byte_bpe
from test_shared_prefix import CRITERIA, QUERY, RESPONSES, TEMPLATES, WEIGHTS, on, stage_of
from tiny_models import CHATML, build_tiny_hf, build_tiny_reward_model, build_tokenizer

# qwen2: windows in some layers; mistral: in all, of 24 positions, shorter than the prefix
FAMILIES = ("qwen2", "qwen3", "llama3", "mistral", "qwen3_moe", "mixtral")
WINDOW = 24


@dataclass(frozen=True)
class Way:
    """How the judge is run. ``budget`` 1: an item a micro-batch; 90: rows of a few; 8192: everything in one row."""

    queries: str | None = "branch"
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
            normalize="softmax",
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


@pytest.mark.parametrize("template", TEMPLATES)
@pytest.mark.parametrize("queries", ["branch", "all"])
def test_any_order_of_the_template(worlds, directory, reference, template, queries):
    """Also where the criterion stands before the response, so that each item has a prefix of its own."""
    for layout in ("tp1pp1", "tp2pp1sp"):
        way = Way(queries, template=template, budget=200)
        check(on(worlds, layout, judge_all, directory("qwen3"), layout, way), reference, way, "qwen3", 4)


@pytest.mark.parametrize("name", ["branch_log_prob_levels_full_recompute", "all_levels_full_recompute"])
def test_the_same_bits_every_time(worlds, directory, name):
    """Twice the same passes on four ranks: every number is the same (asserted in the ranks)."""
    on(worlds, "tp2pp2sp", judge_all, directory("qwen2"), "tp2pp2sp", WAYS[name], True)


# Properties of b.


def judged_items(
    layout: Layout, path: str, way: Way, criteria: tuple[str, ...], response: str = RESPONSES[1]
) -> list[list[float]]:
    """b of each of ``criteria`` on the response."""
    stage = stage_of(path, "tp1pp1", way.config())
    by_text = {item.criterion: item for item in QUERY.rubric}
    query = replace(QUERY, rubric=tuple(by_text[text] for text in criteria))
    inputs = stage.inputs([query], [encode_text(stage.prompt.tokenizer, response)])
    judgements = stage.verdicts(inputs, ["0"])
    stage.attribute(inputs, judgements, [[True] * len(criteria)], [[1.0] * len(criteria)])
    return [judgement.attribution.tolist() for judgement in judgements[0]]


@pytest.mark.parametrize("queries", ["branch", "all"])
def test_other_criteria_change_nothing(worlds, directory, queries):
    """In another order, or alone: an item's b is its own."""
    path, way = directory("qwen3"), Way(queries)
    found = on(worlds, "tp1pp1", judged_items, path, way, CRITERIA)
    turned = on(worlds, "tp1pp1", judged_items, path, way, CRITERIA[::-1])[::-1]
    alone = [on(worlds, "tp1pp1", judged_items, path, way, (text,))[0] for text in CRITERIA]
    for other in (turned, alone):
        torch.testing.assert_close(torch.tensor(other), torch.tensor(found), rtol=1e-4, atol=1e-6)


def test_a_token_that_no_gated_query_sees_has_no_gradient(worlds, directory):
    """A window of 24 positions in every layer: what a branch's first token is too far from is exactly 0."""
    response = 2 * RESPONSES[1]
    for b in on(worlds, "tp1pp1", judged_items, directory("mistral"), Way(), CRITERIA, response):
        visible = torch.tensor(b[-(WINDOW - 1) :])
        assert len(b) > WINDOW and all(value == 0 for value in b[: -(WINDOW - 1)]) and bool((visible != 0).any())


def margin(path: str, m: torch.Tensor, queries: str, k: int) -> float:
    """The logit margin of item ``k`` on the longest response at gates ``m`` [T], in fp64."""
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float64, attn_implementation="eager").eval()
    tokenizer = load_tokenizer(path)
    prompt = JudgePrompt(tokenizer, Way(queries).config())
    item = prompt.build(QUERY, QUERY.rubric[k], encode_text(tokenizer, RESPONSES[1]))
    with torch.no_grad():
        mask = mask_of(model, m, item, queries)
        mask = {kind: x.double() for kind, x in mask.items()} if isinstance(mask, dict) else mask.double()
        logits = model(torch.tensor([item.input_ids]), attention_mask=mask).logits[0, item.verdict_position]
    log_probs = logits.log_softmax(-1)
    return float(log_probs[prompt.true_ids].logsumexp(0) - log_probs[prompt.false_ids].logsumexp(0))


@pytest.mark.parametrize("queries", ["branch", "all"])
def test_sums_over_the_levels_are_complete_and_slopes_are_real(worlds, directory, queries):
    """The sum of b over levels (i + 1/2) / 32 is F(response) - F(response hidden); b_t at 1 is F's numerical derivative."""
    path, n, k = directory("qwen3"), 32, 0
    way = Way(queries, levels=tuple((i + 0.5) / n for i in range(n)))
    (b,) = on(worlds, "tp1pp1", judged_items, path, way, CRITERIA[:1])
    (slopes,) = on(worlds, "tp1pp1", judged_items, path, Way(queries), CRITERIA[:1])
    ones = torch.ones(len(b))
    whole = margin(path, ones, queries, k) - margin(path, 0 * ones, queries, k)
    assert sum(b) == pytest.approx(whole, rel=0.01)
    for t in (0, len(b) // 2):
        step = torch.zeros(len(b)).index_fill_(0, torch.tensor([t]), 2.0**-6)
        numerical = (margin(path, ones + step, queries, k) - margin(path, ones - step, queries, k)) * 2.0**5
        assert slopes[t] == pytest.approx(numerical, rel=0.01, abs=1e-3 * max(map(abs, slopes)))


def test_items_that_need_no_credit_keep_none(worlds, directory):
    """Where the verdict pass makes all of them, and where only those that are asked for are made."""
    for queries in ("branch", "all"):
        assert on(worlds, "tp1pp1dp2", attribute_one, directory("qwen3"), queries) == [[None, True, None], [None] * 3]


def attribute_one(layout: Layout, path: str, queries: str) -> list[list[bool | None]]:
    stage = stage_of(path, "tp1pp1dp2", Way(queries).config())
    bodies = [encode_text(stage.prompt.tokenizer, text) for text in RESPONSES[:2]]
    inputs = stage.inputs([QUERY] * 2, bodies)
    judgements = stage.verdicts(inputs, ["0", "1"])
    stage.attribute(inputs, judgements, [[False, True, False], [False] * 3], [WEIGHTS] * 2)
    return [[None if j.attribution is None else bool(j.attribution.any()) for j in row] for row in judgements]


def saved_tensors(layout: Layout, path: str) -> dict[str, list[int]]:
    """Sizes of what the backward of one response's branches keeps that is as long as its prefix, and of all else."""
    stage = stage_of(path, "tp1pp1", Way().config())
    inputs = stage.inputs([QUERY], [encode_text(stage.prompt.tokenizer, RESPONSES[1] * 4)])
    prefix, model = inputs[0][0].response_end, stage.judge.model
    weights = {t.untyped_storage().data_ptr() for t in (*model.chunks[0].parameters(), *model.chunks[0].buffers())}
    saved = {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            saved[storage.data_ptr()] = tensor.shape, storage.nbytes(), storage
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        stage.verdicts(inputs, ["0"])
    kept = model.geometry.kv_heads * model.geometry.head_dim * prefix * 4
    suffixes = sum(len(item.input_ids) - prefix for item in inputs[0])
    assert suffixes < prefix
    long = [n for shape, n, _ in saved.values() if prefix in shape]
    return {"long": long, "kept": kept, "layers": model.geometry.layers, "rest": len(saved) - len(long)}


def test_of_a_prefix_only_keys_and_values_are_kept(worlds, directory):
    """Two tensors a layer, of exactly that size, are as long as the prefix."""
    found = on(worlds, "tp1pp1", saved_tensors, directory("qwen3"))
    assert found["long"] == [found["kept"]] * (2 * found["layers"]) and found["rest"] > 0


# A reward model, another tokenizer, and the command line.


def score_all(layout: Layout, path: str, name: str, way: Way) -> list[tuple]:
    """(input ids, response's span, score, b) of every response."""
    import test_reward_model as reward
    from g2r_megatron.judge.frozen import FrozenJudge
    from g2r_megatron.judge.stage import JudgeStage

    config = JudgeConfig(
        attribution="gate", gate_queries=way.queries, gate_levels=list(way.levels), recompute=way.recompute
    )
    model = reward.megatron_model(path, name, way.recompute)
    prompt = RewardPrompt(load_tokenizer(path), config, None, model.hf.config.pad_token_id)
    stage = JudgeStage(FrozenJudge(model, config, [], []), prompt, config)
    bodies = [encode_text(prompt.tokenizer, text) for _, text in reward.RESPONSES]
    inputs = stage.inputs([reward.QUERIES[q] for q, _ in reward.RESPONSES], bodies)
    rows = stage.verdicts(inputs, [""] * len(bodies))
    stage.attribute(inputs, rows, [[True]] * len(rows), [[1.0]] * len(rows))
    return [
        (item.input_ids, item.response_start, item.response_end, row[0].score, row[0].attribution.tolist())
        for (item,), row in zip(inputs, rows, strict=True)
    ]


@pytest.mark.parametrize("queries", [None, "branch"])
@pytest.mark.parametrize("layout", ["tp1pp1", "tp2pp2sp", "cp2"])
def test_reward_model(worlds, tmp_path, layout, queries):
    """Scores and b of a tiny Llama; by default all later queries are gated."""
    path = build_tiny_reward_model("llama3", tmp_path / "reward")
    way = Way(queries, levels=(1.0, 0.25), recompute="full" if layout == "cp2" else "none")
    found = on(worlds, layout, score_all, str(path), layout, way)
    model = AutoModelForSequenceClassification.from_pretrained(path, dtype=torch.float32, attn_implementation="eager")
    for ids, start, end, score, b in found:
        wanted, item = [], JudgeInput(ids, start, end, len(ids) - 1)
        for level in (1.0, 0.25):
            m = torch.full((end - start,), level, requires_grad=True)
            mask = mask_of(model, m, item, queries or "all")
            hidden = model.model(torch.tensor([ids]), attention_mask=mask, use_cache=False).last_hidden_state
            value = model.score(hidden)[0, -1, 0]
            assert level != 1 or score == pytest.approx(value.item(), rel=1e-5, abs=1e-6)
            wanted.append(torch.autograd.grad(value, m)[0])
        expected = torch.stack(wanted).mean(0)
        assert (torch.tensor(b) - expected).norm() <= 1e-4 * expected.norm()


def gates_by_command(layout: Layout, arguments: list[str]) -> None:
    """`g2r judge` with these options."""
    from g2r_megatron.config.command_options import OfflineJudgeConfig
    from g2r_megatron.config.parsing import parse
    from g2r_megatron.judge.offline import judge_file

    config = parse(OfflineJudgeConfig, "g2r judge", arguments)
    judge_file(replace(config, judge=fill_from_preset(config.judge, PRESETS[config.preset]["judge"])))


def test_dumped_inputs_repeat_the_attribution(worlds, directory, tmp_path):
    """`g2r judge --dump-inputs`: b of every item judged True, by autograd on the ids it read; None for the others."""
    path, rows, output = directory("qwen3"), tmp_path / "rows.jsonl", tmp_path / "out.jsonl"
    rubric = [{"criterion": text, "weight": 1} for text in CRITERIA]
    row = {"id": "a", "prompt": "fever?", "rubric": rubric, "response": RESPONSES[1]}
    rows.write_text(json.dumps(row) + "\n")
    options = {"judge.model": path, "input": rows, "output": output, "judge.attribution": "gate", "seed": 2}
    options |= {"judge.target": "logit_margin", "judge.verdict": "sample", "dump_inputs": "true"}
    arguments = [text for name, value in options.items() for text in (f"--{name}", str(value))]
    worlds.on("tp2pp1", gates_by_command, [*arguments, "--judge.layout.tp", "2"])
    (record,) = [json.loads(line) for line in output.read_text().splitlines()]
    assert {item["verdict"] for item in record["items"]} == {True, False}
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32, attn_implementation="eager").eval()
    for item in record["items"]:
        if not item["verdict"]:
            assert item["attribution"] is None
            continue
        read = JudgeInput(*(item[key] for key in ("input_ids", "response_start", "response_end", "verdict_position")))
        m = torch.ones(read.response_end - read.response_start, requires_grad=True)
        logits = model(torch.tensor([read.input_ids]), attention_mask=mask_of(model, m, read, "branch")).logits
        log_probs = logits[0, read.verdict_position].log_softmax(-1)
        value = log_probs[item["true_ids"]].logsumexp(0) - log_probs[item["false_ids"]].logsumexp(0)
        expected = torch.autograd.grad(value, m)[0]
        assert (torch.tensor(item["attribution"]) - expected).norm() <= 1e-4 * expected.norm()


def judged_in_other_tokens(layout: Layout, path: str, policy: str) -> dict:
    """b of a response of another tokenizer's ids, and alpha over those ids."""
    from g2r_megatron.judge.frozen import FrozenJudge
    from g2r_megatron.judge.stage import JudgeStage
    from test_shared_prefix import judge_model

    config, other = Way().config(), load_tokenizer(policy)
    prompt = JudgePrompt(load_tokenizer(path), config, other)
    model = judge_model(path, "tp1pp1", "none")
    stage = JudgeStage(FrozenJudge(model, config, prompt.true_ids, prompt.false_ids), prompt, config)
    body = encode_text(other, RESPONSES[1])
    inputs = stage.inputs([QUERY], [body])
    rows = stage.verdicts(inputs, ["0"])
    stage.attribute(inputs, rows, [[True] * 3], [WEIGHTS])
    return {
        "b": [item.attribution.tolist() for item in rows[0]],
        "alphas": [(len(alpha), float(alpha.sum())) for alpha in stage.alphas(body, rows[0])],
        "tokens": len(body),
    }


def test_another_tokenizer(worlds, directory, tmp_path):
    """b is over the judge's own tokens of the text, as if the judge's tokenizer had made them; alpha over the policy's."""
    byte_bpe(460).save_pretrained(tmp_path)
    found = on(worlds, "tp1pp1", judged_in_other_tokens, directory("qwen3"), str(tmp_path))
    own = on(worlds, "tp1pp1", judged_items, directory("qwen3"), Way(), CRITERIA)
    torch.testing.assert_close(torch.tensor(found["b"]), torch.tensor(own))
    assert found["tokens"] != len(own[0])
    assert found["alphas"] == [(found["tokens"], pytest.approx(1.0))] * 3


def test_a_reward_model_with_an_empty_branch_is_refused():
    """Its template ends with the response: one line that names the option."""
    tokenizer = build_tokenizer()
    tokenizer.chat_template = CHATML.replace("+ '<|im_end|>\n' ", "")
    RewardPrompt(tokenizer, JudgeConfig(attribution="gate"))
    with pytest.raises(UserError, match=r"judge.gate_queries: branch, but .* ends with the response"):
        RewardPrompt(tokenizer, JudgeConfig(attribution="gate", gate_queries="branch"))


# Suffixes that see less than their prefix.


def hidden_sentences(layout: Layout, path: str, name: str, spans: list[tuple[int, int]], budget: int) -> list:
    """(log p(True), log p(False)) of an item while response tokens ``spans`` are hidden from all that follows."""
    stage = stage_of(path, name, replace(Way().config(), micro_batch_tokens=budget))
    (inputs,) = stage.inputs([QUERY], [encode_text(stage.prompt.tokenizer, RESPONSES[1])])
    start = inputs[0].response_start
    suffixes = [Suffix(n, 0, start + end, start + begin) for n, (begin, end) in enumerate(spans)]
    unit = SuffixUnit(max(suffix.visible for suffix in suffixes), [[suffix] for suffix in suffixes])
    return stage.judge.read_suffixes([unit], inputs).tolist()


@pytest.mark.parametrize(("layout", "family"), [("tp1pp1", "qwen2"), ("tp2pp2sp", "qwen3"), ("cp2", "qwen3")])
@pytest.mark.parametrize("budget", [1, 8192])
def test_suffixes_over_a_part_of_their_prefix(worlds, directory, layout, family, budget):
    """What hiding a run of response tokens from all later positions does, as transformers says with a mask."""
    spans, path = [(0, 3), (3, 9), (9, 10)], directory(family)
    found = on(worlds, layout, hidden_sentences, path, layout, spans, budget)
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32, attn_implementation="eager").eval()
    tokenizer = load_tokenizer(path)
    prompt = JudgePrompt(tokenizer, Way().config())
    item = prompt.build(QUERY, QUERY.rubric[0], encode_text(tokenizer, RESPONSES[1]))
    for (begin, end), values in zip(spans, found, strict=True):
        mask = mask_of(model, torch.ones(item.response_end - item.response_start), item, "all")
        for part in mask.values() if isinstance(mask, dict) else [mask]:
            part[..., item.response_start + end :, item.response_start + begin : item.response_start + end] = -1e30
        with torch.no_grad():
            logits = model(torch.tensor([item.input_ids]), attention_mask=mask).logits[0, -1].log_softmax(-1)
        expected = [logits[ids].logsumexp(0).item() for ids in (prompt.true_ids, prompt.false_ids)]
        assert values == pytest.approx(expected, abs=1e-5)
