"""Ranks exchange the results of their shares, and errors: all must raise the error of one.

After an error of one rank the others would wait for it in the next collective.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TypeVar

import torch.distributed as dist

from g2r_megatron.errors import UserError

Key = TypeVar("Key")
Value = TypeVar("Value")


def union(mine: dict[Key, Value]) -> dict[Key, Value]:
    """The entries of all ranks, on every rank (collective); of a key that several have, the highest rank's."""
    parts: list[dict[Key, Value]] = [{} for _ in range(dist.get_world_size())]
    dist.all_gather_object(parts, mine)
    return {key: value for part in parts for key, value in part.items()}


@contextmanager
def raised_by_all() -> Iterator[None]:
    """A ``UserError`` of any process in the block is raised by every process. Collective; the block must not be."""
    mine = None
    try:
        yield
    except UserError as error:
        mine = error
    found: list[tuple[str, str, str] | None] = [None] * dist.get_world_size()
    dist.all_gather_object(found, (mine.where, mine.found, mine.remedy) if mine else None)
    if mine is not None:
        raise mine
    for where_found_remedy in filter(None, found):
        raise UserError(*where_found_remedy)
