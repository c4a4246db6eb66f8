"""Noise, and what is asked of the head under it. Letters of shapes: megatron_bit/model/__init__.py."""
