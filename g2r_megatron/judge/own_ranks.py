"""The judge on ranks of its own (``judge.ranks``): it judges one part of the batch while the policy samples the next.

The policy's side submits parts without waiting, and asks for the judgements when it needs them. The judge's side
(``serve``) takes the parts in order until the policy tells it to end. Both are collective over their side's world.
"""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta

from g2r_megatron.config.options import GrpoConfig
from g2r_megatron.credit.judgements import JudgementRow
from g2r_megatron.errors import UserError
from g2r_megatron.judge.parts import Judged, Part, judge_part, metrics_of
from g2r_megatron.judge.stage import JudgeStage
from g2r_megatron.parallel import preemption
from g2r_megatron.parallel.sides import FIRST_JUDGE, POLICY, from_first_rank, open_channel, packed, unpacked


class OwnRanks:
    """The judge ranks as the policy's ranks see them. Every ``UserError`` that they raise is raised here too."""

    def __init__(self, judge_ranks: int, timeout: timedelta):
        self._timeout = timeout  # for an answer
        self._channel = open_channel(judge_ranks)  # None but on the first rank
        self._parts = 0  # at the judge
        self._ended = False

    def wait_until_ready(self) -> None:
        """Until the judge's weights are loaded."""
        self._receive()

    def submit(self, part: Part) -> None:
        """Send ``part`` to the judge ranks; returns at once."""
        if self._channel is not None:
            self._channel.send(self._channel.judges, packed(part.plain()))
        self._parts += 1

    def judge_submitted(self) -> tuple[list[JudgementRow], dict[str, float]]:
        """Wait for the judgements of all parts submitted, in order; ``metrics_of`` them, seconds waited and worked there."""
        start = time.perf_counter()
        judged = [Judged.from_plain(*self._receive()) for _ in range(self._parts)]
        self._parts = 0
        worked = (p.verdict_seconds + p.attribution_seconds + p.faithful_seconds for p in judged)
        metrics = metrics_of(judged) | {"time/judge_wait": time.perf_counter() - start, "time/judge_busy": sum(worked)}
        return [row for part in judged for row in part.judgements], metrics

    def _receive(self):
        value, numbers = unpacked(
            from_first_rank(self._channel.receive(FIRST_JUDGE, self._timeout) if self._channel else None)
        )
        if "error" in value:
            self._ended = True
            raise UserError(*value["error"])
        return value, numbers

    def end(self) -> None:
        """Let the judge ranks end, unless they have by themselves."""
        if self._channel is not None and not self._ended:
            self._channel.send(self._channel.judges, packed(None))
            self._channel.flush(self._timeout)
        self._ended = True


@contextmanager
def own_ranks(judge_ranks: int, timeout_minutes: float) -> Iterator[OwnRanks | None]:
    """The judge ranks. They end when the block ends, also by an error. None when ``judge_ranks`` is 0.

    An answer that takes longer than ``timeout_minutes`` is an error.
    """
    if not judge_ranks:
        yield None
        return
    judge = OwnRanks(judge_ranks, timedelta(minutes=timeout_minutes))
    try:
        yield judge
    finally:
        judge.end()


def serve(judge_ranks: int, build: Callable[[], JudgeStage], grpo: GrpoConfig) -> None:
    """What a judge rank does: ``build`` the judge, then judge what the policy sends until it sends the end."""
    channel = open_channel(judge_ranks)

    def reply(value, numbers=None) -> None:
        if channel.number == FIRST_JUDGE:
            channel.send([POLICY], packed(value, numbers))

    try:
        stage = build()
        reply({"ready": True})
        while (request := unpacked(channel.receive(POLICY))[0]) is not None:
            reply(*judge_part(stage, Part.from_plain(request), grpo).plain())
            preemption.tell_other_side()
    except UserError as error:
        reply({"error": [error.where, error.found, error.remedy]})
        channel.flush()
        raise
