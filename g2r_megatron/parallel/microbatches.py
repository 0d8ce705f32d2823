"""Micro-batches by token budget, and the split of work over data-parallel ranks: pure functions."""


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


def row_length(tokens: int, budget: int, multiple: int = 1) -> int:
    """Length that a row of ``tokens`` is padded to, so that a run has few shapes: kernels are planned for each new one.

    An eighth of ``budget`` or a multiple of its quarter, as many quarters as a sequence longer than the budget needs;
    rounded to ``multiple``, but not beyond a budget that is enough.
    """
    step = -(-budget // (8 if 8 * tokens <= budget else 4))
    length, whole = padded(padded(tokens, step), multiple), budget // multiple * multiple
    return min(length, whole) if tokens <= whole else length


def cache_block(longest: int) -> int:
    """Positions of a KV cache that decoding reads together, for sequences of up to ``longest`` tokens: an eighth of it."""
    return padded(-(-longest // 8), 32)


def few_length(tokens: int) -> int:
    """``tokens`` rounded up to one of few lengths: multiples of 32, from 128 on two or three between powers of two."""
    return padded(tokens, 1 << max(5, tokens.bit_length() - 2))


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
