"""The requests to vLLM, in the process or over HTTP: the fields of its ``SamplingParams``."""

import hashlib
from typing import Any

from g2r_megatron.config.options import RolloutConfig

LARGEST_SEED = 2**31 - 1
# The log-probs of a sequence that is sent as a prompt.
SCORING = dict(n=1, max_tokens=1, temperature=0.0, prompt_logprobs=0, detokenize=False, ignore_eos=True)


def sampling_fields(config: RolloutConfig, stop_ids: set[int], key: str, temperature: float) -> dict[str, Any]:
    """Every field that decides a token, so that no default of vLLM or the model is used."""
    return dict(
        n=1,
        max_tokens=config.max_response_tokens,
        min_tokens=0,
        temperature=temperature,
        top_p=config.top_p,
        top_k=config.top_k,
        min_p=0.0,
        presence_penalty=0.0,
        frequency_penalty=0.0,
        repetition_penalty=1.0,
        seed=seed_of(key),
        stop_token_ids=sorted(stop_ids),
        ignore_eos=True,  # the stop tokens are all given
        logprobs=0,  # of the sampled token alone
        detokenize=False,
    )


def seed_of(key: str) -> int:
    """The seed of a request's random numbers, from its key alone."""
    return int.from_bytes(hashlib.sha256(key.encode()).digest()[:8], "big") % LARGEST_SEED
