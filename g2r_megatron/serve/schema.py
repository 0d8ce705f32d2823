"""What a request may hold. Anything else is refused with 422, before it waits for the judge.

Texts are data: nothing of them is parsed, run or looked up. Numbers are finite.
"""

from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, StringConstraints, model_validator

from g2r_megatron.config.options import AdvantageKind, Attribution

OWN_TOKENIZER = "judge"  # names the judge's own tokenizer
MAX_WEIGHT = 1e6
SHOWN_ERRORS = 5  # of a request that does not fit
Weight = Annotated[float, Field(ge=-MAX_WEIGHT, le=MAX_WEIGHT)]
TokenId = Annotated[int, Field(ge=0, lt=2**31)]
Name = Annotated[str, StringConstraints(max_length=200)]


def problems(errors: Sequence[Mapping[str, Any]]) -> str:
    """pydantic's ``errors`` in one line, which repeats nothing of the request."""
    return "; ".join(f"{'.'.join(map(str, one['loc'])) or 'body'}: {one['msg']}" for one in errors[:SHOWN_ERRORS])


def is_blank(text: str) -> bool:
    return not text.strip()


class Part(BaseModel):
    """No conversions of types, no unknown fields, no NaN."""

    model_config = ConfigDict(extra="forbid", allow_inf_nan=False, strict=True)


class Message(Part):
    """A message of the conversation; only a system message may be blank."""

    role: Literal["system", "user", "assistant"]
    content: str

    @model_validator(mode="after")
    def _has_text(self) -> Self:
        if self.role != "system" and is_blank(self.content):
            raise ValueError("content must hold a text")
        return self


class Response(Part):
    """A response as ``text``, or as ``token_ids`` of ``tokenizer``.

    ``finished``: the last of ``token_ids`` is a stop token, which the judge does not read. What the answer holds for each
    token has one entry for each of ``token_ids``, or for each of the ``spans`` (characters) that it gives of a text.
    """

    text: str | None = None
    token_ids: list[TokenId] | None = None
    finished: bool | None = None

    @model_validator(mode="after")
    def _is_one_form(self) -> Self:
        if (self.text is None) == (self.token_ids is None):
            raise ValueError("give either text or token_ids")
        if (self.finished is None) != (self.token_ids is None):
            raise ValueError("token_ids need finished, and a text has none")
        if self.finished and not self.token_ids:
            raise ValueError("a finished response has at least its stop token")
        return self


class Criterion(Part):
    """A rubric item; ``weight`` < 0 marks a fault."""

    criterion: str
    weight: Weight = 1.0

    @model_validator(mode="after")
    def _has_text(self) -> Self:
        if is_blank(self.criterion):
            raise ValueError("criterion must hold a text")
        return self


class Options(Part):
    """Null means what the service was started with."""

    deadline_seconds: Annotated[float, Field(gt=0)] | None = None


class CreditOptions(Options):
    """``attribution`` is one of the service's; the others are those of ``grpo`` in a training (docs/credit.md)."""

    attribution: Attribution | None = None
    advantage: AdvantageKind | None = None
    return_to_go: bool | None = None
    baseline: Literal["group", "rloo"] | None = None
    normalize_std: bool | None = None
    mix: Annotated[float, Field(ge=0, le=1)] | None = None
    weight_clip: Annotated[list[Weight], Field(min_length=2, max_length=2)] | None = None
    top_items: Annotated[float, Field(gt=0, le=1)] | None = None
    false_scale: Annotated[float, Field(ge=0, le=MAX_WEIGHT)] | None = None

    @model_validator(mode="after")
    def _clips_around_one(self) -> Self:
        if self.weight_clip is not None and not 0 <= self.weight_clip[0] <= 1 <= self.weight_clip[1]:
            raise ValueError("weight_clip must be [low, high] with 0 <= low <= 1 <= high")
        return self


class Request(Part):
    """A conversation, responses to it, and the rubric that they are judged by (none for a reward model)."""

    prompt: str | None = None
    messages: list[Message] | None = None
    rubric: list[Criterion] = []
    tokenizer: Name = OWN_TOKENIZER
    id: Name | None = None

    @model_validator(mode="after")
    def _is_whole(self) -> Self:
        if (self.prompt is None) == (self.messages is None):
            raise ValueError("give either prompt or messages")
        if self.prompt is not None and is_blank(self.prompt):
            raise ValueError("prompt must hold a text")
        if self.messages is not None and (not self.messages or self.messages[-1].role != "user"):
            raise ValueError("the last message must be the user's: the response comes after it")
        if self.rubric and sum(max(item.weight, 0.0) for item in self.rubric) <= 0:
            raise ValueError("no rubric item has a positive weight: the score divides by their sum")
        return self


class ScoreRequest(Request):
    """For a score and verdicts, without token credit."""

    responses: Annotated[list[Response], Field(min_length=1)]
    options: Options = Options()


class CreditRequest(Request):
    """For scores, verdicts, and what every token has earned; with several responses also their advantages."""

    responses: Annotated[list[Response], Field(min_length=1)]
    options: CreditOptions = CreditOptions()


class HideRequest(Request):
    """For what the verdicts on one response lose when a sentence is hidden; ``sentences``: their numbers, from 0."""

    response: Response
    sentences: Annotated[list[Annotated[int, Field(ge=0)]], Field(min_length=1, max_length=64)]
    options: Options = Options()


class ItemScore(BaseModel):
    """What the judge says of one rubric item."""

    criterion: str
    weight: float
    p_true: float | None
    p_false: float | None
    verdict: bool


class ItemCredit(ItemScore):
    """``alpha``: what each token has of the item, sums to 1; null for an item that is judged False or has no weight."""

    alpha: list[float | None] | None


class ResponseScore(BaseModel):
    """``items`` is not there for a reward model."""

    reward: float | None
    items: list[ItemScore] = []


class ResponseCredit(BaseModel):
    """``spans``: characters [first, last + 1) of each token of a text. ``sentences``: the same in tokens, of each sentence.

    ``alpha`` is there for a reward model alone, instead of ``items``.
    """

    reward: float | None
    items: list[ItemCredit] = []
    alpha: list[float | None] | None = None
    spans: list[list[int]] | None = None
    sentences: list[list[int]]
    token_rewards: list[float | None]
    advantages: list[float | None] | None = None


class ScoreAnswer(BaseModel):
    """One entry a response, in order."""

    responses: list[ResponseScore]


class CreditAnswer(BaseModel):
    """One entry a response, in order."""

    responses: list[ResponseCredit]


class HideAnswer(BaseModel):
    """The margin log p(True) - log p(False) (a reward model's score) of each item: whole, and without each sentence."""

    margins: list[float | None]
    hidden: list[list[float | None]]


class Failure(BaseModel):
    """Why there is no answer."""

    error: str
