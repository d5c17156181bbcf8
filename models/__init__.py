"""The models that the library trains: OPT."""

from models.build import build

__all__ = ["build"]
