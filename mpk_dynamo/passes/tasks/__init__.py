"""From a Graph to a TaskGraph with events."""

from .coalesce_events import coalesce_events
from .derive_events import derive_events
from .order_conflicts import order_conflicts
from .tile import tile

__all__ = ["coalesce_events", "derive_events", "order_conflicts", "tile"]
