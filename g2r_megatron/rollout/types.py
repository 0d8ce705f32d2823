"""The interface of a rollout engine: what it is asked for, and what it returns."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol


@dataclass
class Request:
    """One response to sample. ``key`` seeds its random numbers: same key, same prompt, same weights, same response."""

    prompt_ids: list[int]
    key: str


@dataclass
class Response:
    """One sampled response. ``token_ids`` ends with the stop token when ``finished``."""

    prompt_ids: list[int]
    token_ids: list[int]
    finished: bool  # ended with a stop token, not cut at max_response_tokens
    text: str  # the body, decoded

    @property
    def body_ids(self) -> list[int]:
        """The tokens the judge reads: without the stop token."""
        return self.token_ids[:-1] if self.finished else self.token_ids


class RolloutEngine(Protocol):
    """Samples responses with the policy's current weights."""

    def generate(
        self,
        requests: Sequence[Request],
        temperature: float | None = None,
        on_progress: Callable[[int], None] = ...,
        between_batches: Callable[[], None] = ...,
    ) -> list[tuple[list[int], bool]]:
        """(token ids with the stop token, finished) of every request, in order, on every rank of the policy (collective).

        ``temperature`` overrides the config's (0: greedy). ``on_progress`` is called with the number of finished
        sequences of this rank, ``between_batches`` at the same times on every rank; it may raise.
        """
        ...
