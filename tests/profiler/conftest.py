"""Finds the task programs written as text."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "passes_tasks"))
