"""Targets: what each GPU offers, as data. Needs neither torch nor cuda, except `detect`, which asks torch."""

from .detect import detect, from_properties
from .table import KNOWN, known, match, reference_target
from .target import FEATURES, Target, arch_of, features_of, parse_arch

__all__ = [
    "FEATURES", "KNOWN", "Target", "arch_of", "detect", "features_of", "from_properties", "known", "match",
    "parse_arch", "reference_target",
]  # fmt: skip
