"""A check, before any work, that the servers of ``rollout.vllm.urls`` answer and that the policy can sample on them."""

import os
from typing import Any

import httpx

from g2r_megatron.config.options import RolloutConfig
from g2r_megatron.errors import UserError, warn
from g2r_megatron.model.hf import HFModel
from g2r_megatron.rollout.vllm.environment import EXPERT_MULTIPLE, TESTED, logprobs_mode, vllm_dtype
from g2r_megatron.rollout.vllm.server import GENERATE, described, message_of
from g2r_megatron.rollout.vllm.transfer import PROTOCOL

OPTION, START = "rollout.vllm.urls", "start it with tools/vllm_server.sh (docs/rollouts.md)"
PATIENCE = 60.0  # seconds for an answer
# Fields of config.json that decide what a model computes; both sides read them with transformers.
SAME = (
    *("model_type", "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"),
    *("num_key_value_heads", "head_dim", "rms_norm_eps", "tie_word_embeddings", "attention_bias", "sliding_window"),
    *("num_experts", "num_experts_per_tok", "moe_intermediate_size", "norm_topk_prob"),
)


def check_servers(policy: HFModel, rollout: RolloutConfig, dtype: str, judge_ranks: int = 0) -> None:
    """Raise ``UserError`` naming a server that this rank will speak to and that is not there, or cannot sample for ``policy``.

    The job's last ``judge_ranks`` use no server. Nothing to do for another engine or mode, or a replay.
    """
    if rollout.engine != "vllm" or rollout.vllm.mode != "servers" or rollout.replay:
        return
    rank, ranks = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1)) - judge_ranks
    for url in rollout.vllm.urls[rank::ranks] if rank < ranks else []:
        with httpx.Client(base_url=url, timeout=PATIENCE, trust_env=False) as http:
            description = _description(http, url)
            _check_model(url, description, policy)
            _check_settings(url, description, policy, rollout, dtype)
            if _post(http, url, GENERATE, {}).status_code in (httpx.codes.FORBIDDEN, httpx.codes.NOT_FOUND):
                raise UserError(OPTION, f"{url} does not take token ids ({GENERATE})", f"{START}: --enable-scale-out")
    if rollout.vllm.behind_proxy:
        warn(
            f"{OPTION}: whoever reaches a server can replace its weights and call its workers, whatever its --api-key; you say "
            "that a proxy stands before each (rollout.vllm.behind_proxy), which must let in the ranks of this job alone"
        )


def _post(http: httpx.Client, url: str, path: str, body: dict) -> httpx.Response:
    try:
        return http.post(path, json=body)
    except (httpx.TransportError, httpx.InvalidURL) as error:
        said = described(error)
        raise UserError(
            OPTION, f"no vLLM server answers at {url} ({said})", "start the servers before the training"
        ) from error


def _description(http: httpx.Client, url: str) -> dict[str, Any]:
    """The answer of the server's workers to ``g2r_describe``."""
    response = _post(http, url, "/collective_rpc", {"method": "g2r_describe"})
    if response.status_code == httpx.codes.NOT_FOUND:
        raise UserError(OPTION, f"{url} has no /collective_rpc", f"{START}: VLLM_SERVER_DEV_MODE=1")
    if not response.is_success:
        said = message_of(response)
        raise UserError(
            OPTION, f"{url} has no workers that take our weights: {said}", f"{START}: --worker-extension-cls"
        )
    description = response.json()["results"][0]
    if description["protocol"] != PROTOCOL:
        found = f"{url} runs another version of g2r_megatron (protocol {description['protocol']}, here {PROTOCOL})"
        raise UserError(OPTION, found, "start it with the version that trains")
    if not description["vllm"].startswith(TESTED):
        warn(
            f"{url}: vLLM {description['vllm']}; tested with {TESTED}x; how weights are replaced depends on the version"
        )
    return description


def _check_model(url: str, description: dict[str, Any], policy: HFModel) -> None:
    ours, theirs = policy.config.to_dict(), description["config"]
    fields = [(name, ours.get(name), theirs.get(name)) for name in SAME if name in ours]
    their_rope = theirs.get("rope_parameters") or {}
    fields += [(f"rope_parameters.{k}", v, their_rope.get(k)) for k, v in (ours.get("rope_parameters") or {}).items()]
    for name, our, their in fields:
        if our != their:
            found = (
                f"{url} serves another model, {description['model']}: {name} is {their} there, {our} in {policy.path}"
            )
            raise UserError(OPTION, found, "start it with the directory of policy.model")


def _check_settings(url: str, description: dict[str, Any], policy: HFModel, rollout: RolloutConfig, dtype: str) -> None:
    wanted = {
        "dtype": (vllm_dtype(dtype), f"--dtype {vllm_dtype(dtype)}"),
        "logprobs_mode": (logprobs_mode(rollout), f"--logprobs-mode {logprobs_mode(rollout)}"),
        "quantization": (None, "a model and options without quantization"),
        "data_parallel_size": (1, "no --data-parallel-size: each replica is a server of its own"),
    }
    for name, (value, remedy) in wanted.items():
        if description[name] != value:
            raise UserError(OPTION, f"{url} runs with {name} {description[name]}", f"start it with {remedy}")
    length = rollout.max_prompt_tokens + rollout.max_response_tokens
    if description["max_model_len"] < length:
        found = f"{url} takes sequences of {description['max_model_len']} tokens at most"
        raise UserError(OPTION, found, f"start it with --max-model-len {length}, or more")
    if description["device"] == "cpu" and policy.geometry.expert_ffn % EXPERT_MULTIPLE:
        found = f"{url} runs on a CPU, with experts of width {policy.geometry.expert_ffn}"
        raise UserError(
            OPTION, found, f"vLLM can replace weights of experts on a CPU only of multiples of {EXPERT_MULTIPLE}"
        )
