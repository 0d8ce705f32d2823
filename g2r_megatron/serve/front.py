"""``g2r serve``: one process that speaks HTTP, and behind it the judge's ranks, which it starts and starts again.

The process imports neither torch nor Megatron-Core, so that nothing a rank does can hold up an answer.
"""

import asyncio
import contextlib
import signal
import socket
from collections.abc import Iterator
from pathlib import Path

import uvicorn

from g2r_megatron.config.serve_checks import api_key
from g2r_megatron.config.serve_options import ServeConfig, ServiceConfig
from g2r_megatron.errors import UserError, unwritable
from g2r_megatron.serve.app import Service, build_app
from g2r_megatron.serve.backlog import Backlog
from g2r_megatron.serve.guard import Guard, impatient_protocol
from g2r_megatron.serve.metrics import Metrics
from g2r_megatron.serve.ranks import Ranks


class Server(uvicorn.Server):
    """Leaves signals to ``serve_forever``: uvicorn would end the process with the signal's code."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


def serve(config: ServeConfig, argv: list[str]) -> int:
    """Serve until SIGTERM or Ctrl-C; the exit code. ``argv``: of ``g2r serve``, for the ranks.

    Raises ``UserError`` for an address that cannot be had.
    """
    listener = open_listener(config.serve)
    return asyncio.run(serve_forever(config.serve, argv, listener, api_key(config.serve)))


async def serve_forever(config: ServiceConfig, argv: list[str], listener: socket.socket, key: str) -> int:
    metrics, backlog = Metrics(), Backlog(config.queue_requests, config.queue_bytes)
    ranks = Ranks(
        *(argv, config.launcher, backlog, metrics),
        batch_rows=config.batch_rows, wait_seconds=config.batch_wait_ms / 1000, max_restarts=config.max_restarts,
    )  # fmt: skip
    app = build_app(Service(config, backlog, ranks, metrics))
    server = Server(
        uvicorn.Config(
            Guard(app, key, config.max_body_bytes, config.receive_seconds),
            http=impatient_protocol(config.receive_seconds),
            ws="none",
            lifespan="off",
            access_log=False,
            log_level="warning",
            server_header=False,
            limit_concurrency=config.max_connections,
            timeout_graceful_shutdown=round(config.drain_seconds),
        )
    )
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, setattr, server, "should_exit", True)
    url = url_of(listener)
    ranks.on_ready = lambda: announce(config, url)
    keeping = asyncio.create_task(ranks.run())
    keeping.add_done_callback(lambda _: setattr(server, "should_exit", True))
    try:
        await server.serve(sockets=[listener])  # ends when the accepted requests are answered
    finally:
        await ranks.stop()
        if config.url_file:
            Path(config.url_file).unlink(missing_ok=True)
    return await keeping


def open_listener(config: ServiceConfig) -> socket.socket:
    """A socket at the address, before anything is started."""
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(config.host, config.port, type=socket.SOCK_STREAM)[0]
        listener = socket.socket(family, kind, protocol)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
    except OSError as error:
        where = f"{config.host}:{config.port}"
        raise UserError("serve.host, serve.port", f"cannot listen on {where} ({error})", "give another one") from error
    return listener


def url_of(listener: socket.socket) -> str:
    host, port = listener.getsockname()[:2]
    if host in ("0.0.0.0", "::"):  # every address: the one by which others know this machine
        host = socket.getfqdn()
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


def announce(config: ServiceConfig, url: str) -> None:
    """Say where the service is, once its judge answers."""
    print(f"g2r serve: ready at {url}", flush=True)
    if config.url_file:
        path = Path(config.url_file)
        try:
            path.with_name(path.name + ".new").write_text(url + "\n", encoding="utf-8")
            path.with_name(path.name + ".new").replace(path)
        except OSError as error:
            raise unwritable(path, error) from error
