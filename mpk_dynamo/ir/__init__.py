"""Intermediate representations: frozen dataclasses over the standard library. No torch, no cuda."""
