"""What every HTTP request passes first: whose it is, how large it is, how long it takes to arrive.

An ASGI middleware. It reads the whole body before the application sees the request, so that a slow client costs a
waiting coroutine and nothing else.
"""

import asyncio
import hmac
import json
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any

from uvicorn.protocols.http.h11_impl import H11Protocol

Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]
Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]
App = Callable[[Scope, Receive, Send], Awaitable[None]]

LOCAL_NAMES = ("localhost", "127.0.0.1", "[::1]")
PROTECTED = ("/v1/", "/metrics")
# Nothing is loaded from elsewhere, no script or style stands in a page, no other page can frame it.
POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; img-src 'self'; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
HEADERS = [
    (b"content-security-policy", POLICY.encode()),
    (b"x-content-type-options", b"nosniff"),
    (b"referrer-policy", b"no-referrer"),
    (b"cache-control", b"no-store"),
]


class Refused(Exception):
    """A request that the application does not see."""

    def __init__(self, status: int, error: str, headers: tuple[tuple[bytes, bytes], ...] = ()):
        self.status, self.error, self.headers = status, error, headers
        super().__init__(error)


class Guard:
    """API key, host, content type, size and time of a request; security headers of every answer."""

    def __init__(self, app: App, key: str, max_body_bytes: int, receive_seconds: float):
        """``key``: "" for none; then only requests to a local name are taken, which keeps out pages of other sites."""
        self._app, self._key = app, key
        self._most, self._seconds = max_body_bytes, receive_seconds

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return

        async def with_headers(message: MutableMapping[str, Any]) -> None:
            if message["type"] == "http.response.start":
                message["headers"] = [*message.get("headers", ()), *HEADERS]
            await send(message)

        headers = dict(scope["headers"])  # of a repeated header the last one
        try:
            self._check(scope, headers)
            body = await self._body(scope, headers, receive)
        except Refused as refused:
            await _refuse(with_headers, refused)
            return
        if body is not None:
            await self._app(scope, _replayed(body, receive), with_headers)

    def _check(self, scope: Scope, headers: dict[bytes, bytes]) -> None:
        path = scope["path"]
        if self._key:
            if path.startswith(PROTECTED) and not self._has_key(headers.get(b"authorization", b"")):
                raise Refused(401, "the API key is missing or wrong", ((b"www-authenticate", b"Bearer"),))
        else:
            name = headers.get(b"host", b"").decode("latin-1")
            name = name if name.endswith("]") else name.rpartition(":")[0] or name
            if name.lower() not in LOCAL_NAMES:
                raise Refused(421, "this service has no API key and answers to local names only")
        if scope["method"] == "POST":
            kind = headers.get(b"content-type", b"").split(b";")[0].strip().lower()
            if kind != b"application/json":  # a page of another site cannot send this without asking
                raise Refused(415, "the content type must be application/json")

    def _has_key(self, authorization: bytes) -> bool:
        scheme, _, given = authorization.partition(b" ")
        return scheme.lower() == b"bearer" and hmac.compare_digest(given.strip(), self._key.encode())

    async def _body(self, scope: Scope, headers: dict[bytes, bytes], receive: Receive) -> bytes | None:
        """The whole body; None when the client has left."""
        stated = headers.get(b"content-length", b"0")
        if not stated.isdigit() or len(stated) > 18:
            raise Refused(400, "the content length must be a number")
        if int(stated) > self._most or (int(stated) and scope["method"] not in ("POST", "PUT", "PATCH")):
            raise Refused(413, f"the body may have {self._most} bytes, and only a POST has one", CLOSE)
        parts, size = [], 0
        try:
            async with asyncio.timeout(self._seconds):
                while True:
                    message = await receive()
                    if message["type"] == "http.disconnect":
                        return None
                    part = message.get("body", b"")
                    parts.append(part)
                    size += len(part)
                    if size > self._most:
                        raise Refused(413, f"the body may have {self._most} bytes", CLOSE)
                    if not message.get("more_body"):
                        return b"".join(parts)
        except TimeoutError:
            raise Refused(408, f"the body did not arrive within {self._seconds:g} seconds", CLOSE) from None


CLOSE = ((b"connection", b"close"),)


def _replayed(body: bytes, receive: Receive) -> Receive:
    """``receive`` of a request whose ``body`` has been read."""
    whole = [{"type": "http.request", "body": body, "more_body": False}]

    async def replay() -> MutableMapping[str, Any]:
        return whole.pop() if whole else await receive()

    return replay


async def _refuse(send: Send, refused: Refused) -> None:
    text = json.dumps({"error": refused.error}).encode()
    headers = [(b"content-type", b"application/json"), (b"content-length", str(len(text)).encode()), *refused.headers]
    await send({"type": "http.response.start", "status": refused.status, "headers": headers})
    await send({"type": "http.response.body", "body": text})


def impatient_protocol(seconds: float) -> type[H11Protocol]:
    """uvicorn's HTTP/1.1, which closes a connection whose headers take longer than ``seconds``."""

    class Impatient(H11Protocol):
        _deadline: asyncio.TimerHandle | None = None

        def connection_made(self, transport: Any) -> None:
            super().connection_made(transport)
            self._wait_for_headers()

        def data_received(self, data: bytes) -> None:
            super().data_received(data)
            if self.cycle is not None and not self.cycle.response_complete:
                self._stop_waiting()
            elif self._deadline is None:
                self._wait_for_headers()

        def connection_lost(self, exc: Exception | None) -> None:
            self._stop_waiting()
            super().connection_lost(exc)

        def _wait_for_headers(self) -> None:
            self._deadline = self.loop.call_later(seconds, self._give_up)

        def _stop_waiting(self) -> None:
            if self._deadline is not None:
                self._deadline.cancel()
                self._deadline = None

        def _give_up(self) -> None:
            self._deadline = None
            if self.cycle is None or self.cycle.response_complete:
                self.transport.close()

    return Impatient
