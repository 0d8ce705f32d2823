"""What a training step computes: the passes of each phase, from the config's limits on tokens.

Every prompt has ``rollout.max_prompt_tokens`` tokens and every response ``rollout.max_response_tokens``. This is the
most that must fit, and the longest that a step takes. Real steps are faster if their responses are shorter.
"""

import math
from dataclasses import dataclass, replace

from g2r_megatron.config.layout import data_parallel_size
from g2r_megatron.config.options import Layout, gated_queries
from g2r_megatron.parallel.microbatches import cache_block, padded, row_length
from g2r_megatron.plan.config import PlanConfig

CHARACTERS_PER_TOKEN = 4
CHAT_TOKENS = 24  # of a chat template around the judge's prompt
FP8_TOKENS = {"none": 1, "tensorwise": 16, "blockwise": 128, "mxfp8": 32}  # as model/build.py


@dataclass(frozen=True)
class Passes:
    """Work of one phase on one data-parallel replica.

    ``micro_batches`` of ``tokens`` tokens each, padding included; a token attends to ``context`` positions on average;
    ``logit_rows``: positions of a micro-batch whose logits are built.
    """

    micro_batches: int
    tokens: int
    context: float
    logit_rows: int


@dataclass(frozen=True)
class Workload:
    """Sizes of a training step, in tokens unless they are counts."""

    responses: int
    prompt: int
    response: int
    items: int  # of a response
    attributed: float  # items of a response that need a backward pass
    criterion: int
    template: int
    shares_prefix: bool  # the criterion comes last: the items of a response share what is before it
    pooled: bool  # one backward pass a response
    parts: int  # sampled and judged one after the other
    gates: str | None  # the queries that are gated; "branch": one pass gives verdicts and attributions

    @property
    def sequence(self) -> int:
        return self.prompt + self.response

    @property
    def judge_prefix(self) -> int:
        return self.prompt + self.template + self.response

    @property
    def judge_input(self) -> int:
        """One item alone."""
        return self.judge_prefix + self.criterion

    @property
    def judge_tree(self) -> int:
        """All items of a response, as they run together."""
        return self.judge_prefix + self.items * self.criterion if self.shares_prefix else self.judge_input


def workload(config: PlanConfig) -> Workload:
    """The step that ``config`` (with its preset resolved) describes."""
    template = config.judge.template
    text = len(template) - sum(len("{" + name + "}") for name in ("conversation", "response", "criterion"))
    attributes = config.grpo.credits_tokens and config.judge.attribution != "uniform"
    share = config.attributed_share * config.grpo.top_items if attributes else 0.0
    return Workload(
        responses=config.rollout.prompts_per_step * config.rollout.responses_per_prompt,
        prompt=config.rollout.max_prompt_tokens,
        response=config.rollout.max_response_tokens,
        items=config.rubric_items,
        attributed=share * config.rubric_items,
        criterion=config.criterion_tokens,
        template=math.ceil(text / CHARACTERS_PER_TOKEN) + (CHAT_TOKENS if config.judge.chat_template else 0),
        shares_prefix=template.index("{criterion}") > template.index("{response}"),
        pooled=config.judge.credit == "per_response",
        parts=config.judge.parts,
        gates=gated_queries(config.judge) if attributes else None,
    )


