"""A judge in this process, with the methods of ``g2r_megatron.client.Judge``: for a trainer that has room for it.

    judge = LocalJudge(ServeConfig(judge=JudgeConfig(model="DIR")))
    judge.credit(["Rest."], [{"criterion": "Advises rest", "weight": 1}], prompt="I have a fever.")

The answers are those of ``g2r serve`` with the same options. What belongs to HTTP (port, key, sizes) has no effect.
"""

import os
from copy import deepcopy
from threading import Lock
from typing import Any

import torch
from pydantic import ValidationError

from g2r_megatron.client import JudgeCalls, JudgeError
from g2r_megatron.config.serve_checks import check_serve_config, fill_judge
from g2r_megatron.config.serve_options import ServeConfig
from g2r_megatron.device import local_device
from g2r_megatron.errors import UserError
from g2r_megatron.parallel.cpu import import_megatron
from g2r_megatron.serve import schema

REQUESTS = {"/v1/credit": ("credit", schema.CreditRequest), "/v1/score": ("score", schema.ScoreRequest)}


class LocalJudge(JudgeCalls[list[dict[str, Any]]]):
    """One frozen judge on this process's device. Threads may call it; it answers one after another."""

    def __init__(self, config: ServeConfig):
        """Reads the model. Raises ``UserError`` for options that cannot work, and in a job of several processes: these
        share a judge through ``g2r serve``."""
        if (size := int(os.environ.get("WORLD_SIZE", 1))) > 1:
            raise UserError("LocalJudge", f"in a job of {size} processes", "start g2r serve, and give Judge its URL")
        config = fill_judge(deepcopy(config))
        check_serve_config(config, 1)
        import_megatron()
        from g2r_megatron.serve.worker import open_answerer

        self._answerer, self._lock = open_answerer(config), Lock()

    def _judged(self, path: str, request: dict[str, Any]) -> list[dict[str, Any]]:
        kind, form = REQUESTS[path]
        try:
            content = form.model_validate(request).model_dump()
        except ValidationError as error:
            raise JudgeError(422, schema.problems(error.errors())) from error
        # the caller may be inside no_grad or autocast, which are not for the judge
        ours = torch.autocast(local_device().type, enabled=False)
        with self._lock, torch.inference_mode(False), torch.enable_grad(), ours:
            ((status, answer),) = self._answerer.answers([kind], [content])
        if status != 200:
            raise JudgeError(status, answer["error"])
        return answer["responses"]
