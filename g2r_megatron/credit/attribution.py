"""From the judge's gradient scores b_t to token weights alpha_t and token rewards r_t (docs/method.md, steps 3-5).

Pure tensor functions of one response. T is the number of tokens of the response body (without the stop
token); T = 0 gives empty tensors. Arithmetic is fp64 inside and fp32 outside, so that results do not depend on
the order in which ranks or micro-batches delivered b.
"""

import random
from dataclasses import dataclass

import torch
from torch import Tensor

from g2r_megatron.credit.alignment import Alignment

# b whose spread is below this share of its largest entry is constant up to fp32 rounding of the judge.
CONSTANT_SPREAD = 1e-6


def pooled_weights(weights: list[float]) -> list[float]:
    """Factors c_k of the items in the one backward of ``judge.credit=per_response``, from their weights w_k (not all 0).

    b_t = sum_k c_k b_kt with c_k = s w_k / sum_j |w_j|, s the sign of sum_j w_j (of + for 0). Then alpha = softmax(b / tau)
    stands for every one of these items, as ``per_item`` does to first order: sum_k w_k (1 + b_kt) is
    (sum_k w_k) (1 + b_t) there, up to the size of b. Two things follow: one item alone has c = 1, whatever its weight,
    so that weights do not change the softmax's temperature; and where pitfalls outweigh the rest, the blame goes to the
    tokens they rest on, because r_t = alpha_t r with r < 0.
    """
    sign = -1.0 if sum(weights) < 0 else 1.0
    total = sum(abs(weight) for weight in weights)
    return [sign * weight / total for weight in weights]


def is_informative(b: Tensor) -> bool:
    """Whether b [T] can rank tokens: finite everywhere and not constant (a zero gradient is constant)."""
    if b.numel() < 2 or not bool(torch.isfinite(b).all()):
        return False
    b = b.double()
    return bool(b.std(unbiased=False) > CONSTANT_SPREAD * b.abs().max())


@dataclass(frozen=True)
class Weighting:
    """How b becomes alpha; see ``JudgeConfig``. ``tau`` and ``standardize`` are of the softmax."""

    normalize: str  # "softmax" or "positive"
    smoothing: str  # "none", "smear" or "sentence"
    tau: float = 1.0
    standardize: bool = False
    gamma: float = 0.7  # of "smear"


def alpha_from_attribution(
    b: Tensor, weighting: Weighting, sentence_ids: Tensor | None, alignment: Alignment | None = None
) -> Tensor:
    """The token weights alpha that b gives: [T] fp32, not negative, sums to 1.

    ``b``: [T] scores in any float type. ``sentence_ids``: [T] int64, needed by the smoothing "sentence". With an
    ``alignment``, b is of the judge's tokens, and T is the number of the policy's.

    ``softmax``: alpha = smoothed(softmax(b' / tau)), with b' = (b - mean b) / std b when ``standardize``, else b; with
    an alignment this softmax moves to the policy's tokens, and is smoothed there.
    ``positive``: alpha_t = max(b_t, 0) / sum_s max(b_s, 0), where the smoothing "sentence" has first replaced b_t by
    b_S / |S|, the mean over its sentence S; that is max(b_S, 0) / (|S| sum_S max(b_S, 0)) with b_S the sentence's sum. "smear"
    comes afterwards. b is additive here, so with an alignment b itself moves to the policy's tokens.

    A b that says nothing gives exactly the uniform 1/T, also after smearing, so that it changes no advantage: one that is
    not finite everywhere, and one that cannot rank tokens (``softmax``: constant or zero; ``positive``: nowhere above 0).
    ``credit.hazards.attribution_metrics`` counts zero and non-finite b.
    """
    if weighting.smoothing not in ("none", "smear", "sentence"):
        raise ValueError(f"unknown smoothing {weighting.smoothing!r}")
    kinds = {"softmax": _softmax_weights, "positive": _positive_weights}
    alpha = kinds[weighting.normalize](b, weighting, sentence_ids, alignment)
    if alpha is None:
        length = b.numel() if alignment is None else alignment.length
        return torch.full((length,), 1.0 / max(length, 1), dtype=torch.float32)
    return (smear(alpha, weighting.gamma) if weighting.smoothing == "smear" else alpha).float()


def _softmax_weights(
    b: Tensor, weighting: Weighting, sentence_ids: Tensor | None, alignment: Alignment | None
) -> Tensor | None:
    """[T] fp64 before smearing; None for a b that says nothing."""
    if not is_informative(b):
        return None
    b = b.double()
    if weighting.standardize:
        b = (b - b.mean()) / b.std(unbiased=False)
    alpha = torch.softmax(b / weighting.tau, dim=0)
    if alignment is not None:
        alpha = alignment.move(alpha)
    return average_sentences(alpha, sentence_ids) if weighting.smoothing == "sentence" else alpha


def _positive_weights(
    b: Tensor, weighting: Weighting, sentence_ids: Tensor | None, alignment: Alignment | None
) -> Tensor | None:
    """[T] fp64 before smearing; None for a b that says nothing."""
    if not bool(torch.isfinite(b).all()):
        return None
    b = b.double() if alignment is None else alignment.move(b)
    if weighting.smoothing == "sentence":
        b = average_sentences(b, sentence_ids)
    positive = b.clamp(min=0)
    total = positive.sum()
    return positive / total if bool(total > 0) else None


