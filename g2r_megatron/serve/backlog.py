"""Requests that wait for the judge, in order; bounded by their number and their bytes."""

import asyncio
from collections import OrderedDict
from dataclasses import dataclass, field
from itertools import count

_numbers = count(1)


class Full(Exception):
    """No more requests may wait."""


@dataclass
class Waiting:
    """A request. ``rows``: its responses; ``answer``: gets (status, JSON bytes), or an exception."""

    kind: str
    content: bytes
    rows: int
    answer: asyncio.Future[tuple[int, bytes]]
    number: int = field(default_factory=lambda: next(_numbers))


class Backlog:
    """First come, first served, so that no request delays another by more than its own work."""

    def __init__(self, most: int, most_bytes: int):
        self._most, self._most_bytes = most, most_bytes
        self._waiting: OrderedDict[int, Waiting] = OrderedDict()
        self._bytes = 0

    def __len__(self) -> int:
        return len(self._waiting)

    @property
    def rows(self) -> int:
        return sum(job.rows for job in self._waiting.values())

    def add(self, job: Waiting) -> None:
        """Raises ``Full``; a single request of more than all bytes may wait alone."""
        if len(self._waiting) >= self._most or (self._waiting and self._bytes + len(job.content) > self._most_bytes):
            raise Full
        self._waiting[job.number] = job
        self._bytes += len(job.content)

    def remove(self, job: Waiting) -> bool:
        """Whether ``job`` was still waiting."""
        if self._waiting.pop(job.number, None) is None:
            return False
        self._bytes -= len(job.content)
        return True

    def take(self, most_rows: int) -> list[Waiting]:
        """The first requests of ``most_rows`` responses in all, at least one request if any waits."""
        taken: list[Waiting] = []
        rows = 0
        for job in list(self._waiting.values()):
            if taken and rows + job.rows > most_rows:
                break
            taken.append(job)
            rows += job.rows
            self.remove(job)
        return taken
