"""The interface of a rollout engine: its requests and its results."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol


@dataclass
class Request:
    """One response to sample. ``key`` seeds its random numbers: same key, same prompt, same weights, same response.

    ``batch``: of a training, the name of what it belongs to (recording.py), by which a replay finds it.
    """

    prompt_ids: list[int]
    key: str
    batch: str = ""


def by_length(requests: Sequence[Request]) -> list[int]:
    """Numbers of the requests, shortest prompt first: every n-th of them is a fair share."""
    return sorted(range(len(requests)), key=lambda i: (len(requests[i].prompt_ids), i))


class Sampled(NamedTuple):
    """What an engine returns for a request. ``token_ids`` ends with the stop token when ``finished``.

    ``log_probs``: of the sampled tokens as the sampler saw them, [T] at the sampling temperature, without top-k and top-p;
    None where the sampler is the trainer's own model.
    """

    token_ids: list[int]
    finished: bool
    log_probs: list[float] | None = None


@dataclass
class Response:
    """One sampled response. ``token_ids`` ends with the stop token when ``finished``.

    A response of a thinking policy is a thought, whose closing mark belongs to it, and an answer. A thought without a
    closing mark leaves an empty answer.
    """

    prompt_ids: list[int]
    token_ids: list[int]
    finished: bool  # whether it ended with a stop token; if not, it was cut at max_response_tokens
    text: str  # the answer, decoded
    thought: int = 0  # tokens
    closed: bool = True  # no thought, or one with its closing mark
    log_probs: list[float] | None = None  # as in ``Sampled``

    @property
    def body_ids(self) -> list[int]:
        """The tokens of thought and answer, without the stop token."""
        return self.token_ids[:-1] if self.finished else self.token_ids

    @property
    def answer_ids(self) -> list[int]:
        """The tokens that the judge reads: without thought and stop token."""
        return self.body_ids[self.thought :]

    @property
    def answered(self) -> bool:
        """Whether there is an answer that has come to its end."""
        return self.finished and self.closed


class RolloutEngine(Protocol):
    """Samples responses with the policy's weights as of the last ``take_weights``."""

    def rest(self) -> None:
        """Free the memory of weights and caches until the next ``take_weights``. Nothing is sampled until then."""
        ...

    def take_weights(self) -> None:
        """Use the policy's weights as they are now (collective). It is called at the start and after every update."""
        ...

    def generate(
        self,
        requests: Sequence[Request],
        temperature: float | None = None,
        on_progress: Callable[[int], None] = ...,
        between_batches: Callable[[], None] = ...,
    ) -> list[Sampled]:
        """What was sampled for every request, in order, on every rank of the policy (collective).

        ``temperature`` overrides the config's (0: greedy). ``on_progress`` is called with the number of finished
        sequences of this rank, ``between_batches`` at the same times on every rank; it may raise.
        """
        ...
