"""Targets: what each GPU offers, as data. Needs neither torch nor cuda, except `detect`, which asks torch."""

from .detect import detect, from_properties
from .machine import Machine, machine_of
from .table import KNOWN, known, match, reference_target
from .target import FEATURES, Target, arch_of, features_of, parse_arch

__all__ = [
    "FEATURES", "KNOWN", "Machine", "Target", "arch_of", "detect", "features_of", "from_properties", "known",
    "machine_of", "match", "parse_arch", "reference_target",
]  # fmt: skip
