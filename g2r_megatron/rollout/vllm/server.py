"""One vLLM server: requests over HTTP, and an update of its weights. This file does not import vLLM."""

import secrets
import socket
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import httpx

from g2r_megatron.errors import RunError
from g2r_megatron.rollout.vllm.transfer import Bucket, send_bucket

GENERATE = "/inference/v1/generate"  # token ids in, token ids out, with the version of the weights
# A connection for each request: the server closes one that was idle or met an error, which looks as if it had died.
# Proxies of the environment are for other hosts (trust_env).
NOT_KEPT = httpx.Limits(max_connections=None, max_keepalive_connections=0)
_LOOK_UP = 0.2  # seconds between looks at whether an awaited connection can still come


class ServerLost(Exception):
    """A server does not answer any more, or its engine has died. The message says what was seen."""


class Server:
    """A server that is there (check_servers.py). ``lost``: why it is not used any more."""

    def __init__(self, url: str, timeout: float):
        """``timeout``: seconds for one answer."""
        self.url, self.timeout, self.lost = url.rstrip("/"), timeout, ""
        self._http = httpx.Client(base_url=self.url, timeout=timeout, limits=NOT_KEPT, trust_env=False)

    def post(self, path: str, body: dict[str, Any] | None = None) -> Any:
        """The JSON that the server answers. Raises ``ServerLost``, or ``RunError`` for a living server's refusal."""
        try:
            return self.content(self._http.post(path, json=body))
        except httpx.TransportError as error:
            raise ServerLost(described(error)) from error

    def call_workers(self, method: str, *arguments: Any) -> list[Any]:
        """What each worker returns of a method of ``WeightReceiver``."""
        return self.post("/collective_rpc", {"method": method, "args": arguments})["results"]

    def content(self, response: httpx.Response) -> Any:
        """As ``post`` says."""
        if response.is_success:
            return response.json()
        said = message_of(response)
        if response.status_code >= httpx.codes.INTERNAL_SERVER_ERROR and not self.is_healthy():
            raise ServerLost(said)
        raise RunError(f"vLLM server {self.url}: {response.url.path} failed: {said}")

    def is_healthy(self) -> bool:
        """Whether the server says that its engine lives."""
        try:
            return self._http.get("/health").is_success
        except httpx.TransportError:
            return False


class WeightUpdate:
    """An update of one server's weights on its way. A server that is lost meanwhile is noted in ``server.lost``."""

    def __init__(self, server: Server, pool: ThreadPoolExecutor):
        """Ask the server's workers to fetch the weights from here."""
        self.server = server
        self._token = secrets.token_hex(16)
        host = _own_address(server.url)
        self._listener = socket.create_server((host, 0), family=socket.AF_INET6 if ":" in host else socket.AF_INET)
        port = self._listener.getsockname()[1]
        self._answer: Future = pool.submit(server.call_workers, "g2r_receive", host, port, self._token, server.timeout)
        self._connection: socket.socket | None = None

    def send(self, bucket: Bucket) -> None:
        """Returns when the bucket has left; an empty one is the end of the update."""
        if self.server.lost:
            return
        try:
            if self._connection is None:
                self._connection = self._accepted()
            send_bucket(self._connection, bucket)
        except OSError as error:  # the workers have given up: their answer says why
            self.finish()
            if not self.server.lost:
                raise RunError(
                    f"weight synchronisation: {self.server.url} did not take all weights: {error}"
                ) from error

    def finish(self) -> None:
        """Wait for the workers' answer. Raises ``RunError`` when they did not get what was sent."""
        try:
            self._answer.result()
        except ServerLost as lost:
            self.server.lost = str(lost)

    def close(self) -> None:
        """Workers that still wait for weights give up."""
        self._listener.close()
        if self._connection is not None:
            self._connection.close()

    def _accepted(self) -> socket.socket:
        """The connection of the server's first worker; ``OSError`` when the request to connect has failed."""
        self._listener.settimeout(_LOOK_UP)
        while not self._answer.done():
            try:
                connection, _ = self._listener.accept()
            except TimeoutError:
                continue
            connection.settimeout(self.server.timeout)
            if secrets.compare_digest(connection.recv(len(self._token), socket.MSG_WAITALL), self._token.encode()):
                return connection
            connection.close()  # it is not the server's worker
        raise ConnectionError("the server did not come for the weights")


def described(error: Exception) -> str:
    """What happened, in one line; httpx leaves some messages empty."""
    return f"{type(error).__name__} {error}".strip()


def message_of(response: httpx.Response) -> str:
    """What the server says in an answer that is no success, in one line."""
    try:
        said = response.json()["error"]["message"]
    except (ValueError, KeyError, TypeError):
        said = response.text
    return f"{' '.join(str(said).split())[:500]} (HTTP {response.status_code})"


def _own_address(url: str) -> str:
    """The address of this machine on the way to the server."""
    target = httpx.URL(url)
    port = target.port or {"http": 80, "https": 443}[target.scheme]
    with socket.create_connection((target.host, port), timeout=10) as connection:
        return connection.getsockname()[0]
