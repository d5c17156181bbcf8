"""The families of models that the library trains: GPT-2, Llama, Mistral, OPT, Qwen2 and Qwen3."""

from models.build import build

__all__ = ["build"]
