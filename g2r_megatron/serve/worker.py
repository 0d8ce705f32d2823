"""What the judge's ranks do behind the HTTP front: take requests from it, judge them together, answer.

The first rank is connected to the front; it passes every batch on to the others. All ranks end when the front does.
"""

import json
import os
from typing import Any

import torch
import torch.distributed as dist

from g2r_megatron.config.serve_options import ServeConfig
from g2r_megatron.errors import RunError, UserError
from g2r_megatron.model.build import build_model, check_model
from g2r_megatron.model.hf import open_hf_model
from g2r_megatron.parallel import groups
from g2r_megatron.parallel.sides import from_first_rank
from g2r_megatron.serve.answers import Answer, Answerer, refusal
from g2r_megatron.serve.protocol import SOCKET_VARIABLE, Connection, Message

IDLE_SECONDS = 60.0  # other ranks hear from the first one at least as often: a collective must not wait for longer
NOTHING, END = b"[]", b"null"


def serve_as_rank(config: ServeConfig) -> None:
    """Judge what the front sends until it closes the connection (collective).

    ``config`` is resolved. Raises ``UserError`` for models, tokenizers or layouts that cannot work, before the weights
    are read.
    """
    answerer = open_answerer(config)
    first = dist.get_rank() == 0
    connection = Connection(os.environ[SOCKET_VARIABLE]) if first else None
    if first:
        connection.send({"ready": facts(config, answerer)})
    while (batch := next_batch(connection)) is not None:
        jobs, requests = batch
        if not jobs:
            continue
        answers = judged(answerer, [job["kind"] for job in jobs], requests)
        if first:
            send(connection, jobs, answers)


def open_answerer(config: ServeConfig) -> Answerer:
    """The judge of ``config``, ready to answer (collective). Errors as of ``serve_as_rank``."""
    hf = open_hf_model(config.judge.model, "judge.model")
    check_model("judge", hf, config.judge.layout, config.judge.precision, config.judge.spec)
    answerer = Answerer(hf, config)
    groups.initialize(config.seed)
    layout = groups.build_groups("judge", config.judge.layout)
    answerer.use(build_model("judge", hf, layout, config.judge.precision, config.judge.recompute, config.judge.spec))
    return answerer


def judged(answerer: Answerer, kinds: list[str], requests: list[dict]) -> list[Answer]:
    """One answer a request. Where one rank is the whole judge, a request that does not fit into its memory fails alone.

    Of several ranks one could find that and the others wait for it: then the error ends them, and the front starts
    new ones.
    """
    try:
        return answerer.answers(kinds, requests)
    except UserError as error:
        if dist.get_world_size() > 1:
            raise
        if len(requests) == 1:
            return [refusal(error)]
        return [
            answer
            for kind, request in zip(kinds, requests, strict=True)
            for answer in judged(answerer, [kind], [request])
        ]


def send(connection: Connection, jobs: list[dict], answers: list[Answer]) -> None:
    """Answer ``jobs``. A front that has ended meanwhile is noticed by the next ``receive``."""
    for job, (status, answer) in zip(jobs, answers, strict=True):
        try:
            connection.send({"id": job["id"], "status": status}, json.dumps(answer, allow_nan=False).encode())
        except ConnectionError:
            return


def facts(config: ServeConfig, answerer: Answerer) -> dict[str, Any]:
    """What /v1/models says of the judge."""
    kinds, names = ([*dict.fromkeys(key[i] for key in answerer.prompts)] for i in range(2))
    return {
        "model": os.path.basename(os.path.abspath(config.judge.model)),
        "is_reward_model": not next(iter(answerer.prompts.values())).needs_rubric,
        "attributions": kinds,
        "tokenizers": names,
        "target": config.judge.target,
        "max_length": config.judge.max_length,
        "ranks": dist.get_world_size(),
    }


def next_batch(connection: Connection | None) -> tuple[list[dict], list[dict]] | None:
    """(jobs, requests) on every rank; both empty when none has come for a while; None at the end (collective)."""
    message = None
    if connection is not None:
        message = _received(connection)
    text = bytes(from_first_rank(_tensor(message)).numpy())
    content = json.loads(text)
    return None if content is None else (content[0::2], content[1::2])


def _received(connection: Connection) -> bytes:
    """[job, request, job, request, ...] as JSON."""
    try:
        received: Message | None = connection.receive(IDLE_SECONDS)
    except ConnectionError:
        return END
    if received is None:
        return NOTHING
    header, body = received
    requests = json.loads(body)
    if len(requests) != len(header["jobs"]):
        raise RunError(f"the front sent {len(header['jobs'])} jobs with {len(requests)} requests")
    return json.dumps([part for pair in zip(header["jobs"], requests, strict=True) for part in pair]).encode()


def _tensor(message: bytes | None) -> torch.Tensor | None:
    return None if message is None else torch.frombuffer(bytearray(message), dtype=torch.uint8)
