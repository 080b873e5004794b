"""The decode loop as part of the program: which token comes next, and what the next step is fed."""

from .build import Feed, append_loop
from .callable import Launched, Loop, host_loop
from .state import LoopState, Sampling

__all__ = ["Feed", "Loop", "LoopState", "Launched", "Sampling", "append_loop", "host_loop"]
