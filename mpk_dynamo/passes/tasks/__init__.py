"""From a Graph to a TaskGraph with events."""

from .choose_flagged import choose_flagged
from .coalesce_events import coalesce_events
from .derive_events import derive_events
from .flagged_edges import flagged_edges
from .order_conflicts import order_conflicts
from .tile import tile

__all__ = ["choose_flagged", "coalesce_events", "derive_events", "flagged_edges", "order_conflicts", "tile"]
