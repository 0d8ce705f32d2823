"""Responses of a policy that is not trained: its newest weights, and an engine that samples with them and then goes."""

import gc
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
import yaml

from g2r_megatron.config.command_options import SampledPolicyConfig
from g2r_megatron.config.options import RolloutConfig
from g2r_megatron.data.types import Query
from g2r_megatron.errors import UserError
from g2r_megatron.experience import respond
from g2r_megatron.model.build import build_model
from g2r_megatron.parallel import groups
from g2r_megatron.policy.checkpoint import complete_checkpoints
from g2r_megatron.rollout.types import Response
from g2r_megatron.run import CONFIG_FILE
from g2r_megatron.workers import PolicyInputs, start_engine

# vLLM takes the next prompt as soon as one is finished: calls of many batches keep it busy. Between calls answers are kept.
VLLM_BATCHES = 8
ENGINE_CHECK_TOKENS = 8192  # of a row in which the policy runs what a vLLM engine is compared on


def run_options(model: str) -> dict | None:
    """The options of the training run whose directory ``model`` is; None for the directory of a model."""
    run = Path(model)
    if not (run / CONFIG_FILE).is_file() or (run / "config.json").is_file():
        return None
    trained = yaml.safe_load((run / CONFIG_FILE).read_text(encoding="utf-8"))
    if not isinstance(trained, dict) or not {"judge", "policy"} <= trained.keys():
        raise UserError("policy.model", f"{run / CONFIG_FILE} is not of a g2r train run", "give a model directory")
    return trained


def newest_weights(model: str) -> str:
    """``model``, or of a training run its newest checkpoint, or its export where no checkpoint is left."""
    if run_options(model) is None:
        return model
    run = Path(model)
    checkpoints = complete_checkpoints(run / "checkpoints")
    found = checkpoints[-1][1] if checkpoints else run / "hf"
    if not found.is_dir():
        raise UserError(
            "policy.model", f"{run} has no checkpoint yet", "let the run save one, or give a model directory"
        )
    return str(found)


def sampled(
    section: SampledPolicyConfig,
    rollout: RolloutConfig,
    policy: PolicyInputs,
    asked: Sequence[tuple[Query, str]],
    temperature: float | None = None,
) -> Iterator[tuple[list[int], list[Response]]]:
    """A response to each of ``asked``: queries and the keys that seed them (collective).

    Yields (places in ``asked``, their responses) after every batch, prompts of near lengths together. Nothing of the policy
    is left in memory at the end. ``temperature``: None is ``rollout.temperature``.
    """
    if not asked:
        return
    layout = groups.build_groups("policy", section.layout)
    model = build_model("policy", policy.policy, layout, section.precision, "none", section.spec)
    model.freeze()
    engine = start_engine(model, rollout, section.precision.dtype, policy.stop_ids, ENGINE_CHECK_TOKENS)
    engine.take_weights()
    order = sorted(range(len(asked)), key=lambda place: len(policy.prompt_ids[asked[place][0].id]))
    chunk = rollout.batch_size * layout.dp_size * (VLLM_BATCHES if rollout.engine == "vllm" else 1)
    for first in range(0, len(order), chunk):
        places = order[first : first + chunk]
        queries = [asked[place][0] for place in places]
        yield places, respond(engine, policy, queries, [asked[place][1] for place in places], temperature)
    engine.rest()
    del engine, model  # the judge takes their place
    gc.collect()
    torch.cuda.empty_cache()
