"""Which sequences a replica decodes together. Nothing here knows a tensor of the model."""

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass

from g2r_megatron.config.options import RolloutConfig
from g2r_megatron.parallel.microbatches import padded
from g2r_megatron.rollout.sampling import uniforms
from g2r_megatron.rollout.types import Request, Sampled

REFILL_SHARE = 8  # new sequences come in when 1 of 8 rows is free: a pass over fewer prompts costs more than it saves


@dataclass
class Row:
    """A row of the cache and the sequence in it. A row that is done gets its last token again, and nothing reads the result."""

    number: int | None  # of its request; None: the row only fills the batch
    ids: list[int]  # prompt and response so far
    start: int  # tokens of the prompt
    u: list[float]  # a random number for each token of the response
    done: bool


class Batch:
    """The rows of a replica, and the requests that wait for one.

    A row's next token is drawn from what its last token, at the row's own position, makes of the cache; so the last token
    of a prompt is fed once more, in the first step after the pass over it.
    """

    def __init__(
        self, requests: Sequence[Request], share: list[int], config: RolloutConfig, stop_ids: set[int], multiple: int
    ):
        """``share``: the numbers of this replica's requests, shortest prompt first; none: rows that only fill.

        ``multiple``: rows come in multiples of it.
        """
        self.requests, self.stop_ids, self.multiple = requests, stop_ids, multiple
        self.limit, self.waiting = config.max_response_tokens, deque(share)
        self.begun, self.results = 0, dict[int, Sampled]()
        count = padded(min(config.batch_size, max(len(share), 1)), multiple)
        self.rows = [Row(None, list(requests[0].prompt_ids), len(requests[0].prompt_ids), [], True)] * count
        self.refill_size = padded(max(1, count // REFILL_SHARE), multiple)

    @property
    def longest(self) -> int:
        """Positions that a cache needs."""
        return max(len(self.requests[i].prompt_ids) for i in [0, *self.waiting]) + self.limit

    @property
    def is_active(self) -> bool:
        """Whether any row is not done."""
        return not all(row.done for row in self.rows)

    @property
    def _coming(self) -> int:
        """How many requests a refill would begin now."""
        size = self.refill_size if self.begun else len(self.rows)
        return min(sum(row.done for row in self.rows), len(self.waiting), size)

    @property
    def wants_refill(self) -> bool:
        return self._coming > 0 and (not self.begun or self._coming == min(self.refill_size, len(self.waiting)))

    @property
    def begun_after_refill(self) -> int:
        return self.begun + self._coming * self.wants_refill

    def refill(self) -> tuple[list[int], list[int], list[list[int]]]:
        """Begin requests that wait, in rows that are done: (these rows, the prompt of each by its number, the prompts).

        A prompt that several of the rows begin with is there once. The number of prompts, some of them filling, is a power
        of two, or as many as there could be: all rows at first, then ``refill_size``.
        """
        size = self.refill_size if self.begun else len(self.rows)
        free = [i for i, row in enumerate(self.rows) if row.done][: self._coming]
        numbers: dict[tuple[int, ...], int] = {}
        sources = []
        for i in free:
            number = self.waiting.popleft()
            request = self.requests[number]
            u = uniforms(request.key, self.limit).tolist()
            self.rows[i] = Row(number, list(request.prompt_ids), len(request.prompt_ids), u, done=False)
            sources.append(numbers.setdefault(tuple(request.prompt_ids), len(numbers)))
        self.begun += len(free)
        prompts = [list(prompt) for prompt in numbers] or [self.requests[0].prompt_ids]
        count = min(padded(1 << (len(prompts) - 1).bit_length(), self.multiple), size)
        return free, sources, prompts + [prompts[-1]] * (count - len(prompts))

    def shrink(self) -> list[int] | None:
        """The rows to go on with, half of them, when no request waits and no more are needed; else None."""
        half, active = len(self.rows) // 2, [i for i, row in enumerate(self.rows) if not row.done]
        if self.waiting or len(active) > half or half == 0 or half % self.multiple:
            return None
        kept = sorted((active + [i for i, row in enumerate(self.rows) if row.done])[:half])
        self.rows = [self.rows[i] for i in kept]
        return kept

    @property
    def positions(self) -> list[int]:
        """The position of each row's last token."""
        return [len(row.ids) - 1 for row in self.rows]

    @property
    def last_tokens(self) -> list[int]:
        return [row.ids[-1] for row in self.rows]

    @property
    def uniforms(self) -> list[float]:
        """The random number of each row's next token."""
        return [0.0 if row.done else row.u[len(row.ids) - row.start] for row in self.rows]

    def add(self, tokens: list[int]) -> None:
        """Append a token to each row. A sequence that ends with its token goes into ``results``."""
        for row, token in zip(self.rows, tokens, strict=True):
            if row.done:
                continue
            row.ids.append(token)
            finished = token in self.stop_ids
            row.done = finished or len(row.ids) - row.start == self.limit
            if row.done and row.number is not None:
                self.results[row.number] = Sampled(row.ids[row.start :], finished)
