"""Everything a training run is made of, built from its config in the order that finds mistakes first."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path

import torch
import torch.distributed as dist
from transformers import PreTrainedTokenizerFast

from g2r_megatron.config.command_options import SampledPolicyConfig
from g2r_megatron.config.options import (
    JudgeConfig,
    PolicyConfig,
    RolloutConfig,
    TrainConfig,
    VerdictJudgeConfig,
    VerifierConfig,
)
from g2r_megatron.config.presets import without_credit
from g2r_megatron.credit.judgements import JudgementRow
from g2r_megatron.data.chat_template import check_system_prompt, check_template_options, with_system_prompt
from g2r_megatron.data.order import epoch_batch
from g2r_megatron.data.prompts import Prompts
from g2r_megatron.data.readers import read_queries
from g2r_megatron.data.tokenizer import encode_text, stop_token_ids
from g2r_megatron.data.types import Query
from g2r_megatron.errors import UserError, warn
from g2r_megatron.judge.frozen import FrozenJudge
from g2r_megatron.judge.length_bound import check_judge_positions
from g2r_megatron.judge.own_ranks import OwnRanks
from g2r_megatron.judge.parts import SharedRanks
from g2r_megatron.judge.prompt import JudgePrompt
from g2r_megatron.judge.reward_prompt import RewardPrompt, judge_prompt
from g2r_megatron.judge.stage import JudgeStage
from g2r_megatron.model.build import MegatronModel, build_model, check_model
from g2r_megatron.model.hf import HFModel, load_model_tokenizer, open_hf_model
from g2r_megatron.model.offload import HostWeights
from g2r_megatron.parallel.agreement import union
from g2r_megatron.parallel.groups import ModelGroups, build_groups
from g2r_megatron.policy.log_probs import TokenSequence, plan_micro_batches, response_log_probs
from g2r_megatron.policy.trainer import PolicyTrainer
from g2r_megatron.records.phase_times import PhaseTimes
from g2r_megatron.rollout.megatron import MegatronRolloutEngine
from g2r_megatron.rollout.replay import ReplayEngine
from g2r_megatron.rollout.thoughts import ThoughtEnd, thought_end
from g2r_megatron.rollout.types import RolloutEngine
from g2r_megatron.rollout.vllm.environment import check_engine
from g2r_megatron.verify.verifier import Verifier

POLICY_LENGTH = "rollout.max_prompt_tokens + rollout.max_response_tokens"


@dataclass(kw_only=True)
class PolicyInputs:
    """What sampling from a policy needs besides its weights."""

    policy: HFModel
    tokenizer: PreTrainedTokenizerFast
    stop_ids: set[int]
    thought_end: ThoughtEnd | None
    prompt_ids: Prompts  # by query id


@dataclass(kw_only=True)
class Inputs(PolicyInputs):
    """What is read before any process group or weight exists."""

    judge: HFModel
    prompt: JudgePrompt | RewardPrompt
    train: list[Query]
    eval: list[Query]
    gold: "VerdictJudge | None"  # eval.judge
    verifier: Verifier | None  # where rows have an answer


@dataclass
class Workers:
    """The models of a run at work, on the policy's ranks.

    ``reference`` is the frozen initial policy, or None when no KL is asked for. ``host_weights``: the judge's, with
    ``judge.offload``; they must be loaded while the judge works, or the reference where both are one.
    """

    trainer: PolicyTrainer
    engine: RolloutEngine
    judge: SharedRanks | OwnRanks
    reference: MegatronModel | None
    host_weights: HostWeights | None
    gold: "GoldJudge | None"

    @contextmanager
    def judge_on_device(self, times: PhaseTimes | None = None) -> Iterator[None]:
        """In the block the judge's weights are on the device; ``judge_load`` of ``times``: the seconds that it took."""
        if self.host_weights is None:
            yield
            return
        with times("judge_load", shown=False) if times else nullcontext():
            self.host_weights.load()
        yield
        self.host_weights.release()


