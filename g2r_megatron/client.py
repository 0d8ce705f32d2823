"""A client of ``g2r serve``, for trainers and scripts: plain data in, plain data out, without torch.

    from g2r_megatron.client import Judge

    judge = Judge("http://127.0.0.1:8000")
    credit = judge.credit(prompt="...", rubric=[{"criterion": "...", "weight": 1}], responses=["...", "..."])
    credit[0]["reward"], credit[0]["token_rewards"], credit[0]["spans"]

A response is a text, or ``(token_ids, finished)`` of the tokenizer named by ``tokenizer``. What an answer holds:
docs/serve.md. ``AsyncJudge`` has the same methods as coroutines.
"""

import asyncio
import os
import random
import time
from abc import ABC, abstractmethod
from collections.abc import Coroutine, Iterator, Mapping, Sequence
from types import TracebackType
from typing import Any, Generic, Self, TypeVar

import httpx

RETRIED = (429, 502, 503)  # the service is busy or starts again
FIRST_PAUSE, LONGEST_PAUSE = 0.5, 15.0  # seconds

Response = str | tuple[Sequence[int], bool]
Criterion = str | Mapping[str, Any]
Judged = TypeVar("Judged")


class JudgeError(Exception):
    """The service did not judge. ``status``: of HTTP; None when it could not be reached."""

    def __init__(self, status: int | None, message: str):
        self.status = status
        super().__init__(message if status is None else f"{status}: {message}")


class JudgeCalls(ABC, Generic[Judged]):
    """What a judge is asked for. ``Judged``: an entry a response, or the coroutine that gives them."""

    def credit(
        self,
        responses: Sequence[Response],
        rubric: Sequence[Criterion] = (),
        *,
        prompt: str | None = None,
        messages: Sequence[Mapping[str, str]] | None = None,
        tokenizer: str | None = None,
        **options: Any,
    ) -> Judged:
        """Score, verdicts and token credit of each of one prompt's ``responses``; of several also advantages.

        ``options``: attribution, advantage, mix, ... (docs/serve.md). Raises ``JudgeError``.
        """
        return self._judged("/v1/credit", _request(responses, rubric, prompt, messages, tokenizer, options))

    def score(
        self,
        responses: Sequence[Response],
        rubric: Sequence[Criterion] = (),
        *,
        prompt: str | None = None,
        messages: Sequence[Mapping[str, str]] | None = None,
        tokenizer: str | None = None,
        **options: Any,
    ) -> Judged:
        """Score and verdicts, as ``credit`` gives them."""
        return self._judged("/v1/score", _request(responses, rubric, prompt, messages, tokenizer, options))

    @abstractmethod
    def _judged(self, path: str, request: dict[str, Any]) -> Judged:
        """The answer's entries of the responses."""


class _OverHttp(JudgeCalls[Judged]):
    """What both clients know of a service."""

    def __init__(self, url: str, api_key: str | None = None, timeout: float = 300.0, retry_seconds: float = 300.0):
        """``api_key``: default G2R_API_KEY of the environment. ``timeout``: seconds for one try. ``retry_seconds``: for so
        long a busy or restarting service is asked again."""
        key = os.environ.get("G2R_API_KEY") if api_key is None else api_key
        self._retry_seconds = retry_seconds
        self._options: dict[str, Any] = {
            "base_url": url,
            "headers": {"Authorization": f"Bearer {key}"} if key else {},
            "timeout": timeout,
            "trust_env": False,  # the judge is inside the cluster: no proxy stands between
        }

    def _pauses(self) -> Iterator[float]:
        """Seconds before each further try: longer each time, and spread, until ``retry_seconds`` are over."""
        end, pause = time.monotonic() + self._retry_seconds, FIRST_PAUSE
        while time.monotonic() + pause < end:
            yield pause * random.uniform(0.5, 1.5)
            pause = min(2 * pause, LONGEST_PAUSE)


