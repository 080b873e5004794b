"""The fake device of the runtime's tests is this folder's too, and so are the tables of operators."""

import sys
from pathlib import Path

for folder in ("runtime", "capture"):
    sys.path.insert(0, str(Path(__file__).parents[1] / folder))