def shuffled(alpha: Tensor, units: Tensor, seed: str) -> Tensor:
    """``alpha`` [T] with its units in an order that ``seed`` alone decides: the same values, which say nothing any more.

    ``units``: [T] int64, the number of each token's unit (sentence or token), which never falls. Every order is equally
    likely, also the one that there is. The tokens of a unit stay together and in order.
    """
    _, sizes = units.unique_consecutive(return_counts=True)
    pieces = list(alpha.split(sizes.tolist()))
    random.Random(seed).shuffle(pieces)
    return torch.cat(pieces) if pieces else alpha


def smear(alpha: Tensor, gamma: float) -> Tensor:
    """o_t = alpha_t + gamma o_{t+1}, divided by sum_t o_t (docs/method.md): credit flows to the tokens before.

    ``alpha``: [T], sums to 1; ``gamma`` in [0, 1]. Returns [T], sums to 1, dtype of ``alpha``.
    """
    out = alpha.clone()
    # Doubling: after each round out_t = sum_{j < 2 shift} gamma^j alpha_{t+j}; log2(T) rounds replace a loop over T.
    shift, decay = 1, gamma
    while shift < out.numel():
        out[:-shift] += decay * out[shift:].clone()
        shift, decay = 2 * shift, decay * decay
    return out / out.sum()


def average_sentences(alpha: Tensor, sentence_ids: Tensor) -> Tensor:
    """alpha'_t = mean of alpha over the sentence of t (docs/method.md).

    ``alpha``: [T], or additive scores b; ``sentence_ids``: [T] int64, 0.. . Returns [T] with the same sum, dtype of ``alpha``.
    """
    if sentence_ids.shape != alpha.shape:
        raise ValueError(f"{alpha.numel()} tokens but {sentence_ids.numel()} sentence ids")
    if alpha.numel() == 0:
        return alpha
    counts = torch.bincount(sentence_ids)
    sums = torch.zeros(counts.numel(), dtype=alpha.dtype).index_add_(0, sentence_ids, alpha)
    return sums[sentence_ids] / counts[sentence_ids]


def token_rewards(
    verdicts: list[bool], weights: list[float], alphas: list[Tensor | None], positive_weight: float, length: int
) -> Tensor:
    """r_t = sum_{k True} w_k alpha_kt / sum_k max(w_k, 0) (Algorithm 1 of the paper).

    One entry per rubric item in ``verdicts``, ``weights`` and ``alphas`` (each [T] or None); a True item
    without alpha is spread uniformly, 1/T. ``positive_weight`` = sum_k max(w_k, 0) > 0; ``length`` = T.
    Returns [T] fp32 with sum_t r_t = r(x, o) (for T > 0).
    """
    rewards = torch.zeros(length, dtype=torch.float64)
    if length == 0:
        return rewards.float()
    for verdict, weight, alpha in zip(verdicts, weights, alphas, strict=True):
        if not verdict:
            continue
        if alpha is None:
            rewards += weight / length
            continue
        if alpha.shape != rewards.shape:  # broadcasting would hide a wrong span
            raise ValueError(f"alpha has shape {tuple(alpha.shape)} for a response of {length} tokens")
        rewards += weight * alpha.double()
    return (rewards / positive_weight).float()


def score_token_rewards(score: float, alpha: Tensor | None, length: int, finished: bool = False) -> Tensor:
    """r_t = alpha_t V, and the last token also gets +V (docs/method.md step 8): the response's tokens then sum to 2 V.

    ``score`` = V(x, o); ``alpha``: [T], or None for uniform, 1/T; ``length`` = T. ``finished``: a stop token follows the
    body; it is then the last token, and gets the whole 2 V of an empty body. Returns [T + finished] fp64.
    """
    rewards = torch.zeros(length + finished, dtype=torch.float64)
    if rewards.numel() == 0:
        return rewards
    if length == 0:
        rewards[-1] = score
    elif alpha is None:
        rewards[:length] = score / length
    elif alpha.shape != (length,):  # broadcasting would hide a wrong span
        raise ValueError(f"alpha has shape {tuple(alpha.shape)} for a response of {length} tokens")
    else:
        rewards[:length] = score * alpha.double()
    rewards[-1] += score
    return rewards


def response_reward(verdicts: list[bool], weights: list[float]) -> float:
    """r(x, o) = sum_k w_k 1[z_k = True] / sum_k max(w_k, 0): the rubric score, at most 1, can be negative."""
    earned = sum(weight for verdict, weight in zip(verdicts, weights, strict=True) if verdict)
    return earned / sum(max(weight, 0.0) for weight in weights)


def effective_sample_share(alpha: Tensor) -> float:
    """ESS/T = 1 / (T sum_t alpha_t^2): 1 for uniform alpha, 1/T when one token has everything; NaN for T = 0."""
    if alpha.numel() == 0:
        return float("nan")
    return 1.0 / (alpha.numel() * float(alpha.double().square().sum()))
