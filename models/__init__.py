"""The models that the framework trains: OPT."""

from models.build import build

__all__ = ["build"]
