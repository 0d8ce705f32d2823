"""The logits of two checkpoints on one text: fp32, through the Megatron model, in one process."""

from dataclasses import dataclass

import torch

from g2r_megatron.config.options import Layout, Precision
from g2r_megatron.device import local_device
from g2r_megatron.errors import UserError
from g2r_megatron.model.build import build_model
from g2r_megatron.model.hf import HFModel, load_model_tokenizer
from g2r_megatron.parallel.groups import build_groups

TOLERANCE = 1e-5  # of the largest logit
TEXT = (
    "The quick brown fox jumps over the lazy dog. Der schnelle braune Fuchs springt über den faulen Hund. "
    "Le renard brun saute par-dessus le chien paresseux. 敏捷的棕色狐狸跳过了懒狗。 素早い茶色の狐がのろまな犬を飛び越える。 "
    "Быстрая коричневая лиса прыгает через ленивую собаку. def f(x): return x**2 + 3*x - 1  # 10, 25, 1024"
)


@dataclass(frozen=True)
class LogitReport:
    """``absolute``: largest difference; ``relative``: of the largest logit; ``agreement``: positions of equal top-1."""

    tokens: int
    absolute: float
    relative: float
    agreement: float

    @property
    def equal(self) -> bool:
        return self.relative <= TOLERANCE

    def __str__(self) -> str:
        return (
            f"logits of {self.tokens} tokens: largest difference {self.absolute:.3g}, "
            f"relative {self.relative:.3g} (at most {TOLERANCE:.0e}), top-1 equal at {self.agreement:.1%}"
        )


def compare_logits(a: HFModel, b: HFModel, text: str | None) -> LogitReport:
    """Run both on ``text`` in the tokens of ``a``. Raises ``UserError`` for models with other vocabularies."""
    if a.geometry.vocab != b.geometry.vocab:
        raise UserError(
            "--logits",
            f"vocabularies of {a.geometry.vocab} and {b.geometry.vocab}",
            "compare models with the same tokens",
        )
    if a.geometry.is_reward_model != b.geometry.is_reward_model:
        raise UserError(
            "--logits", f"{a.architecture} and {b.architecture}", "a score can only be compared with a score"
        )
    ids = load_model_tokenizer(a)(TEXT if text is None else text, add_special_tokens=False)["input_ids"]
    if not ids:
        raise UserError("--text", repr(text), "must hold at least one token")
    left, right = checkpoint_logits(a, ids), checkpoint_logits(b, ids)
    absolute = (left - right).abs().max().item()
    agreement = (left.argmax(-1) == right.argmax(-1)).float().mean().item()
    return LogitReport(len(ids), absolute, absolute / max(left.abs().max().item(), 1e-30), agreement)


def checkpoint_logits(hf: HFModel, ids: list[int]) -> torch.Tensor:
    """[tokens, vocabulary], or [tokens, 1] of a reward model's scores; fp32, on the CPU."""
    model = build_model("verify", hf, build_groups("verify", Layout()), Precision(dtype="fp32"))
    model.freeze()
    tokens = torch.tensor([ids], device=local_device())  # [1, s]
    with torch.no_grad():
        output = model.modules[0](tokens, None, None)  # [1, s, padded vocabulary or 1]
    return output[0, :, : hf.geometry.vocab].float().cpu()
