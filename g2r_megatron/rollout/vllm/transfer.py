"""Buckets of weights, and how they travel over a TCP connection. Imported by vLLM servers too: it needs torch alone."""

import json
import socket
from collections.abc import Iterator

import torch

Bucket = list[tuple[str, torch.Tensor, int]]  # (Hugging Face name, whole tensor, check sum at the sender)
_BITS = {1: torch.int8, 2: torch.int16, 4: torch.int32}
PROTOCOL = 1  # of what trainer and server say to each other (WeightReceiver): both must have the same
_LENGTH = 8  # bytes of the number that a header begins with


def check_sum(tensor: torch.Tensor) -> int:
    """Sum of the tensor's elements, read as integers of their size."""
    return int(tensor.contiguous().view(_BITS[tensor.element_size()]).sum(dtype=torch.int64))


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
