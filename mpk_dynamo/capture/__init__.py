"""Capture: the only part that knows torch.fx. Dynamo's graph -> `ir.Graph`."""

from .importer import Captured, capture

__all__ = ["Captured", "capture"]
