"""Files: written whole or not at all, read with care, and where this repository keeps its own."""

from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
"""The repository, with its `data` and `docs`."""
