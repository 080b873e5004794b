"""Capture: the only part that knows torch.fx. Dynamo's graph -> `ir.Graph`."""

from .importer import Alias, Captured, capture

__all__ = ["Alias", "Captured", "capture"]
