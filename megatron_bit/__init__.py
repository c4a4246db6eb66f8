"""Distributed pretraining of bitwise-diffusion language models (BitLM)."""

__version__ = "0.1.0"
