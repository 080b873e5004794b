"""From a Graph to a TaskGraph with events."""

from .coalesce_events import coalesce_events
from .derive_events import derive_events
from .tile import tile

__all__ = ["coalesce_events", "derive_events", "tile"]
