"""Everything a training run is made of, built from its config in the order that finds mistakes first."""

from dataclasses import dataclass

import torch.distributed as dist
from transformers import PreTrainedTokenizerFast

from g2r_megatron.config import TrainConfig
from g2r_megatron.data.order import epoch_batch
from g2r_megatron.data.readers import read_queries
from g2r_megatron.data.tokenizer import render_prompt, stop_token_ids
from g2r_megatron.data.types import Query
from g2r_megatron.errors import UserError
from g2r_megatron.judge.frozen import FrozenJudge
from g2r_megatron.judge.prompt import JudgePrompt
from g2r_megatron.judge.stage import JudgeStage
from g2r_megatron.model.build import MegatronModel, build_model, check_model
from g2r_megatron.model.hf import HFModel, load_model_tokenizer, open_hf_model
from g2r_megatron.parallel.groups import build_groups, initialize
from g2r_megatron.policy.trainer import PolicyTrainer
from g2r_megatron.rollout.engine import MegatronRolloutEngine


@dataclass
class Inputs:
    """What is read before any process group or weight exists."""

    policy: HFModel
    judge: HFModel
    tokenizer: PreTrainedTokenizerFast
    prompt: JudgePrompt
    stop_ids: set[int]
    train: list[Query]
    eval: list[Query]
    prompt_ids: dict[str, list[int]]  # by query id


@dataclass
class Workers:
    """The models of a run at work. ``reference`` is the frozen initial policy, or None when no KL is asked for."""

    trainer: PolicyTrainer
    engine: MegatronRolloutEngine
    judge: JudgeStage
    reference: MegatronModel | None


def read_inputs(config: TrainConfig) -> Inputs:
    """Read and check models' configs, tokenizers and data. Raises ``UserError``; writes nothing."""
    policy = open_hf_model(config.policy.model, "policy.model")
    judge = policy if config.judge.model is None else open_hf_model(config.judge.model, "judge.model")
    check_model("policy", policy, config.policy.layout, config.policy.precision, config.policy.spec)
    check_model("judge", judge, config.judge.layout, config.judge.precision, config.judge.spec)
    tokenizer = load_model_tokenizer(policy)
    judge_tokenizer = tokenizer if judge is policy else load_model_tokenizer(judge)
    # a judge that has every token of the policy, under the same id, reads its ids; any other one reads its text
    reads_ids = tokenizer.get_vocab().items() <= judge_tokenizer.get_vocab().items()
    reads_ids = reads_ids and policy.geometry.vocab <= judge.geometry.vocab
    prompt = JudgePrompt(judge_tokenizer, config.judge, None if reads_ids else tokenizer)
    stop_ids = stop_token_ids(tokenizer, config.rollout.stop)
    train = read_queries(config.data.train, config.data.format, config.data.polarity)
    held_out = read_queries(config.data.eval, config.data.format, config.data.polarity)
    _check_ids(train, held_out)
    epoch_batch(len(train), config.rollout.prompts_per_step, 0, config.seed, config.data.shuffle)  # enough queries?
    prompt_ids = {query.id: _prompt_ids(config, tokenizer, query) for query in [*held_out, *train]}
    return Inputs(policy, judge, tokenizer, prompt, stop_ids, train, held_out, prompt_ids)


def _check_ids(train: list[Query], held_out: list[Query]) -> None:
    """An id stands for one prompt: what is sampled, and with which random numbers, goes by it."""
    messages = {query.id: query.messages for query in train}
    for query in held_out:
        if messages.get(query.id, query.messages) != query.messages:
            problem = f"id {query.id!r} has another prompt than in data.train"
            raise UserError("data.eval", problem, "give every prompt an id of its own")


def _prompt_ids(config: TrainConfig, tokenizer, query: Query) -> list[int]:
    where = f"query {query.id!r}"
    ids = render_prompt(tokenizer, query.messages, config.rollout.chat_template, where)
    if len(ids) > config.rollout.max_prompt_tokens:
        raise UserError(
            "rollout.max_prompt_tokens",
            f"{where} has {len(ids)} prompt tokens, more than {config.rollout.max_prompt_tokens}",
            "raise it or leave the query out",
        )
    return ids


def build_workers(config: TrainConfig, inputs: Inputs) -> Workers:
    """Join the world and load the models (collective). Self-judging: one frozen copy serves judge and KL reference."""
    initialize(config.seed, config.timeout_minutes)
    policy_groups = build_groups("policy", config.policy.layout)
    same_layout = config.judge.layout == config.policy.layout
    judge_groups = policy_groups if same_layout else build_groups("judge", config.judge.layout)
    c = config.judge
    judge_model = build_model("judge", inputs.judge, judge_groups, c.precision, c.recompute, c.spec)
    judge = FrozenJudge(judge_model, c, inputs.prompt.true_ids, inputs.prompt.false_ids)
    reference = None
    if config.grpo.kl_coef > 0:
        reference = judge_model if config.judge.model is None else _frozen_policy(config, inputs, policy_groups)
    p = config.policy
    policy = build_model("policy", inputs.policy, policy_groups, p.precision, p.recompute, p.spec)
    trainer = PolicyTrainer(policy, config)
    engine = MegatronRolloutEngine(policy, config.rollout, inputs.stop_ids)
    dist.barrier()
    return Workers(trainer, engine, JudgeStage(judge, inputs.prompt, c), reference)


def _frozen_policy(config: TrainConfig, inputs: Inputs, groups) -> MegatronModel:
    p = config.policy
    model = build_model("policy", inputs.policy, groups, p.precision, "none", p.spec)
    model.freeze()
    return model
