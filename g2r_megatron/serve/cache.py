"""Answers by the content of their requests, for requests that come again (a client that has tried again)."""

from collections import OrderedDict
from hashlib import sha256


class Cache:
    """The answers that were used last, up to so many bytes in all."""

    def __init__(self, most_bytes: int):
        self._most = most_bytes
        self._kept: OrderedDict[bytes, bytes] = OrderedDict()
        self.bytes = 0

    @staticmethod
    def key(kind: str, content: bytes) -> bytes:
        return sha256(kind.encode() + b"\0" + content).digest()

    def get(self, key: bytes) -> bytes | None:
        if (answer := self._kept.get(key)) is not None:
            self._kept.move_to_end(key)
        return answer

    def put(self, key: bytes, answer: bytes) -> None:
        if len(answer) > self._most or key in self._kept:
            return
        self._kept[key] = answer
        self.bytes += len(answer)
        while self.bytes > self._most:
            _, old = self._kept.popitem(last=False)
            self.bytes -= len(old)
