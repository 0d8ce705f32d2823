"""Which queries a training step uses: a pure function of seed and step, so a resumed run needs no saved position."""

import random
from functools import lru_cache
from math import gcd

from g2r_megatron.errors import UserError


def epoch_batch(num_queries: int, batch_size: int, step: int, seed: int, shuffle: bool) -> list[int]:
    """The ``batch_size`` distinct query indices of training step ``step`` (from 0).

    The steps walk through epochs; every epoch holds each of the ``num_queries`` indices once, in an order of its own
    (in file order without ``shuffle``), and a batch may take the end of one epoch and the beginning of the next.
    Raises ``UserError`` when a batch is larger than the data.
    """
    if batch_size > num_queries:
        raise UserError(
            "rollout.prompts_per_step",
            f"{batch_size} prompts a step, but data.train holds {num_queries} queries",
            "lower it or give more queries",
        )
    batch = []
    for position in range(step * batch_size, (step + 1) * batch_size):
        epoch, index = divmod(position, num_queries)
        batch.append(_epoch_order(num_queries, batch_size, epoch, seed)[index] if shuffle else index)
    return batch


@lru_cache(maxsize=4)
def _epoch_order(num_queries: int, batch_size: int, epoch: int, seed: int) -> tuple[int, ...]:
    """A permutation of the queries. Its first entries differ from those that the same batch took from the epoch before."""
    # Each order depends on the one before, back to the last epoch that begins together with a batch.
    first = epoch - epoch % (batch_size // gcd(num_queries, batch_size))
    order: list[int] = []
    for e in range(first, epoch + 1):
        taken = e * num_queries % batch_size  # of the batch that spans the boundary, by the epoch before
        before = set(order[num_queries - taken :])
        fresh = list(range(num_queries))
        random.Random(f"{seed} {e}").shuffle(fresh)
        head = [query for query in fresh if query not in before][: batch_size - taken]
        chosen = set(head)
        order = head + [query for query in fresh if query not in chosen]
    return tuple(order)
