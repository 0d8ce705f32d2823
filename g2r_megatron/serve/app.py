"""The routes of ``g2r serve``. Everything heavy is done by the judge's ranks; a route checks, waits and passes on."""

import asyncio
import time
from importlib.resources import files
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, Response
from pydantic_core import PydanticSerializationError
from starlette.exceptions import HTTPException

from g2r_megatron.config.serve_options import ServiceConfig
from g2r_megatron.serve import schema
from g2r_megatron.serve.backlog import Backlog, Full, Waiting
from g2r_megatron.serve.cache import Cache
from g2r_megatron.serve.metrics import Metrics
from g2r_megatron.serve.ranks import NoJudge, Ranks

RETRY_SECONDS = "2"  # Retry-After of 429 and 503
CLIENT_LEFT = 499  # in the metrics
# URL -> (file of page/, type). No other path reaches a file.
PAGES = {
    "/": ("index.html", "text/html"),
    "/page.css": ("page.css", "text/css"),
    "/page.js": ("page.js", "text/javascript"),
    "/icon.svg": ("icon.svg", "image/svg+xml"),
    "/docs": ("docs.html", "text/html"),
    "/docs.js": ("docs.js", "text/javascript"),
}
FAILURES: dict[int | str, dict[str, Any]] = {
    401: {"model": schema.Failure, "description": "the API key is missing or wrong"},
    413: {"model": schema.Failure, "description": "too large"},
    422: {"model": schema.Failure, "description": "cannot be judged; the error says why"},
    429: {"model": schema.Failure, "description": "too many requests wait; try again after Retry-After seconds"},
    503: {"model": schema.Failure, "description": "no judge at the moment; try again after Retry-After seconds"},
    504: {"model": schema.Failure, "description": "not answered by the deadline"},
}


class Service:
    """What the routes share."""

    def __init__(self, config: ServiceConfig, backlog: Backlog, ranks: Ranks, metrics: Metrics):
        self.config, self.backlog, self.ranks, self.metrics = config, backlog, ranks, metrics
        self.cache = Cache(config.cache_bytes)

    async def answer(self, kind: str, body: schema.Request, request: Request) -> Response:
        """The judge's answer to ``body``, or why there is none."""
        start = time.monotonic()
        response = await self._answer(kind, body, request)
        self.metrics.requests.labels(f"/v1/{kind}", response.status_code).inc()
        self.metrics.seconds.labels(f"/v1/{kind}").observe(time.monotonic() - start)
        return response

    async def _answer(self, kind: str, body: schema.Request, request: Request) -> Response:
        responses = [body.response] if isinstance(body, schema.HideRequest) else body.responses  # type: ignore[attr-defined]
        if len(responses) > self.config.max_responses or len(body.rubric) > self.config.max_items:
            most = f"{self.config.max_responses} responses and {self.config.max_items} rubric items"
            return failure(413, f"a request may have {most}")
        seconds = body.options.deadline_seconds or self.config.deadline_seconds  # type: ignore[attr-defined]
        try:
            content = body.model_dump_json(exclude={"options": {"deadline_seconds"}}).encode()
        except PydanticSerializationError:  # half a surrogate pair, which JSON can spell and no text can hold
            return failure(422, "texts must be valid Unicode")
        key = Cache.key(kind, content)
        if (kept := self.cache.get(key)) is not None:
            self.metrics.cached.inc()
            return Response(kept, media_type="application/json")
        try:
            job = self.ranks.submit(kind, content, len(responses))
        except Full:
            return failure(429, "too many requests wait for the judge", retry=True)
        except NoJudge:
            return self.no_judge()
        job.answer.add_done_callback(lambda answer: self._keep(key, job, answer))
        left: asyncio.Future[None] = asyncio.create_task(disconnected(request))
        seconds = min(seconds, self.config.deadline_seconds)
        both: set[asyncio.Future[Any]] = {job.answer, left}
        await asyncio.wait(both, timeout=seconds, return_when=asyncio.FIRST_COMPLETED)
        left.cancel()
        if not job.answer.done():
            self.ranks.withdraw(job)
            return failure(CLIENT_LEFT if left.done() else 504, f"not answered within {seconds:g} seconds")
        if job.answer.exception() is not None:
            return self.no_judge()
        status, answer = job.answer.result()
        return Response(answer, status, media_type="application/json")

    def _keep(self, key: bytes, job: Waiting, answer: asyncio.Future[tuple[int, bytes]]) -> None:
        """Also the answer to a client that has left: it may come again."""
        if not answer.cancelled() and answer.exception() is None and answer.result()[0] == 200:
            self.cache.put(key, answer.result()[1])
            self.metrics.responses.inc(job.rows)

    def no_judge(self) -> Response:
        return failure(503, f"the judge is {self.ranks.state}", retry=True)


