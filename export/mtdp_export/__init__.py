"""Turns a trained network into a bundle that the runtime runs, with the numbers that prove it equal."""

from __future__ import annotations

__version__ = "0.1.0"
