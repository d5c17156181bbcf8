"""Llama and the families that share its layers: Mistral, Qwen2 and Qwen3."""