async def disconnected(request: Request) -> None:
    """Return when the client has left. The body has been read."""
    while (await request.receive())["type"] != "http.disconnect":
        pass


def failure(status: int, error: str, retry: bool = False) -> JSONResponse:
    """An answer of one line."""
    return JSONResponse({"error": error}, status, {"Retry-After": RETRY_SECONDS} if retry else None)


def build_app(service: Service) -> FastAPI:
    """The application of one front."""
    app = FastAPI(
        title="g2r serve",
        summary="Scores, verdicts and token credit of a frozen judge",
        docs_url=None,  # FastAPI's loads scripts from elsewhere
        redoc_url=None,
        openapi_url="/openapi.json",
    )

    @app.post("/v1/credit", response_model=schema.CreditAnswer, responses=FAILURES)
    async def credit(body: schema.CreditRequest, request: Request) -> Response:
        """Score, verdicts, token weights, token rewards, and of several responses the advantages of their tokens."""
        return await service.answer("credit", body, request)

    @app.post("/v1/score", response_model=schema.ScoreAnswer, responses=FAILURES)
    async def score(body: schema.ScoreRequest, request: Request) -> Response:
        """Score and verdicts."""
        return await service.answer("score", body, request)

    @app.post("/v1/hide", response_model=schema.HideAnswer, responses=FAILURES)
    async def hide(body: schema.HideRequest, request: Request) -> Response:
        """What every verdict's margin is when a sentence is hidden from the judge."""
        return await service.answer("hide", body, request)

    @app.get("/v1/models")
    async def models() -> Response:
        """The judge, its attributions and tokenizers."""
        if not service.ranks.facts:
            return service.no_judge()
        return JSONResponse({"data": [service.ranks.facts]})

    @app.get("/healthz")
    async def health() -> Response:
        """200 while there are ranks that answer, else 503."""
        state = service.ranks.state
        return JSONResponse({"state": state}, 200 if state == "ready" else 503)

    @app.get("/metrics")
    async def metrics() -> Response:
        """Prometheus' text format."""
        service.metrics.waiting.set(len(service.backlog))
        service.metrics.ready.set(service.ranks.state == "ready")
        return Response(service.metrics.text(), media_type="text/plain; version=0.0.4")

    add_pages(app)
    add_failures(app)
    return app


def add_pages(app: FastAPI) -> None:
    """Routes of the files in page/, which are read once."""
    for url, (name, kind) in PAGES.items():
        content = (files("g2r_megatron.serve") / "page" / name).read_bytes()

        def page(content: bytes = content, kind: str = kind) -> Response:
            return Response(content, media_type=kind)

        app.add_api_route(url, page, include_in_schema=False, response_class=Response)


def add_failures(app: FastAPI) -> None:
    """Every failure is JSON with one line, and repeats nothing of the request."""

    @app.exception_handler(RequestValidationError)
    async def invalid(request: Request, error: RequestValidationError) -> Response:
        return failure(422, schema.problems([{**one, "loc": one["loc"][1:]} for one in error.errors()]))

    @app.exception_handler(HTTPException)
    async def other(request: Request, error: HTTPException) -> Response:
        return failure(error.status_code, str(error.detail))
