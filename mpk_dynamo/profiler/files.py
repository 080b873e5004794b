"""A profile as files: trace, report and figures side by side."""

from __future__ import annotations

import json
import os
from pathlib import Path

from .report import Profile
from .trace import write_trace


def write_profile(folder: str | os.PathLike[str], profile: Profile) -> Path:
    """Writes `profile-NNN.trace.json.gz`, `.txt` and `.json` (Profile.figures), with the first number that is free.
    Returns the path of the text."""
    root = Path(folder).expanduser()
    root.mkdir(parents=True, exist_ok=True)
    number = len(list(root.glob("profile-*.txt")))
    while True:
        text = root / f"profile-{number:03}.txt"
        try:
            with open(text, "x", encoding="utf-8") as file:
                file.write(f"{profile}\n")
            break
        except FileExistsError:  # another process took the number
            number += 1
    text.with_suffix(".json").write_text(json.dumps(profile.figures(), indent=1) + "\n", encoding="utf-8")
    write_trace(text.with_suffix(".trace.json.gz"), profile.timeline, profile.title)
    return text
