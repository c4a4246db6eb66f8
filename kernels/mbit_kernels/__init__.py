"""The hot operations of a BitLM, each with its plain PyTorch reference."""
