"""The accuracy gate: no time is printed for results that are worse than eager's own."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from .decoder import Decoder

if TYPE_CHECKING:
    from transformers import PreTrainedModel

FACTOR = 1.25
KL_MARGIN = 1e-6
ERROR_MARGIN = 5e-4
"""A result passes when each measure is at most FACTOR times eager's, plus the margin."""


@dataclass(frozen=True)
class Accuracy:
    """Against fp32, over all steps and sequences: mean and greatest KL(reference || result) in nats, the relative
    error |result - reference| / |reference| of the worst step, and the share of equal greedy tokens."""

    kl: float
    kl_max: float
    error: float
    same_token: float

    def excess(self, eager: "Accuracy") -> str:
        """Why this result fails the gate against eager's own, or "" when it passes."""
        checks = (
            ("mean KL divergence", self.kl, eager.kl, KL_MARGIN),
            ("greatest KL divergence", self.kl_max, eager.kl_max, 4 * KL_MARGIN),
            ("relative error", self.error, eager.error, ERROR_MARGIN),
        )
        for name, value, base, margin in checks:
            if not value <= FACTOR * base + margin:  # written so that nan fails
                return f"{name} {value:.3g}, eager's own is {base:.3g}"
        return ""


def accuracy(reference: torch.Tensor, result: torch.Tensor) -> Accuracy:
    """Compare logits [steps, B, vocabulary] in fp32."""
    p, q = reference.log_softmax(-1), result.log_softmax(-1)
    kl = (p.exp() * (p - q)).sum(-1)
    error = (result - reference).flatten(1).norm(dim=1) / reference.flatten(1).norm(dim=1)
    same = (reference.argmax(-1) == result.argmax(-1)).float().mean()
    return Accuracy(kl.mean().item(), kl.max().item(), error.max().item(), same.item())


def reference_logits(model: "PreTrainedModel", **decoder: int) -> torch.Tensor:
    """Logits of an fp32 copy of the model, with its own fp32 cache, over the same tokens. The copy is freed."""
    wide = copy.deepcopy(model).float()
    return Decoder(wide, **decoder).logits(wide)