def read_policy(
    section: PolicyConfig | SampledPolicyConfig, rollout: RolloutConfig, system_prompt: str, option: str
) -> PolicyInputs:
    """Read and check the policy's config and tokenizer, and the options of sampling; ``option`` gives ``system_prompt``.

    Raises ``UserError``.
    """
    policy = open_hf_model(section.model, "policy.model")
    if policy.geometry.is_reward_model:
        raise UserError(
            "policy.model", f"{section.model} is a reward model ({policy.architecture})", "give a language model"
        )
    check_model("policy", policy, section.layout, section.precision, section.spec)
    if rollout.engine == "vllm" and rollout.vllm.mode == "colocated" and not rollout.replay:
        check_engine(policy, rollout, section.precision.dtype)
    tokenizer = load_model_tokenizer(policy)
    check_template_options(tokenizer, rollout.template_options, "rollout.template_options", rollout.chat_template)
    check_system_prompt(tokenizer, system_prompt, rollout.template_options, option, rollout.chat_template)
    policy.check_positions(rollout.max_prompt_tokens + rollout.max_response_tokens, POLICY_LENGTH)
    return PolicyInputs(
        policy=policy,
        tokenizer=tokenizer,
        stop_ids=stop_token_ids(tokenizer, rollout.stop, rollout.template_options),
        thought_end=thought_end(tokenizer, rollout),
        prompt_ids=Prompts(tokenizer, rollout.chat_template, rollout.max_prompt_tokens, rollout.template_options),
    )


def read_inputs(config: TrainConfig) -> Inputs:
    """Read and check models' configs, tokenizers and data. Raises ``UserError``; writes nothing."""
    rollout, system_prompt = config.rollout, config.data.system_prompt
    of_policy = read_policy(config.policy, rollout, system_prompt, "data.system_prompt")
    policy, tokenizer, prompts = of_policy.policy, of_policy.tokenizer, of_policy.prompt_ids
    gold = read_verdict_judge(config.eval.judge, "eval.judge") if config.eval.judge.model else None
    judge = policy if config.judge.model is None else open_hf_model(config.judge.model, "judge.model")
    check_model("judge", judge, config.judge.layout, config.judge.precision, config.judge.spec)
    judge_tokenizer = tokenizer if judge is policy else load_model_tokenizer(judge)
    # a judge that has every token of the policy, under the same id, reads its ids; any other one reads its text
    reads_ids = tokenizer.get_vocab().items() <= judge_tokenizer.get_vocab().items()
    reads_ids = reads_ids and policy.geometry.vocab <= judge.geometry.vocab
    prompt = judge_prompt(judge, judge_tokenizer, config.judge, None if reads_ids else tokenizer)

    def with_system(query: Query) -> Query:
        return replace(query, messages=with_system_prompt(query.messages, system_prompt))

    def check(query: Query) -> None:
        prompts.check(with_system(query))
        prompt.check_query(with_system(query), rollout.max_response_tokens)

    train, held_out = (
        read_queries(
            *(paths, config.data.format, config.data.polarity),
            fields=config.data.fields,
            on_bad_row=config.data.on_bad_row,
            require_rubric=prompt.needs_rubric or (gold is not None and paths is config.eval.data),
            check=check,
            # a reward model takes notice of answers only where all rows have one
            criterion=config.verifier.criterion if prompt.needs_rubric or config.data.format == "verifiable" else None,
        )
        for paths in (config.data.train, config.eval.data)
    )
    train, held_out = ([with_system(query) for query in queries] for queries in (train, held_out))
    _check_ids(train, held_out)
    epoch_batch(len(train), config.rollout.prompts_per_step, 0, config.seed, config.data.shuffle)  # enough queries?
    prompts.add([*held_out, *train])
    check_judge_positions(judge, config.judge, ((q, rollout.max_response_tokens) for q in [*held_out, *train]))
    if gold is not None:
        gold.check(held_out, rollout.max_response_tokens)
    verifier = verifier_for(config.verifier, [*train, *held_out])
    return Inputs(
        **vars(of_policy),
        judge=judge,
        prompt=prompt,
        train=train,
        eval=held_out,
        gold=gold,
        verifier=verifier,
    )


