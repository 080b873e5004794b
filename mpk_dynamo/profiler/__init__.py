"""Profiler: what a launch says about itself, as a timeline, a trace and a report. Needs neither torch nor cuda."""