def _request(
    responses: Sequence[Response],
    rubric: Sequence[Criterion],
    prompt: str | None,
    messages: Sequence[Mapping[str, str]] | None,
    tokenizer: str | None,
    options: Mapping[str, Any],
) -> dict[str, Any]:
    """The JSON of a request."""
    request: dict[str, Any] = {
        "responses": [
            {"text": r} if isinstance(r, str) else {"token_ids": [int(i) for i in r[0]], "finished": bool(r[1])}
            for r in responses
        ],
        "rubric": [{"criterion": item} if isinstance(item, str) else dict(item) for item in rubric],
        "options": dict(options),
    }
    request |= {"prompt": prompt} if messages is None else {"messages": [dict(message) for message in messages]}
    if messages is not None and prompt is not None:
        raise ValueError("give either prompt or messages")
    return request if tokenizer is None else request | {"tokenizer": tokenizer}


def _result(response: httpx.Response) -> Any:
    """The JSON of an answer. Raises ``JudgeError`` for any other status than 200."""
    if response.status_code == 200:
        return response.json()
    try:
        message = response.json()["error"]
    except (ValueError, KeyError, TypeError):
        message = response.reason_phrase
    raise JudgeError(response.status_code, str(message))


def _next_pause(response: httpx.Response | None, problem: str, pauses: Iterator[float]) -> float | None:
    """Seconds until the next try; None if ``response`` is the answer. Raises ``JudgeError`` after the last try.

    ``problem``: why there is no response.
    """
    if response is not None and response.status_code not in RETRIED:
        return None
    if (pause := next(pauses, None)) is not None:
        return _wait(response, pause)
    if response is None:
        raise JudgeError(None, f"the service cannot be reached ({problem.strip()})")
    return None


def _wait(response: httpx.Response | None, pause: float) -> float:
    """Seconds until the next try: at least what the service asks for."""
    after = "" if response is None else response.headers.get("Retry-After", "")
    return max(pause, min(float(after), LONGEST_PAUSE)) if after.isdigit() else pause


class Judge(_OverHttp[list[dict[str, Any]]]):
    """Blocking client; one object may be used by several threads."""

    def __init__(self, url: str, api_key: str | None = None, timeout: float = 300.0, retry_seconds: float = 300.0):
        super().__init__(url, api_key, timeout, retry_seconds)
        self._http = httpx.Client(**self._options)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()

    def close(self) -> None:
        self._http.close()

    def model(self) -> dict[str, Any]:
        """The judge behind the service: its attributions, tokenizers, lengths."""
        return self._send("GET", "/v1/models", None)["data"][0]

    def _judged(self, path: str, request: dict[str, Any]) -> list[dict[str, Any]]:
        return self._send("POST", path, request)["responses"]

    def _send(self, method: str, path: str, request: dict[str, Any] | None) -> Any:
        pauses = self._pauses()
        while True:
            response, problem = None, ""
            try:
                response = self._http.request(method, path, json=request)
            except httpx.TransportError as error:
                problem = f"{type(error).__name__} {error}"
            if (pause := _next_pause(response, problem, pauses)) is None:
                return _result(response)
            time.sleep(pause)


class AsyncJudge(_OverHttp[Coroutine[Any, Any, list[dict[str, Any]]]]):
    """Client for coroutines of one event loop: ``await judge.credit(...)``."""

    def __init__(self, url: str, api_key: str | None = None, timeout: float = 300.0, retry_seconds: float = 300.0):
        super().__init__(url, api_key, timeout, retry_seconds)
        self._http = httpx.AsyncClient(**self._options)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None
    ) -> None:
        await self.close()

    async def close(self) -> None:
        await self._http.aclose()

    async def model(self) -> dict[str, Any]:
        """See ``Judge.model``."""
        return (await self._send("GET", "/v1/models", None))["data"][0]

    async def _judged(self, path: str, request: dict[str, Any]) -> list[dict[str, Any]]:
        return (await self._send("POST", path, request))["responses"]

    async def _send(self, method: str, path: str, request: dict[str, Any] | None) -> Any:
        pauses = self._pauses()
        while True:
            response, problem = None, ""
            try:
                response = await self._http.request(method, path, json=request)
            except httpx.TransportError as error:
                problem = f"{type(error).__name__} {error}"
            if (pause := _next_pause(response, problem, pauses)) is None:
                return _result(response)
            await asyncio.sleep(pause)
