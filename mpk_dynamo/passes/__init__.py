"""Passes: plain functions from one stage to the same or the next, one verb-named file each."""
