"""The accuracy gate: no time is printed for results that are worse than eager's own."""

from __future__ import annotations

import copy
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch

from .decoder import Decoder

if TYPE_CHECKING:
    from transformers import PreTrainedModel

FACTOR = 1.25
KL_MARGIN = 1e-6
ERROR_MARGIN = 5e-4
"""A result passes when its mean KL divergence and its relative error are at most FACTOR times eager's, plus the
margin. Both are rounding noise, so for the mean of few tokens two standard errors are allowed on top; that no single
token hides in them is seen to by its own bound, OUTLIER times eager's worst."""
OUTLIER = 5.0


@dataclass(frozen=True)
class Accuracy:
    """Against fp32, over all steps and sequences. kl: mean KL(reference || result) in nats, kl_max: the greatest;
    error: |result - reference| / |reference| of all logits; same_token: share of equal greedy tokens; kls: KL of
    each token, [steps * B]."""

    kl: float
    kl_max: float
    error: float
    same_token: float
    kls: torch.Tensor = field(repr=False, compare=False)

    def excess(self, eager: "Accuracy") -> str:
        """Why this result fails the gate against eager's own over the same tokens, or "" when it passes."""
        paired = self.kls - FACTOR * eager.kls
        noise = 2 * paired.std().item() / len(paired) ** 0.5 if len(paired) > 1 else 0.0
        checks = (
            ("mean KL divergence", self.kl, eager.kl, FACTOR * eager.kl + KL_MARGIN + noise),
            ("greatest KL divergence", self.kl_max, eager.kl_max, OUTLIER * eager.kl_max + KL_MARGIN),
            ("relative error", self.error, eager.error, FACTOR * eager.error + ERROR_MARGIN),
        )
        for name, value, base, bound in checks:
            if not value <= bound:  # written so that nan fails
                return f"{name} {value:.3g}, eager's own is {base:.3g}, allowed is {bound:.3g}"
        return ""

    def figures(self) -> dict[str, float]:
        """The numbers, without those of each token."""
        return {name: getattr(self, name) for name in ("kl", "kl_max", "error", "same_token")}


def accuracy(reference: torch.Tensor, result: torch.Tensor) -> Accuracy:
    """Compare logits [steps, B, vocabulary] in fp32."""
    p, q = reference.log_softmax(-1), result.log_softmax(-1)
    kls = (p.exp() * (p - q)).sum(-1).flatten()
    error = (result - reference).norm() / reference.norm()
    same = (reference.argmax(-1) == result.argmax(-1)).float().mean()
    return Accuracy(kls.mean().item(), kls.max().item(), error.item(), same.item(), kls)


def reference_logits(model: "PreTrainedModel", **decoder: int) -> torch.Tensor:
    """Logits of an fp32 copy of the model, with its own fp32 cache, over the same tokens. The copy is freed."""
    wide = copy.deepcopy(model).float()
    return Decoder(wide, **decoder).logits(wide)
