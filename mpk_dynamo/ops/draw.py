"""How a token is drawn from a row of scores: in integers and separately rounded fp32, so that host and device agree.

Each score gets a weight, an integer proportional to its softmax: exp2 by a polynomial whose steps are rounded one by
one, scaled to 2^44 for the largest score and cut off there. Sums of integers have no order, so a row may be cut in
any way.

Filters keep an upper set of the order (score, index). top-k keeps what is not below the k-th largest score, ties
included. top-p drops, from the smallest, elements while the sum of weights up to and with the element is at most
(1 - top_p) of the sum of what top-k kept; of equal scores those with lower indices go first. min-p keeps weights of at
least min_p times the largest. The token is the first one, in the order of indices, at which the running sum of kept
weights exceeds u * total, for a uniform u in [0, 1) of 64 bits. A NaN is never drawn. A row without a finite maximum
gives token 0.
"""

from __future__ import annotations

import torch

GROUP = 64
"""Columns whose largest score is found ahead of the draw."""

LOG2_E = 1.4426950408889634
EXP2 = (1.0, 0.6931471805599453, 0.2402265069591007, 0.05550410866482158, 0.009618129107628477, 0.0013333558146428441,
        0.00015403530393381608)  # fmt: skip
"""2^f for |f| <= 1/2 by its Taylor series: relative error 2e-7, of the size of fp32's rounding."""

WEIGHT_BITS = 44
NUMBERS = {"temperature": 0, "top_k": 1, "top_p": 2, "min_p": 3, "penalty": 4}
"""Where each number of the sampling stands in the tensor of numbers, f64 [5]."""

_MASK = (1 << 32) - 1


def sort_keys(scores: torch.Tensor) -> torch.Tensor:
    """Scores as integers in [0, 2^32) of the same order; NaN as -inf, -0 as 0."""
    clean = torch.where(scores.isnan(), float("-inf"), scores.float() + 0.0)
    bits = clean.view(torch.int32).long()
    return torch.where(bits < 0, -1 - bits, bits + (1 << 31))


def weights(scores: torch.Tensor, top: torch.Tensor | None = None) -> torch.Tensor:
    """int64 weights of one row of scores, or of a part of one whose largest score is `top`."""
    clean = torch.where(scores.isnan(), float("-inf"), scores.float())
    f32 = dict(dtype=torch.float32, device=scores.device)
    x = (clean - (clean.max() if top is None else top)) * torch.tensor(LOG2_E, **f32)
    whole = torch.floor(x + 0.5)
    # differences of infinities, and what is smaller than the last bit
    fine = whole >= -WEIGHT_BITS
    whole = torch.where(fine, whole, 0.0)
    rest = torch.where(fine, x, 0.0) - whole
    value = torch.full_like(rest, EXP2[-1])
    for c in EXP2[-2::-1]:
        value = value * rest + torch.tensor(c, **f32)
    mantissa, shift = (value * float(1 << 24)).long(), whole.long() + (WEIGHT_BITS - 24)
    shifted = torch.where(shift >= 0, mantissa << shift.clamp(min=0), mantissa >> (-shift).clamp(min=0))
    return torch.where(fine, shifted, 0)


def kept_weights(scores: torch.Tensor, stages: frozenset[str], numbers: torch.Tensor) -> torch.Tensor:
    """int64 [V]: the weights of one row of scores, 0 for what a filter drops."""
    keys, w = sort_keys(scores), weights(scores)
    if "top_k" in stages:
        wanted = float(numbers[NUMBERS["top_k"]])
        k = int(min(wanted, keys.numel())) if wanted >= 1 else 1
        w = torch.where(keys >= keys.topk(k).values[-1], w, 0)
    total = int(w.sum())
    if "top_p" in stages and total:
        share = 1.0 - float(numbers[NUMBERS["top_p"]])
        dropped = min(int(min(share, 1.0) * float(total)), total - 1) if share > 0 else 0
        order = keys.sort(stable=True).indices
        w = w.index_put((order[w[order].cumsum(0) <= dropped],), torch.zeros((), dtype=w.dtype, device=w.device))
    if "min_p" in stages:
        w = above_min_p(w, numbers)
    return w


def above_min_p(w: torch.Tensor, numbers: torch.Tensor) -> torch.Tensor:
    """Weights, 0 for those that min-p drops."""
    return torch.where(w.double() >= float(numbers[NUMBERS["min_p"]]) * float(1 << WEIGHT_BITS), w, 0)


def pick(kept: torch.Tensor, uniform: int) -> int:
    """The index drawn from kept weights by a uniform integer in [0, 2^64)."""
    total = int(kept.sum())
    if not total:
        return 0
    return int(torch.searchsorted(kept.cumsum(0), (uniform * total) >> 64, right=True))


def draw(
    scores: torch.Tensor, stages: frozenset[str], numbers: torch.Tensor, key: int, step: int, sequence: int
) -> int:
    """The column drawn from one row of `scores` [V], float. stages: which of top_k, top_p, min_p apply; numbers: f64,
    see NUMBERS; key, step, sequence: 64-bit integers that name the random number."""
    return pick(kept_weights(scores, stages, numbers), uniform64(key, step, sequence))


def uniform64(key: int, step: int, sequence: int) -> int:
    """64 random bits: the first half of Philox4x32-10 of counter (step, sequence) under `key` (Salmon et al., Parallel
    random numbers: as easy as 1, 2, 3, SC 2011)."""
    c = [step & _MASK, step >> 32 & _MASK, sequence & _MASK, sequence >> 32 & _MASK]
    k = [key & _MASK, key >> 32 & _MASK]
    for _ in range(10):
        a, b = 0xD2511F53 * c[0], 0xCD9E8D57 * c[2]
        c = [b >> 32 ^ c[1] ^ k[0], b & _MASK, a >> 32 ^ c[3] ^ k[1], a & _MASK]
        k = [k[0] + 0x9E3779B9 & _MASK, k[1] + 0xBB67AE85 & _MASK]
    return c[0] | c[1] << 32