def verifier_for(config: VerifierConfig, queries: Sequence[Query]) -> Verifier | None:
    """What decides on the rows with an answer, None if there are none. Raises ``UserError`` for answers that cannot work."""
    if not any(query.answer is not None for query in queries):
        if config != VerifierConfig():
            warn("verifier: its options have no effect; no row has an answer")
        return None
    verifier = Verifier(config)
    for query in queries:
        verifier.check(query)
    return verifier


def verified_by_all(verifier: Verifier, queries: Sequence[Query], texts: Sequence[str]) -> list[bool | None]:
    """Whether each response is right, None for a row without an answer. Every rank does its share and gets all (collective)."""
    share = range(dist.get_rank(), len(queries), dist.get_world_size())
    found = union({i: verifier.right(queries[i], texts[i]) for i in share if queries[i].answer is not None})
    return [found.get(i) for i in range(len(queries))]


@dataclass
class VerdictJudge:
    """A judge that only scores: its model, and how it is asked. ``option``: where its options are ("judge", "eval.judge")."""

    option: str
    config: JudgeConfig
    hf: HFModel
    prompt: JudgePrompt

    def check(self, queries: list[Query], response_tokens: int) -> None:
        """Raise ``UserError`` for a judge input that is too long, with responses of so many of the judge's tokens."""
        for query in queries:
            self.prompt.check_query(query, response_tokens)
        check_judge_positions(self.hf, self.config, ((query, response_tokens) for query in queries))

    def load(self) -> JudgeStage:
        """Its weights on the ranks of this world (collective)."""
        return build_judge_stage(self.config, self.hf, self.prompt)


class GoldJudge:
    """A judge that only scores held-out responses. Its weights are in host memory but while it does."""

    def __init__(self, judge: VerdictJudge):
        """Load it (collective)."""
        self._stage = judge.load()
        self._weights = HostWeights(self._stage.judge.model)

    def judge(self, queries: Sequence[Query], texts: Sequence[str]) -> list[JudgementRow]:
        """As ``judge_texts``."""
        self._weights.load()
        rows = judge_texts(self._stage, queries, texts)
        self._weights.release()
        return rows


def judge_texts(stage: JudgeStage, queries: Sequence[Query], texts: Sequence[str]) -> list[JudgementRow]:
    """The verdicts on a response to each of ``queries`` (collective). The judge's own tokenizer reads ``texts``."""
    inputs = stage.inputs(queries, [encode_text(stage.prompt.tokenizer, text) for text in texts])
    return list(stage.verdicts(inputs, [""] * len(inputs), attributed=False))


def read_verdict_judge(section: VerdictJudgeConfig, option: str) -> VerdictJudge:
    """Read and check config and tokenizer of a judge that only scores. Raises ``UserError``."""
    assert section.model is not None
    config, hf = without_credit(section), open_hf_model(section.model, f"{option}.model")
    if hf.geometry.is_reward_model:
        raise UserError(f"{option}.model", "a reward model has no verdicts", "give a language model as the judge")
    check_model(option, hf, config.layout, config.precision, config.spec)
    prompt = judge_prompt(hf, load_model_tokenizer(hf), config)
    assert isinstance(prompt, JudgePrompt)
    return VerdictJudge(option, config, hf, prompt)


def _check_ids(train: list[Query], held_out: list[Query]) -> None:
    """An id stands for one prompt: what is sampled, and with which random numbers, goes by it."""
    messages = {query.id: query.messages for query in train}
    for query in held_out:
        if messages.get(query.id, query.messages) != query.messages:
            problem = f"id {query.id!r} has another prompt than in data.train"
            raise UserError("eval.data", problem, "give every prompt an id of its own")


