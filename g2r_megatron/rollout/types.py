"""What a rollout engine returns."""

from dataclasses import dataclass


@dataclass
class Response:
    """One sampled response. ``token_ids`` ends with the stop token when ``finished``."""

    prompt_ids: list[int]
    token_ids: list[int]
    finished: bool  # ended with a stop token, not cut at max_response_tokens
    text: str  # the body, decoded

    @property
    def body_ids(self) -> list[int]:
        """The tokens the judge reads: without the stop token."""
        return self.token_ids[:-1] if self.finished else self.token_ids
