"""Profiler: what a launch's clocks say, as a timeline, a trace and a report. Needs neither torch nor cuda."""

from .decode import decode
from .files import write_profile
from .report import Profile
from .trace import write_trace

__all__ = ["Profile", "decode", "write_profile", "write_trace"]
