"""TRL's GRPO with the token credit of a judge: a ``GRPOTrainer`` whose advantages are [B, T], one a token.

    trainer = CreditTrainer(Judge("http://127.0.0.1:8000"), model=..., args=GRPOConfig(...), train_dataset=...)

or with the judge in this process (serve/local.py) in the place of ``Judge(url)``.

The data set has a column ``rubric``: a list of ``{"criterion", "weight"}`` (empty for a reward model). The judge reads the
column ``prompt``, a text or messages, or ``judge_prompt`` where the policy's prompt has another form. The reward that TRL
logs is the judge's score; TRL's own advantages are replaced by those of the judge's estimator, so TRL's scale_rewards has
no effect.
"""

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Protocol

import torch
from accelerate.utils import gather
from trl import GRPOTrainer

TOKEN_LOSSES = ("grpo", "bnpo", "dr_grpo", "dapo", "cispo")  # loss_type whose advantages may differ by token
REQUESTS_AT_ONCE = 16


class CreditSource(Protocol):
    """``client.Judge`` of a service, ``serve.local.LocalJudge`` in this process, or anything that gives credit in their way."""

    def credit(self, responses: Sequence[Any], rubric: Sequence[Any], **options: Any) -> list[dict[str, Any]]:
        """One entry a response with ``reward``, ``token_rewards`` and, of several responses, ``advantages``."""
        ...


def judge_score(*args: Any, **kwargs: Any) -> list[float]:
    """Names the reward in TRL's logs. Never called: ``CreditTrainer`` asks for scores and credit at once."""
    raise RuntimeError("the judge's score comes with its credit (CreditTrainer._calculate_rewards)")


class CreditTrainer(GRPOTrainer):
    """``GRPOTrainer`` with one judge in the place of reward functions."""

    def __init__(
        self,
        judge: CreditSource,
        *,
        tokenizer: str = "judge",
        credit: dict[str, Any] | None = None,
        **kwargs: Any,
    ):
        """``tokenizer``: the service's name of the policy's tokenizer. ``credit``: options of ``Judge.credit``, e.g.
        ``{"advantage": "itemwise", "mix": 0.5}``. All else is ``GRPOTrainer``'s.

        Raises ``ValueError`` for options of TRL that cannot take an advantage for each token.
        """
        super().__init__(reward_funcs=[judge_score], **kwargs)
        self._judge, self._tokenizer_name, self._credit_options = judge, tokenizer, credit or {}
        self._advantages: list[list[float]] = []  # of this process's completions, in their order
        if (loss := vars(self.args)["loss_type"]) not in TOKEN_LOSSES:
            raise ValueError(f"loss_type {loss} has one advantage a sequence: use {', '.join(TOKEN_LOSSES)}")
        for option in ("use_liger_kernel", "off_policy_mask_threshold"):
            if getattr(self.args, option, None):
                raise ValueError(f"{option} needs one advantage a sequence: leave it out")

    def _calculate_rewards(
        self, inputs: list[dict], prompts: list, completions: list, completion_ids_list: list[list[int]]
    ) -> torch.Tensor:
        """The judge's scores [all processes' completions, 1]; keeps the advantages of this process's."""
        size = self.num_generations if self.model.training else self.num_generations_eval
        if len(inputs) % size:
            raise ValueError(
                f"{len(inputs)} completions a process are not whole groups of {size}: make per_device_train_batch_size x "
                "steps_per_generation a multiple of num_generations"
            )
        groups = [range(i, i + size) for i in range(0, len(inputs), size)]
        with ThreadPoolExecutor(REQUESTS_AT_ONCE) as threads:
            answers = threads.map(
                lambda group: self._ask(inputs[group[0]], [completion_ids_list[i] for i in group]), groups
            )
            found = [response for answer in answers for response in answer]
        self._advantages = [response.get("advantages") or [0.0] * len(response["token_rewards"]) for response in found]
        rewards = torch.tensor([[response["reward"]] for response in found], device=self.accelerator.device)
        return gather(rewards)

    def _ask(self, example: dict, token_ids: list[list[int]]) -> list[dict[str, Any]]:
        """Credit of one prompt's completions."""
        prompt = example.get("judge_prompt") or example["prompt"]
        asked = {"prompt": prompt} if isinstance(prompt, str) else {"messages": prompt}
        rubric = [{"criterion": item["criterion"], "weight": item["weight"]} for item in example.get("rubric") or ()]
        responses = [(ids, bool(ids) and ids[-1] == self._tokenizer.eos_token_id) for ids in token_ids]
        return self._judge.credit(responses, rubric, **asked, tokenizer=self._tokenizer_name, **self._credit_options)

    def _generate_and_score_completions(self, inputs: list[dict]) -> dict[str, Any]:
        """As TRL's, with ``advantages`` [B, T] fp32 aligned to ``completion_ids``, 0 on padding."""
        output = super()._generate_and_score_completions(inputs)
        output["advantages"] = padded(self._advantages, output["completion_ids"])
        return output


def padded(advantages: Sequence[Sequence[float]], like: torch.Tensor) -> torch.Tensor:
    """[B, T] fp32 of lists of at most T numbers; ``like``: completion ids [B, T], padded on the right."""
    if len(advantages) != len(like) or any(len(one) > like.size(1) for one in advantages):
        raise ValueError(f"advantages of {[len(one) for one in advantages]} tokens for completions {tuple(like.shape)}")
    table = torch.zeros(like.shape, dtype=torch.float32, device=like.device)
    for row, values in zip(table, advantages, strict=True):
        row[: len(values)] = torch.tensor(values, dtype=torch.float32)
    return table
