"""Seconds of a step's phases."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from g2r_megatron.device import stopwatch


class PhaseTimes:
    """``with times("sample"):`` shows the phase and adds its seconds to ``time/sample``."""

    def __init__(self, show: Callable[[str], None]):
        """``show`` is called with the name of each phase that begins."""
        self._show, self._seconds = show, {}

    @contextmanager
    def __call__(self, name: str, shown: bool = True) -> Iterator[None]:
        if shown:
            self._show(name)
        seconds = stopwatch()
        yield
        self._seconds[name] = self._seconds.get(name, 0.0) + seconds()

    def metrics(self) -> dict[str, float]:
        """Seconds by ``time/NAME``."""
        return {f"time/{name}": seconds for name, seconds in self._seconds.items()}