def _passes(
    layout: Layout,
    ranks: int,
    count: int,
    length: int,
    budget: int,
    fp8: str,
    context: float,
    rows: int,
    few_lengths: bool = False,
) -> Passes:
    """``count`` sequences of ``length`` tokens, ``rows`` logits each, dealt over the replicas and packed into rows.

    ``few_lengths``: rows are padded to one of few lengths, as the policy's are.
    """
    dp = data_parallel_size(layout, ranks)
    multiple = FP8_TOKENS[fp8] * (layout.tp if layout.sp else 1) * layout.cp  # as model/build.py
    together = max(1, budget // padded(length, multiple))
    micro_batches = math.ceil(math.ceil(count / dp) / together)
    if layout.vpp:
        micro_batches = padded(micro_batches, layout.pp)
    tokens = together * length
    tokens = row_length(tokens, budget, multiple) if few_lengths else padded(tokens, multiple)
    return Passes(micro_batches, tokens, context, together * rows)


def policy_passes(work: Workload, config: PlanConfig, ranks: int) -> Passes:
    """Old log-probs (forward) and each mini-batch of the update (forward and backward), all mini-batches together."""
    p = config.policy
    count, mini_batches = math.ceil(work.responses / config.grpo.mini_batches), config.grpo.mini_batches
    one = _log_prob_passes(work, p.layout, ranks, count, p.micro_batch_tokens, p.precision.fp8)
    return replace(one, micro_batches=one.micro_batches * mini_batches)


def reference_passes(work: Workload, config: PlanConfig, ranks: int) -> Passes:
    """Log-probs under the frozen initial policy; self-judging, that is the judge on its own layout."""
    c = config.judge if config.judge.model is None and not config.judge.ranks else config.policy
    budget = config.policy.micro_batch_tokens
    return _log_prob_passes(work, c.layout, ranks, work.responses, budget, c.precision.fp8)


def _log_prob_passes(work: Workload, layout: Layout, ranks: int, count: int, budget: int, fp8: str) -> Passes:
    """Over prompts and responses, with the logits of the responses."""
    s = work.sequence
    return _passes(layout, ranks, count, s, budget, fp8, s / 2, work.response, few_lengths=True)


def verdict_passes(work: Workload, config: PlanConfig, ranks: int) -> Passes:
    """One tree a response, cut if it is longer than ``judge.max_length``; without sharing one sequence an item."""
    c = config.judge
    if work.gates == "branch":  # the prefixes; their branches are the attribution's
        count = work.responses * (1 if work.shares_prefix else work.items)
        return _judge_passes(config, ranks, count, work.judge_prefix, work.judge_prefix / 2, 0)
    if not work.shares_prefix:
        return _judge_passes(config, ranks, work.responses * work.items, work.judge_input, work.judge_input / 2, 1)
    room = max(1, (c.max_length - work.judge_prefix) // work.criterion)
    items = min(work.items, room)
    parts = math.ceil(work.items / items)
    length = work.judge_prefix + items * work.criterion
    return _judge_passes(config, ranks, work.responses * parts, length, _tree_context(work, items), items)


def attribution_passes(work: Workload, config: PlanConfig, ranks: int) -> Passes:
    """One sequence an attributed item, or one tree of them a response (``judge.credit=per_response``).

    For gates, the tokens that have gradients: the branches of all items, or response and branch of the attributed ones.
    """
    if work.gates == "branch":
        items = max(1, min(work.items, config.judge.micro_batch_tokens // work.criterion))
        count = work.responses * math.ceil(work.items / items)
        context = work.judge_prefix + work.criterion / 2
        return _judge_passes(config, ranks, count, items * work.criterion, context, items)
    if work.gates == "all":
        count, length = math.ceil(work.responses * work.attributed), work.response + work.criterion
        return _judge_passes(config, ranks, count, length, work.judge_input - length / 2, 1)
    if work.pooled:
        items = math.ceil(work.attributed)
        length = work.judge_prefix + items * work.criterion
        count = work.responses if items else 0
        return _judge_passes(config, ranks, count, length, _tree_context(work, items), items)
    count = math.ceil(work.responses * work.attributed)
    return _judge_passes(config, ranks, count, work.judge_input, work.judge_input / 2, 1)


def kept_prefix_tokens(work: Workload, passes: Passes) -> float:
    """Tokens of prefixes whose keys and values are kept while one of the attribution's micro-batches of gates is run."""
    if work.gates is None:
        return 0
    if work.gates == "all":
        return passes.logit_rows * (work.judge_prefix - work.response)
    return math.ceil(passes.logit_rows / work.items) * work.judge_prefix


def _tree_context(work: Workload, items: int) -> float:
    prefix, branches = work.judge_prefix, items * work.criterion
    return (prefix * prefix / 2 + branches * (prefix + work.criterion / 2)) / (prefix + branches)


def _judge_passes(config: PlanConfig, ranks: int, count: int, length: int, context: float, rows: int) -> Passes:
    c, parts = config.judge, config.judge.parts
    one = _passes(
        c.layout, ranks, math.ceil(count / parts), length, c.micro_batch_tokens, c.precision.fp8, context, rows
    )
    return replace(one, micro_batches=one.micro_batches * parts)


@dataclass(frozen=True)
class Rollout:
    """Sampling on one replica as rollout/megatron.py does it, with all responses at the limit.

    ``sequences`` are decoded together. As they end together, the waiting ones come in together: ``batches`` times.
    A batch begins with passes over ``prompts`` different prompts, each padded to ``read`` tokens on average, and takes
    ``steps``, one a token of the responses. ``prompt``, ``response``: the limits.
    """

    batches: int
    sequences: int
    prompts: int
    prompt: int
    response: int
    read: float

    @property
    def steps(self) -> int:
        return self.response

    @property
    def length(self) -> int:
        """Positions of the cache, for prompts at the limit."""
        return padded(self.prompt + self.response, self.block)

    @property
    def block(self) -> int:
        return cache_block(self.prompt + self.response)

    @property
    def context(self) -> float:
        """Positions of the cache that a step reads, on average: up to the longest sequence of the batch, in whole blocks."""
        return min(self.read + self.steps / 2 + self.block / 2, self.length)


def rollout(work: Workload, config: PlanConfig, ranks: int) -> Rollout:
    """Prompts are sorted by length and dealt out, so that a batch has its share of their ``config.prompt_spread``."""
    size, dp = config.rollout.batch_size, data_parallel_size(config.policy.layout, ranks)
    share = math.ceil(math.ceil(work.responses / work.parts) / dp)
    sequences = padded(min(share, size), FP8_TOKENS[config.policy.precision.fp8])
    batches = math.ceil(share / size)
    of_a_prompt = math.ceil(config.rollout.responses_per_prompt / dp)  # of its responses, on this replica
    prompts = min(sequences, 1 << (math.ceil(min(share, size) / of_a_prompt) - 1).bit_length())
    longest = work.prompt * (1 - config.prompt_spread * (batches - 1) / (2 * batches))  # of a batch, on average
    return Rollout(work.parts * batches, sequences, prompts, work.prompt, work.response, longest)
