"""Micro-batches by token budget, and the split of work over data-parallel ranks: pure functions."""


def pack_by_tokens(lengths: list[int], budget: int, multiple: int = 1) -> list[list[int]]:
    """Group sequences so that rows x longest (padded to ``multiple``) stays within ``budget`` tokens.

    ``lengths`` in tokens. Sequences are taken longest first, so rows of like length share a micro-batch;
    a sequence longer than the budget gets a micro-batch of its own. Returns lists of indices.
    """
    order = sorted(range(len(lengths)), key=lambda i: (-lengths[i], i))
    batches: list[list[int]] = []
    for i in order:
        if batches and (len(batches[-1]) + 1) * padded(lengths[batches[-1][0]], multiple) <= budget:
            batches[-1].append(i)
        else:
            batches.append([i])
    return batches


def pack_rows(lengths: list[int], budget: int, multiple: int = 1) -> list[list[int]]:
    """Group sequences into rows, one after the other, so that each row (padded to ``multiple``) stays within ``budget``.

    ``lengths`` in tokens. First fit, longest first; a sequence longer than the budget gets a row of its own. Returns
    lists of indices.
    """
    rows: list[list[int]] = []
    used: list[int] = []
    for i in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        row = next((r for r, tokens in enumerate(used) if padded(tokens + lengths[i], multiple) <= budget), None)
        if row is None:
            rows.append([])
            used.append(0)
            row = len(rows) - 1
        rows[row].append(i)
        used[row] += lengths[i]
    return rows


def padded(length: int, multiple: int) -> int:
    """``length`` rounded up to ``multiple`` (sequence parallelism splits the sequence evenly)."""
    return -(-length // multiple) * multiple


def balanced_shards(lengths: list[int], shards: int) -> list[list[int]]:
    """Split indices over ``shards`` ranks with near-equal token totals; every index once, order kept inside a shard."""
    loads = [0] * shards
    assigned: list[list[int]] = [[] for _ in range(shards)]
    for i in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        target = loads.index(min(loads))
        loads[target] += lengths[i]
        assigned[target].append(i)
    return [sorted(shard) for shard in assigned]
