"""What the judge reads for one (response, criterion) pair, or a reward model for one response."""

from dataclasses import dataclass


@dataclass(frozen=True)
class JudgeInput:
    """One judge sequence. The response is ``input_ids[response_start:response_end]``; the logits at
    ``verdict_position`` (the last position) predict the verdict token. A reward model's score is read there."""

    input_ids: list[int]
    response_start: int
    response_end: int
    verdict_position: int
