"""An engine that samples nothing. It returns the responses that another run has sampled (``rollout.replay``)."""

from collections.abc import Callable, Sequence
from pathlib import Path

from g2r_megatron.errors import UserError
from g2r_megatron.parallel.agreement import raised_by_all
from g2r_megatron.rollout.recording import OPTION, read_batch
from g2r_megatron.rollout.types import Request, Sampled


class ReplayEngine:
    """Returns recorded responses by their keys, with the sampler's log-probs where they were recorded."""

    def __init__(self, directory: Path, vocab: int):
        """``directory``: of a ``rollout.dump``; ``vocab``: tokens of the policy."""
        self._directory, self._vocab = directory, vocab
        self._name = ""  # of the batch that was read last
        self._batch: dict[str, tuple[list[int], Sampled]] = {}

    def rest(self) -> None:
        """Nothing to do."""

    def take_weights(self) -> None:
        """Nothing to do: the recorded responses do not depend on these weights."""

    def generate(
        self,
        requests: Sequence[Request],
        temperature: float | None = None,
        on_progress: Callable[[int], None] = lambda n: None,
        between_batches: Callable[[], None] = lambda: None,
    ) -> list[Sampled]:
        """What was sampled for every request (collective). The temperature is what it was then.

        Raises ``UserError`` for a request that was not recorded, or with another prompt.
        """
        between_batches()
        with raised_by_all():
            sampled = [self._sampled(request) for request in requests]
        on_progress(len(sampled))
        return sampled

    def _sampled(self, request: Request) -> Sampled:
        path = self._directory / f"{request.batch}.safetensors"
        if request.batch != self._name:
            self._batch, self._name = read_batch(path, self._vocab), request.batch
        prompt, sampled = self._batch.get(request.key, (None, None))
        if sampled is None or prompt != request.prompt_ids:
            found = "no response" if sampled is None else "another prompt"
            raise UserError(OPTION, f"{path} has {found} for {request.key!r}", "give the data and options of the dump")
        return sampled
