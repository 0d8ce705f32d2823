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
from collections.abc import Iterator, Mapping, Sequence
from types import TracebackType
from typing import Any, Self

import httpx

RETRIED = (429, 502, 503)  # the service is busy or starts again
FIRST_PAUSE, LONGEST_PAUSE = 0.5, 15.0  # seconds

Response = str | tuple[Sequence[int], bool]
Criterion = str | Mapping[str, Any]


class JudgeError(Exception):
    """The service did not judge. ``status``: of HTTP; None when it could not be reached."""

    def __init__(self, status: int | None, message: str):
        self.status = status
        super().__init__(message if status is None else f"{status}: {message}")


class _Shared:
    """What both clients know: the address, the key, how long to try."""

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


def _wait(response: httpx.Response | None, pause: float) -> float:
    """Seconds until the next try: at least what the service asks for."""
    after = "" if response is None else response.headers.get("Retry-After", "")
    return max(pause, min(float(after), LONGEST_PAUSE)) if after.isdigit() else pause


class Judge(_Shared):
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

    def credit(
        self,
        responses: Sequence[Response],
        rubric: Sequence[Criterion] = (),
        *,
        prompt: str | None = None,
        messages: Sequence[Mapping[str, str]] | None = None,
        tokenizer: str | None = None,
        **options: Any,
    ) -> list[dict[str, Any]]:
        """Score, verdicts and token credit of each of one prompt's ``responses``; of several also advantages.

        ``options``: attribution, advantage, mix, ... (docs/serve.md). Raises ``JudgeError``.
        """
        request = _request(responses, rubric, prompt, messages, tokenizer, options)
        return self._send("POST", "/v1/credit", request)["responses"]

    def score(
        self,
        responses: Sequence[Response],
        rubric: Sequence[Criterion] = (),
        *,
        prompt: str | None = None,
        messages: Sequence[Mapping[str, str]] | None = None,
        tokenizer: str | None = None,
        **options: Any,
    ) -> list[dict[str, Any]]:
        """Score and verdicts, as ``credit`` gives them."""
        request = _request(responses, rubric, prompt, messages, tokenizer, options)
        return self._send("POST", "/v1/score", request)["responses"]

    def model(self) -> dict[str, Any]:
        """The judge behind the service: its attributions, tokenizers, lengths."""
        return self._send("GET", "/v1/models", None)["data"][0]

    def _send(self, method: str, path: str, request: dict[str, Any] | None) -> Any:
        pauses = self._pauses()
        while True:
            response, problem = None, ""
            try:
                response = self._http.request(method, path, json=request)
            except httpx.TransportError as error:
                problem = f"{type(error).__name__} {error}"
            if response is not None and response.status_code not in RETRIED:
                return _result(response)
            if (pause := next(pauses, None)) is None:
                return _gave_up(response, problem)
            time.sleep(_wait(response, pause))


class AsyncJudge(_Shared):
    """Client for coroutines of one event loop."""

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

    async def credit(
        self,
        responses: Sequence[Response],
        rubric: Sequence[Criterion] = (),
        *,
        prompt: str | None = None,
        messages: Sequence[Mapping[str, str]] | None = None,
        tokenizer: str | None = None,
        **options: Any,
    ) -> list[dict[str, Any]]:
        """See ``Judge.credit``."""
        request = _request(responses, rubric, prompt, messages, tokenizer, options)
        return (await self._send("POST", "/v1/credit", request))["responses"]

    async def score(
        self,
        responses: Sequence[Response],
        rubric: Sequence[Criterion] = (),
        *,
        prompt: str | None = None,
        messages: Sequence[Mapping[str, str]] | None = None,
        tokenizer: str | None = None,
        **options: Any,
    ) -> list[dict[str, Any]]:
        """See ``Judge.score``."""
        request = _request(responses, rubric, prompt, messages, tokenizer, options)
        return (await self._send("POST", "/v1/score", request))["responses"]

    async def model(self) -> dict[str, Any]:
        """See ``Judge.model``."""
        return (await self._send("GET", "/v1/models", None))["data"][0]

    async def _send(self, method: str, path: str, request: dict[str, Any] | None) -> Any:
        pauses = self._pauses()
        while True:
            response, problem = None, ""
            try:
                response = await self._http.request(method, path, json=request)
            except httpx.TransportError as error:
                problem = f"{type(error).__name__} {error}"
            if response is not None and response.status_code not in RETRIED:
                return _result(response)
            if (pause := next(pauses, None)) is None:
                return _gave_up(response, problem)
            await asyncio.sleep(_wait(response, pause))


def _gave_up(response: httpx.Response | None, problem: str) -> Any:
    """Raise for the last try."""
    if response is not None:
        return _result(response)
    raise JudgeError(None, f"the service cannot be reached ({problem.strip()})")