def build_workers(config: TrainConfig, inputs: Inputs, own_ranks: OwnRanks | None = None) -> Workers:
    """Load the models of the policy's ranks (collective over them). ``own_ranks``: the judge, if it has ranks of its own.

    Self-judging on the policy's ranks: one frozen copy serves judge and KL reference.
    """
    policy_groups = build_groups("policy", config.policy.layout)
    judge: SharedRanks | OwnRanks | None = own_ranks
    judge_model = host_weights = None
    if own_ranks is None:
        same_layout = config.judge.layout == config.policy.layout
        stage = build_judge(config, inputs, policy_groups if same_layout else None)
        judge, judge_model = SharedRanks(stage, config.grpo), stage.judge.model
        host_weights = HostWeights(judge_model) if config.judge.offload else None
    reference = None
    if config.grpo.kl_coef > 0:
        # log-probs have no context parallelism
        shared = judge_model if config.judge.model is None and config.judge.layout.cp == 1 else None
        reference = shared or _frozen_policy(config, inputs, policy_groups)
    p = config.policy
    policy = build_model("policy", inputs.policy, policy_groups, p.precision, p.recompute, p.spec)
    trainer = PolicyTrainer(policy, config)
    engine = build_engine(config, trainer, inputs.stop_ids)
    gold = GoldJudge(inputs.gold) if inputs.gold is not None and inputs.eval else None
    dist.barrier()
    if own_ranks is not None:
        own_ranks.wait_until_ready()
    return Workers(trainer, engine, judge, reference, host_weights, gold)


def build_engine(config: TrainConfig, trainer: PolicyTrainer, stop_ids: set[int]) -> RolloutEngine:
    """The engine that samples with the trained policy (collective), or the one that replays what was sampled."""
    if config.rollout.replay:
        return ReplayEngine(Path(config.rollout.replay), trainer.model.geometry.vocab)
    dtype = config.policy.precision.dtype
    return start_engine(trainer.model, config.rollout, dtype, stop_ids, trainer.budget, config.timeout_minutes)


def start_engine(
    model: MegatronModel,
    rollout: RolloutConfig,
    dtype: str,
    stop_ids: set[int],
    budget: int,
    timeout_minutes: float = 30.0,
) -> RolloutEngine:
    """The engine that samples (collective); a vLLM engine has shown that every weight of the policy reaches it.

    ``dtype``: of the policy; ``budget``: tokens of a row that the policy itself runs; ``timeout_minutes``: for an answer
    of a vLLM server.
    """
    if rollout.engine == "megatron":
        return MegatronRolloutEngine(model, rollout, stop_ids)
    from g2r_megatron.rollout.vllm.canary import check_weights_arrive
    from g2r_megatron.rollout.vllm.engine import VLLMRolloutEngine
    from g2r_megatron.rollout.vllm.servers import VLLMServersEngine

    def log_probs(ids: list[list[int]]) -> list[torch.Tensor]:
        sequences = [TokenSequence(sequence[:1], sequence[1:]) for sequence in ids]
        plan = plan_micro_batches(model, sequences, list(range(len(sequences))), budget)
        return response_log_probs(model, sequences, plan, temperature=1.0, budget=budget)

    engine: VLLMRolloutEngine | VLLMServersEngine
    if rollout.vllm.mode == "servers":
        engine = VLLMServersEngine(model, rollout, stop_ids, timeout_minutes)
    else:
        engine = VLLMRolloutEngine(model, rollout, stop_ids, dtype)
    check_weights_arrive(engine, log_probs)
    return engine


def build_judge(config: TrainConfig, inputs: Inputs, groups: ModelGroups | None = None) -> JudgeStage:
    """Load the judge on this world's ranks (collective). ``groups``: of its layout, if there are any yet."""
    return build_judge_stage(config.judge, inputs.judge, inputs.prompt, groups)


def build_judge_stage(
    c: JudgeConfig, hf: HFModel, prompt: JudgePrompt | RewardPrompt, groups: ModelGroups | None = None
) -> JudgeStage:
    """The judge ``hf`` with its weights (collective). ``groups``: of its layout, if there are any yet."""
    groups = groups or build_groups("judge", c.layout)
    model = build_model("judge", hf, groups, c.precision, c.recompute, c.spec)
    return JudgeStage(FrozenJudge(model, c, prompt.true_ids, prompt.false_ids, prompt.null_id), prompt, c)


def _frozen_policy(config: TrainConfig, inputs: Inputs, groups) -> MegatronModel:
    p = config.policy
    model = build_model("policy", inputs.policy, groups, p.precision, "none", p.spec)
    model.freeze()
    return model
