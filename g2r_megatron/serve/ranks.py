"""The judge's ranks as the HTTP front sees them: started, connected, given requests, started again when they end.

The front never waits for them: what it sends is written when they read it, and what they answer is taken when it comes.
"""

import asyncio
import os
import shlex
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from g2r_megatron.errors import warn
from g2r_megatron.serve.backlog import Backlog, Full, Waiting
from g2r_megatron.serve.metrics import Metrics
from g2r_megatron.serve.protocol import SOCKET_VARIABLE, packed, read_message

BAD_INPUT = 2  # exit code of a rank for a mistake of the operator
LAUNCHER_SECONDS = 10.0  # to end its ranks in
LONGEST_PAUSE = 30.0  # between two starts


class NoJudge(Exception):
    """There are no ranks that could answer now."""


class Ranks:
    """The launcher's processes and the connection to the first rank. ``state``: starting, ready, restarting or ended."""

    def __init__(self, argv: list[str], launcher: str, backlog: Backlog, metrics: Metrics, **limits: float):
        """``argv``: of ``g2r serve``. ``limits``: batch_rows, wait_seconds, max_restarts."""
        python = [*shlex.split(launcher), "-m"] if launcher else [sys.executable, "-m"]
        self._command = [*python, "g2r_megatron.cli", "serve", *argv]
        self._backlog, self._metrics, self._limits = backlog, metrics, limits
        self._directory = Path(tempfile.mkdtemp(prefix="g2r-serve-"))  # only this user can enter it
        self._process: asyncio.subprocess.Process | None = None
        self._writer: asyncio.StreamWriter | None = None
        self._working: dict[int, Waiting] = {}
        self._began = 0.0
        self._timer: asyncio.TimerHandle | None = None
        self._stopping = False
        self._lost = asyncio.Event()
        self._fruitless = 0  # starts in a row that have answered nothing
        self.state, self.facts = "starting", {}
        self.on_ready: Callable[[], None] = lambda: None

    # ---- requests ----------------------------------------------------------------------------------------------------

    def submit(self, kind: str, content: bytes, rows: int) -> Waiting:
        """A request for the ranks; its ``answer`` gets ``NoJudge`` if they end before it.

        Raises ``Full``, and ``NoJudge`` where there are none.
        """
        if self.state != "ready":
            raise NoJudge
        job = Waiting(kind, content, rows, asyncio.get_running_loop().create_future())
        try:
            self._backlog.add(job)
        except Full:
            self._metrics.refused.inc()
            raise
        self._consider()
        return job

    def withdraw(self, job: Waiting) -> None:
        """Nobody waits for ``job``: it is taken back, unless the judge has begun with it."""
        if self._backlog.remove(job):
            job.answer.cancel()

    def _consider(self) -> None:
        """Give the ranks the next batch, if they are idle and it is full or has waited."""
        if self._writer is None or self._working or not len(self._backlog):
            return
        if self._backlog.rows >= self._limits["batch_rows"]:
            self._send()
        elif self._timer is None:
            self._timer = asyncio.get_running_loop().call_later(self._limits["wait_seconds"], self._send)

    def _send(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        if self._writer is None or self._working:
            return
        batch = self._backlog.take(int(self._limits["batch_rows"]))
        if not batch:
            return
        self._working = {job.number: job for job in batch}
        self._began = time.monotonic()
        self._metrics.batch_rows.observe(sum(job.rows for job in batch))
        header = {"jobs": [{"id": job.number, "kind": job.kind} for job in batch]}
        self._writer.write(packed(header, b"[" + b",".join(job.content for job in batch) + b"]"))

    def _take(self, header: dict[str, Any], body: bytes) -> None:
        job = self._working.pop(header["id"])
        self._fruitless = 0
        if not job.answer.done():  # its client may have left
            job.answer.set_result((header["status"], body))
        if not self._working:
            self._metrics.busy.inc(time.monotonic() - self._began)
            self._consider()

    # ---- processes ---------------------------------------------------------------------------------------------------

    async def run(self) -> int:
        """Keep the ranks running until ``stop``; the exit code of the service."""
        server = await asyncio.start_unix_server(self._connected, self._socket)
        code = 0
        try:
            while not self._stopping:
                ended = await self._one_start()
                if self._stopping:
                    break
                if ended == BAD_INPUT and not self.facts:
                    code = BAD_INPUT
                    break
                self._fruitless += 1
                if self._fruitless > self._limits["max_restarts"]:
                    print("g2r: error: the judge's ranks have ended again and again", file=sys.stderr, flush=True)
                    code = 1
                    break
                self.state = "restarting"
                self._metrics.restarts.inc()
                warn(f"the judge's ranks have ended (code {ended}); start {self._metrics.starts + 1} follows")
                await asyncio.sleep(min(2.0 ** (self._fruitless - 1) - 1, LONGEST_PAUSE))
        finally:
            self.state = "ended"
            server.close()
            shutil.rmtree(self._directory, ignore_errors=True)
        return code

    async def stop(self) -> None:
        """End the ranks: those that live when the front has closed the connection are ended by signals."""
        self._stopping = True
        self._lose()

    @property
    def _socket(self) -> str:
        return str(self._directory / "socket")

    async def _one_start(self) -> int:
        """Start the ranks and wait until they have all ended; the worst of their exit codes."""
        codes = self._directory / f"codes_{self._metrics.starts}"
        codes.mkdir()
        self._metrics.starts += 1
        self._lost = asyncio.Event()
        environment = {**os.environ, SOCKET_VARIABLE: self._socket, "G2R_EXIT_CODES": str(codes)}
        environment.setdefault("TORCH_ELASTIC_SHUTDOWN_TIMEOUT", "5")
        self._process = await asyncio.create_subprocess_exec(
            *self._command, env=environment, stdin=asyncio.subprocess.DEVNULL, start_new_session=True
        )
        ended = asyncio.create_task(self._process.wait())
        lost = asyncio.create_task(self._lost.wait())
        await asyncio.wait({ended, lost}, return_when=asyncio.FIRST_COMPLETED)
        self._lose()
        await self._end_processes(ended)
        lost.cancel()
        found = [int(file.read_text()) for file in codes.iterdir()]
        return BAD_INPUT if BAD_INPUT in found else self._process.returncode

    async def _end_processes(self, ended: asyncio.Task[int]) -> None:
        """Wait for the launcher, which ends its ranks; then end whatever of its session still lives."""
        for number, seconds in ((None, 2.0), (signal.SIGTERM, LAUNCHER_SECONDS), (signal.SIGKILL, LAUNCHER_SECONDS)):
            if number is not None:
                self._signal(number)
            done, _ = await asyncio.wait({ended}, timeout=seconds)
            if done:
                break
        self._signal(signal.SIGKILL)

    def _signal(self, number: signal.Signals) -> None:
        try:
            os.killpg(self._process.pid, number)
        except ProcessLookupError:
            return

    async def _connected(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Serve the first rank's connection until it ends."""
        first = await read_message(reader)
        if first is None or self._writer is not None or self._stopping:
            writer.close()
            return
        self._writer, self.facts, self.state = writer, first[0]["ready"], "ready"
        self.on_ready()
        while (message := await read_message(reader)) is not None:
            self._take(*message)
        if self._writer is writer:
            self._lose()

    def _lose(self) -> None:
        """The ranks are gone or about to be: nobody waits for them any longer."""
        if self._writer is not None:
            self._writer.close()
            self._writer = None
        if self.state == "ready":
            self.state = "restarting"
        for job in [*self._working.values(), *self._backlog.take(sys.maxsize)]:
            if not job.answer.done():
                job.answer.set_exception(NoJudge())
        self._working = {}
        self._lost.set()
