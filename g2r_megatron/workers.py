"""Everything a training run is made of, built from its config in the order that finds mistakes first."""

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace

import torch
import torch.distributed as dist
from transformers import PreTrainedTokenizerFast

from g2r_megatron.config.options import TrainConfig
from g2r_megatron.data.chat_template import check_template_options, with_system_prompt
from g2r_megatron.data.order import epoch_batch
from g2r_megatron.data.prompts import Prompts
from g2r_megatron.data.readers import read_queries
from g2r_megatron.data.tokenizer import stop_token_ids
from g2r_megatron.data.types import Query
from g2r_megatron.errors import UserError
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
from g2r_megatron.parallel.groups import ModelGroups, build_groups
from g2r_megatron.policy.log_probs import TokenSequence, response_log_probs
from g2r_megatron.policy.trainer import PolicyTrainer
from g2r_megatron.records.phase_times import PhaseTimes
from g2r_megatron.rollout.megatron import MegatronRolloutEngine
from g2r_megatron.rollout.thoughts import ThoughtEnd, thought_end
from g2r_megatron.rollout.types import RolloutEngine
from g2r_megatron.rollout.vllm.environment import check_engine

POLICY_LENGTH = "rollout.max_prompt_tokens + rollout.max_response_tokens"


@dataclass
class Inputs:
    """What is read before any process group or weight exists."""

    policy: HFModel
    judge: HFModel
    tokenizer: PreTrainedTokenizerFast
    prompt: JudgePrompt | RewardPrompt
    stop_ids: set[int]
    thought_end: ThoughtEnd | None
    train: list[Query]
    eval: list[Query]
    prompt_ids: Prompts  # by query id


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


def read_inputs(config: TrainConfig) -> Inputs:
    """Read and check models' configs, tokenizers and data. Raises ``UserError``; writes nothing."""
    policy = open_hf_model(config.policy.model, "policy.model")
    if policy.geometry.is_reward_model:
        raise UserError(
            "policy.model", f"{config.policy.model} is a reward model ({policy.architecture})", "give a language model"
        )
    judge = policy if config.judge.model is None else open_hf_model(config.judge.model, "judge.model")
    check_model("policy", policy, config.policy.layout, config.policy.precision, config.policy.spec)
    check_model("judge", judge, config.judge.layout, config.judge.precision, config.judge.spec)
    if config.rollout.engine == "vllm" and config.rollout.vllm.mode == "colocated":
        check_engine(policy, config.rollout, config.policy.precision.dtype)
    tokenizer = load_model_tokenizer(policy)
    judge_tokenizer = tokenizer if judge is policy else load_model_tokenizer(judge)
    # a judge that has every token of the policy, under the same id, reads its ids; any other one reads its text
    reads_ids = tokenizer.get_vocab().items() <= judge_tokenizer.get_vocab().items()
    reads_ids = reads_ids and policy.geometry.vocab <= judge.geometry.vocab
    prompt = judge_prompt(judge, judge_tokenizer, config.judge, None if reads_ids else tokenizer)
    rollout = config.rollout
    check_template_options(tokenizer, rollout.template_options, "rollout.template_options", rollout.chat_template)
    stop_ids = stop_token_ids(tokenizer, rollout.stop, rollout.template_options)
    prompts = Prompts(tokenizer, rollout.chat_template, rollout.max_prompt_tokens, rollout.template_options)

    def with_system(query: Query) -> Query:
        return replace(query, messages=with_system_prompt(query.messages, config.data.system_prompt))

    def check(query: Query) -> None:
        prompts.check(with_system(query))
        prompt.check_query(with_system(query), rollout.max_response_tokens)

    train, held_out = (
        read_queries(
            *(paths, config.data.format, config.data.polarity),
            fields=config.data.fields,
            on_bad_row=config.data.on_bad_row,
            require_rubric=prompt.needs_rubric,
            check=check,
        )
        for paths in (config.data.train, config.data.eval)
    )
    train, held_out = ([with_system(query) for query in queries] for queries in (train, held_out))
    _check_ids(train, held_out)
    epoch_batch(len(train), config.rollout.prompts_per_step, 0, config.seed, config.data.shuffle)  # enough queries?
    prompts.add([*held_out, *train])
    policy.check_positions(rollout.max_prompt_tokens + rollout.max_response_tokens, POLICY_LENGTH)
    check_judge_positions(judge, config.judge, ((q, rollout.max_response_tokens) for q in [*held_out, *train]))
    end = thought_end(tokenizer, rollout)
    return Inputs(policy, judge, tokenizer, prompt, stop_ids, end, train, held_out, prompts)


def _check_ids(train: list[Query], held_out: list[Query]) -> None:
    """An id stands for one prompt: what is sampled, and with which random numbers, goes by it."""
    messages = {query.id: query.messages for query in train}
    for query in held_out:
        if messages.get(query.id, query.messages) != query.messages:
            problem = f"id {query.id!r} has another prompt than in data.train"
            raise UserError("data.eval", problem, "give every prompt an id of its own")


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
    dist.barrier()
    if own_ranks is not None:
        own_ranks.wait_until_ready()
    return Workers(trainer, engine, judge, reference, host_weights)


def build_engine(config: TrainConfig, trainer: PolicyTrainer, stop_ids: set[int]) -> RolloutEngine:
    """The engine that samples (collective); a vLLM engine has shown that every weight of the policy reaches it."""
    if config.rollout.engine == "megatron":
        return MegatronRolloutEngine(trainer.model, config.rollout, stop_ids)
    from g2r_megatron.rollout.vllm.canary import check_weights_arrive
    from g2r_megatron.rollout.vllm.engine import VLLMRolloutEngine
    from g2r_megatron.rollout.vllm.servers import VLLMServersEngine

    def log_probs(ids: list[list[int]]) -> list[torch.Tensor]:
        sequences = [TokenSequence(sequence[:1], sequence[1:]) for sequence in ids]
        plan = trainer.plan(sequences, list(range(len(sequences))))
        return response_log_probs(trainer.model, sequences, plan, temperature=1.0, budget=trainer.budget)

    engine: VLLMRolloutEngine | VLLMServersEngine
    if config.rollout.vllm.mode == "servers":
        engine = VLLMServersEngine(trainer.model, config.rollout, stop_ids, config.timeout_minutes)
    else:
        engine = VLLMRolloutEngine(trainer.model, config.rollout, stop_ids, config.policy.precision.dtype)
    check_weights_arrive(engine, log_probs)
    return engine


def build_judge(config: TrainConfig, inputs: Inputs, groups: ModelGroups | None = None) -> JudgeStage:
    """Load the judge on this world's ranks (collective). ``groups``: of its layout, if there are any yet."""
    c = config.judge
    groups = groups or build_groups("judge", c.layout)
    model = build_model("judge", inputs.judge, groups, c.precision, c.recompute, c.spec)
    prompt = inputs.prompt
    return JudgeStage(FrozenJudge(model, c, prompt.true_ids, prompt.false_ids, prompt.null_id), prompt, c)


def _frozen_policy(config: TrainConfig, inputs: Inputs, groups) -> MegatronModel:
    p = config.policy
    model = build_model("policy", inputs.policy, groups, p.precision, "none", p.spec)
    model.freeze()
    return model
