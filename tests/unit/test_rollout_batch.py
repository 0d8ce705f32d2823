"""Which sequences a replica decodes together, against a plain account of what each of them must become.

A made-up model stands for the real one: the next token is a function of the sequence alone. Leaves out the passes of the
model (test_parity_rollout.py).
"""

import pytest

from g2r_megatron.config.options import RolloutConfig
from g2r_megatron.rollout.batch import Batch
from g2r_megatron.rollout.types import Request, Sampled, by_length

LIMIT, STOP = 9, 0


def next_token(ids: list[int]) -> int:
    """Some token, the stop token now and then."""
    return (sum(ids) * 7 + len(ids)) % 11


def response(prompt: list[int]) -> Sampled:
    ids = list(prompt)
    while len(ids) - len(prompt) < LIMIT:
        ids.append(next_token(ids))
        if ids[-1] == STOP:
            return Sampled(ids[len(prompt) :], True)
    return Sampled(ids[len(prompt) :], False)


@pytest.mark.parametrize("multiple", [1, 4])
@pytest.mark.parametrize("batch_size", [1, 3, 16, 64])
def test_every_request_gets_its_response(batch_size, multiple):
    """With a cache that is kept as the engine keeps it: a row's prompt is there before its first step, and only the rows
    that go on are left. Row counts are multiples; passes over prompts have few sizes and hold a prompt once; rows never

    wait while many are free.
    """
    prompts = [[i % 5 + 1, *range(i % 7)] for i in range(40)]
    requests = [Request(prompt, str(i)) for i, prompt in enumerate(prompts)]
    config = RolloutConfig(max_response_tokens=LIMIT, batch_size=batch_size)
    batch = Batch(requests, by_length(requests), config, {STOP}, multiple)
    assert batch.longest == max(map(len, prompts)) + LIMIT
    cache: list[list[int]] = [[] for _ in batch.rows]
    passes, steps, sizes = set(), 0, {len(batch.rows)}
    while batch.wants_refill or batch.is_active:
        if batch.wants_refill:
            expected = batch.begun_after_refill
            rows, sources, given = batch.refill()
            assert batch.begun == expected and rows and len(given) % multiple == 0
            different = {tuple(given[i]) for i in sources}
            assert set(sources) == set(range(len(different)))
            passes.add(len(given))
            for row, source in zip(rows, sources, strict=True):
                cache[row] = given[source][:]
            continue
        if (kept := batch.shrink()) is not None:
            cache = [cache[i] for i in kept]
        sizes.add(len(batch.rows))
        assert len(batch.rows) == len(cache) and len(batch.rows) % multiple == 0
        tokens = []
        for seen, last, position in zip(cache, batch.last_tokens, batch.positions, strict=True):
            seen[position:] = [last]
            tokens.append(next_token(seen))
        free = sum(row.done for row in batch.rows)
        assert not batch.waiting or free < batch.refill_size
        batch.add(tokens)
        steps += 1
    assert batch.results == {i: response(prompt) for i, prompt in enumerate(prompts)}
    assert passes <= {*(2**i for i in range(7)), *sizes, batch.refill_size, len(batch.rows)}
    if batch_size in (3, 16) and multiple == 1:
        alone = sum(len(found.token_ids) for found in batch.results.values())
        assert steps < 1.5 * alone / batch_size + LIMIT  # rows are mostly busy
        assert min(sizes) == 1


def test_a_replica_without_requests_fills_its_rows():
    """It takes part in the passes of the others, and has no result."""
    batch = Batch([Request([1, 2, 3], "")], [], RolloutConfig(max_response_tokens=LIMIT, batch_size=8), {STOP}, 2)
    assert not batch.wants_refill and not batch.is_active and batch.longest == 3 + LIMIT
    assert batch.refill() == ([], [], [[1, 2, 3]] * 2)
    assert (batch.positions, batch.last_tokens, batch.uniforms) == ([2, 2], [3, 3], [0.0, 0.0])
    batch.add([5, 5])
    assert batch.results == {} and not batch.is_active
