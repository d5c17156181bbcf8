"""Families of language models, built in any layout: `models.family` lists them."""

from models.build import build

__all__ = ["build"]
