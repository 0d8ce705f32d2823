"""Buckets of weights, and their form on a TCP connection. vLLM servers import this file too, so it needs torch alone."""

import json
import socket
from collections.abc import Iterator

import torch

Bucket = list[tuple[str, torch.Tensor, int]]  # (Hugging Face name, whole tensor, check sum at the sender)
PROTOCOL = 2  # of what trainer and server say to each other (WeightReceiver): both must have the same
_LENGTH = 8  # bytes of the number that a header begins with


def check_sum(tensor: torch.Tensor) -> int:
    """Sum of the tensor's bytes, read as integers of 8 bytes (modulo 2 ** 64), and of the bytes that are left at its end.

    Integers of 4 bytes take ten times as long on a CPU, 2 bytes twenty times: torch converts each before it adds it.
    """
    data = tensor.contiguous().view(-1).view(torch.uint8)
    if data.storage_offset() % 8:  # a part of a bucket
        data = data.clone()
    whole = len(data) // 8 * 8
    return int(data[:whole].view(torch.int64).sum()) + int(data[whole:].sum())


def send_bucket(connection: socket.socket, bucket: Bucket) -> None:
    """A header (names, types, shapes and check sums, as JSON), then the tensors' bytes; an empty bucket ends an update."""
    header = [(n, str(t.dtype).removeprefix("torch."), list(t.shape), total) for n, t, total in bucket]
    text = json.dumps(header).encode()
    connection.sendall(len(text).to_bytes(_LENGTH) + text)
    for _, tensor, _ in bucket:
        connection.sendall(_bytes_of(tensor.cpu().contiguous()))


def received_buckets(connection: socket.socket) -> Iterator[Bucket]:
    """The buckets that the other end sends, in host memory. Raises ``OSError`` when it ends before the update does."""
    while True:
        size = int.from_bytes(_receive(connection, bytearray(_LENGTH)))
        header = json.loads(bytes(_receive(connection, bytearray(size))))
        if not header:
            return
        bucket = []
        for name, dtype, shape, total in header:
            tensor = torch.empty(shape, dtype=getattr(torch, dtype))
            _receive(connection, _bytes_of(tensor))
            bucket.append((name, tensor, total))
        yield bucket


def _bytes_of(tensor: torch.Tensor) -> memoryview:
    return tensor.view(-1).view(torch.uint8).numpy().data


def _receive(connection: socket.socket, target: bytearray | memoryview) -> bytearray | memoryview:
    """Fill ``target``."""
    rest = memoryview(target)
    while rest:
        if not (count := connection.recv_into(rest)):
            raise ConnectionError("the other end closed the connection")
        rest = rest[count:]
    return target
