"""Messages between the HTTP front and the judge's first rank, over a Unix socket: a JSON header and bytes, never a pickle.

A message is the length of its header and of its body (two big-endian uint32), the header (a JSON object) and the body,
which the front does not read: it goes to the client as the judge wrote it.

The front sends ``{"jobs": [{"id", "kind"}, ...]}`` with a JSON list of the requests. The judge sends ``{"ready": facts}``
once, and for every job ``{"id", "status"}`` with the JSON answer.
"""

import asyncio
import json
import select
import socket
import struct
from pathlib import Path
from typing import Any

LENGTHS = struct.Struct("!II")
MAX_HEADER, MAX_BODY = 2**22, 2**30  # bytes; more is no message of ours
SOCKET_VARIABLE = "G2R_SERVE_SOCKET"  # where the front listens for the judge's first rank

Message = tuple[dict[str, Any], bytes]


def packed(header: dict[str, Any], body: bytes = b"") -> bytes:
    """A message as bytes."""
    text = json.dumps(header).encode()
    if len(text) > MAX_HEADER or len(body) > MAX_BODY:
        raise ValueError(f"a message of {len(text)} + {len(body)} bytes is too long")
    return b"".join([LENGTHS.pack(len(text), len(body)), text, body])


def _lengths(raw: bytes) -> tuple[int, int]:
    header, body = LENGTHS.unpack(raw)
    if header > MAX_HEADER or body > MAX_BODY:
        raise ConnectionError(f"a message of {header} + {body} bytes is not one of ours")
    return header, body


async def read_message(reader: asyncio.StreamReader) -> Message | None:
    """The next message; None when the other side has closed the connection."""
    try:
        header, body = _lengths(await reader.readexactly(LENGTHS.size))
        return json.loads(await reader.readexactly(header)), await reader.readexactly(body)
    except (asyncio.IncompleteReadError, ConnectionError):
        return None


class Connection:
    """The judge's end: blocking."""

    def __init__(self, path: Path | str):
        self._socket = socket.socket(socket.AF_UNIX)
        self._socket.connect(str(path))

    def send(self, header: dict[str, Any], body: bytes = b"") -> None:
        self._socket.sendall(packed(header, body))

    def receive(self, seconds: float) -> Message | None:
        """The next message; None if none has begun within ``seconds``. Raises ``ConnectionError`` at the end."""
        if not select.select([self._socket], [], [], seconds)[0]:
            return None
        header, body = _lengths(self._exactly(LENGTHS.size))
        return json.loads(self._exactly(header)), self._exactly(body)

    def close(self) -> None:
        self._socket.close()

    def _exactly(self, size: int) -> bytes:
        parts, missing = [], size
        while missing:
            part = self._socket.recv(min(missing, 2**20))
            if not part:
                raise ConnectionError("the front has closed the connection")
            parts.append(part)
            missing -= len(part)
        return b"".join(parts)
