"""From the judge's gradient scores b_t to token weights alpha_t and token rewards r_t (docs/method.md, steps 3-5).

Pure tensor functions of one response. T is the number of tokens of the response body (without the stop
token); T = 0 gives empty tensors. Arithmetic is fp64 inside and fp32 outside, so that results do not depend on
the order in which ranks or micro-batches delivered b.
"""

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


def alpha_from_attribution(
    b: Tensor,
    tau: float,
    standardize: bool,
    smoothing: str,
    gamma: float,
    sentence_ids: Tensor | None,
    alignment: Alignment | None = None,
) -> Tensor:
    """alpha = smoothed(softmax(b' / tau)), with b' = (b - mean b) / std b when ``standardize``, else b.

    ``b``: [T] scores in any float type. ``smoothing``: "none", "smear" (uses ``gamma``) or "sentence" (uses
    ``sentence_ids``: [T] int64). Returns [T] fp32 that sums to 1. With an ``alignment``, b is of the judge's tokens:
    its softmax moves to the T tokens of the policy, and is smoothed there.

    A b that cannot rank tokens (constant, zero, NaN or infinite) gives exactly the uniform 1/T, also after
    smearing, so that it changes no advantage; ``credit.hazards.attribution_metrics`` counts such b.
    """
    if not is_informative(b):
        length = b.numel() if alignment is None else alignment.length
        return torch.full((length,), 1.0 / max(length, 1), dtype=torch.float32)
    b = b.double()
    if standardize:
        b = (b - b.mean()) / b.std(unbiased=False)
    alpha = torch.softmax(b / tau, dim=0)
    if alignment is not None:
        alpha = alignment.move(alpha)
    if smoothing == "smear":
        alpha = smear(alpha, gamma)
    elif smoothing == "sentence":
        alpha = average_sentences(alpha, sentence_ids)
    elif smoothing != "none":
        raise ValueError(f"unknown smoothing {smoothing!r}")
    return alpha.float()


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

    ``alpha``: [T]; ``sentence_ids``: [T] int64, 0.. . Returns [T] with the same sum, dtype of ``alpha``.
    """
    if sentence_ids.shape != alpha.shape:
        raise ValueError(f"{alpha.numel()} tokens but {sentence_ids.numel()} sentence ids")
    if alpha.numel() == 0:
        return alpha
    counts = torch.bincount(sentence_ids)
    sums = torch.zeros(counts.numel(), dtype=alpha.dtype).index_add_(0, sentence_ids, alpha)
    return sums[sentence_ids] / counts[sentence_ids]


def sentence_ids(token_texts: list[str], delimiters: str) -> Tensor:
    """Number of each token's sentence, from 0: [T] int64.

    A token that contains one of the ``delimiters`` ends its sentence and belongs to it. Tokens of only
    delimiters and white space that follow it ("..", blank lines) stay with that sentence too. A decimal point
    that is a token of its own counts as a delimiter.
    """
    ids, current, ended = [], 0, False
    for text in token_texts:
        if ended and text.strip(delimiters).strip():
            current, ended = current + 1, False
        ids.append(current)
        ended = ended or any(char in delimiters for char in text)
    return torch.tensor(ids, dtype=torch.int64)


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
