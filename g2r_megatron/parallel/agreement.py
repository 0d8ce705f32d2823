"""Errors that one rank finds and all must raise: the others would wait for it in the next collective."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch.distributed as dist

from g2r_megatron.errors import UserError


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
