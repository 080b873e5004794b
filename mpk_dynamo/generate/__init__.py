"""HF's `generate()` on the decode loop: what the host does around the launches."""
