"""Buckets of weights over a connection: they arrive as they were sent, once, or the receiver knows that they did not.

Leaves out vLLM, which loads them (tests/runs/test_vllm_servers.py).
"""

import socket
from concurrent.futures import ThreadPoolExecutor
from itertools import chain

import pytest
import torch

from g2r_megatron.rollout.vllm.transfer import check_sum, received_buckets, send_bucket


def bucket(*tensors: torch.Tensor):
    return [(f"tensor {i}", tensor, check_sum(tensor)) for i, tensor in enumerate(tensors)]


def transferred(*sent, close_early: bool = False):
    """What arrives of the buckets, and how many bytes travelled."""
    here, there = socket.socketpair()
    with here, there, ThreadPoolExecutor() as pool:
        counting = _Counting(here)

        def send():
            for some in sent:
                send_bucket(counting, some)
            if close_early:
                here.close()
            else:
                send_bucket(counting, [])

        sending = pool.submit(send)
        try:
            return list(received_buckets(there)), counting.count
        finally:
            sending.result()


class _Counting:
    def __init__(self, connection):
        self._connection, self.count = connection, 0

    def sendall(self, data):
        self._connection.sendall(data)
        self.count += len(data)


def test_tensors_arrive_bit_for_bit():
    """Of both types and any shape, a transposed one too; the bytes that travel are those of the tensors, and headers."""
    generator = torch.Generator().manual_seed(1)
    large = torch.randn(300, 400, generator=generator)
    first, second = bucket(large.T, torch.tensor(3.5)), bucket(large.bfloat16(), torch.empty(0, 4))
    received, count = transferred(first, second)
    assert [len(some) for some in received] == [2, 2]
    for theirs, ours in zip(chain(*received), first + second, strict=True):
        assert (theirs[0], theirs[2]) == (ours[0], ours[2]) and torch.equal(theirs[1], ours[1])
        assert theirs[1].dtype == ours[1].dtype and check_sum(theirs[1]) == ours[2]
    assert count <= 1.01 * (large.nbytes * 1.5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_check_sum_sees_every_byte(dtype):
    """Of any length; where the bytes lie in memory does not matter."""
    for length in (0, 1, 3, 4, 7, 1000):
        tensor = torch.randn(length, generator=torch.Generator().manual_seed(length)).to(dtype)
        sent = check_sum(tensor)
        moved = torch.cat([torch.zeros(1, dtype=dtype), tensor])[1:]
        assert torch.equal(moved, tensor) and check_sum(moved) == sent
        for i in range(length):
            other = tensor.clone()
            other[i] = -other[i]
            assert check_sum(other) != sent


def test_a_sender_that_ends_early_is_noticed():
    """Also between two buckets, where everything that was announced has come."""
    with pytest.raises(ConnectionError):
        transferred(bucket(torch.ones(5)), close_early=True)
