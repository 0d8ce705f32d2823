"""A vLLM engine in every rank of the policy. It gets the policy's weights after every update."""

from collections.abc import Callable, Sequence

import torch
import torch.distributed as dist

from g2r_megatron.config.options import RolloutConfig
from g2r_megatron.errors import RunError
from g2r_megatron.model.build import MegatronModel
from g2r_megatron.parallel.agreement import union
from g2r_megatron.rollout.types import Request, Sampled, by_length
from g2r_megatron.rollout.vllm.environment import alone, engine_options, set_environment, single_groups
from g2r_megatron.rollout.vllm.requests import SCORING, sampling_fields
from g2r_megatron.rollout.vllm.weights import all_buckets

# When an engine is deleted, vLLM ends torch.distributed for the whole process. So engines are kept until the process ends.
STARTED: list = []
RECEIVER = "g2r_megatron.rollout.vllm.receiver.WeightReceiver"


class VLLMRolloutEngine:
    """Samples responses with vLLM: each rank those of its share of the prompts (collective over the world).

    The engine is not parallel itself: every rank holds the whole model a second time. It runs in the rank's own process, so
    it always ends with the rank.
    """

    def __init__(self, model: MegatronModel, config: RolloutConfig, stop_ids: set[int], dtype: str):
        """Start the engine (collective). ``model``: the policy; ``dtype``: its ``policy.precision.dtype``."""
        self.model, self.config, self.stop_ids = model, config, stop_ids
        self.version = 0  # how often the engine's weights have been replaced
        own = single_groups()[dist.get_rank()]
        set_environment()
        from vllm import LLM

        with alone(own):
            self._llm = LLM(**engine_options(model.hf, config, dtype), worker_extension_cls=RECEIVER)
        STARTED.append(self._llm)

    def rest(self) -> None:
        """Free weights and cache; ``take_weights`` loads them again. On a CPU vLLM keeps the memory that it has allocated."""
        self._llm.sleep(level=2)

    @torch.no_grad()
    def take_weights(self) -> None:
        """Put the policy's weights into the engine, and forget what it has cached of prompts (collective).

        Raises ``RunError`` naming a tensor that did not come through as it was sent, or was not sent.
        """
        resting = self._llm.llm_engine.is_sleeping()
        if resting:
            self._llm.wake_up(tags=["weights"])
        self._llm.collective_rpc("g2r_start")
        for bucket in all_buckets(self.model):
            self._llm.collective_rpc("g2r_load", args=(bucket,))
        self._llm.collective_rpc("g2r_finish")
        if not self._llm.reset_prefix_cache():
            raise RunError("weight synchronisation: vLLM did not reset its prefix cache")
        if resting:  # the cache last: on a GPU the buckets above need memory too
            self._llm.wake_up(tags=["kv_cache"])
        self.version += 1

    @torch.no_grad()
    def generate(
        self,
        requests: Sequence[Request],
        temperature: float | None = None,
        on_progress: Callable[[int], None] = lambda n: None,
        between_batches: Callable[[], None] = lambda: None,
    ) -> list[Sampled]:
        """What was sampled for every request, in order, on every rank, with the log-probs of the sampled tokens.

        Prompts are shared out over the ranks by their lengths. ``between_batches`` is called once, before sampling.
        """
        between_batches()
        temperature = self.config.temperature if temperature is None else temperature
        share = by_length(requests)[dist.get_rank() :: dist.get_world_size()]
        prompts = [{"prompt_token_ids": requests[i].prompt_ids} for i in share]
        sampling = [self._sampling(requests[i].key, temperature) for i in share]
        outputs = self._llm.generate(prompts, sampling, use_tqdm=False) if share else []
        mine = {i: _sampled(output.outputs[0]) for i, output in zip(share, outputs, strict=True)}
        on_progress(len(mine))
        merged = union(mine)
        return [merged[i] for i in range(len(requests))]

    def _sampling(self, key: str, temperature: float):
        from vllm import SamplingParams

        return SamplingParams(**sampling_fields(self.config, self.stop_ids, key, temperature))

    def log_probs(self, sequences: list[list[int]]) -> dict[str, list[torch.Tensor]]:
        """By this rank's engine, as ``WeightsTaker`` of canary.py says."""
        from vllm import SamplingParams

        prompts = [{"prompt_token_ids": ids} for ids in sequences]
        outputs = self._llm.generate(prompts, SamplingParams(**SCORING), use_tqdm=False)
        found = [
            torch.tensor([found[i].logprob for i, found in zip(ids[1:], output.prompt_logprobs[1:], strict=True)])
            for ids, output in zip(sequences, outputs, strict=True)
        ]
        return {f"the engine of rank {dist.get_rank()}": found}


def _sampled(completion) -> Sampled:
    """vLLM's completion; it ended by a stop token, which is its last, or was cut."""
    ids = list(completion.token_ids)
    log_probs = [found[i].logprob for i, found in zip(ids, completion.logprobs, strict=True)]
    return Sampled(ids, completion.finish_reason == "stop", log_probs)
