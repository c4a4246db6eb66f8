"""Benchmarks: `megatron-bit bench ...`."""
