"""`python -m megatron_bit`, which is also what torchrun starts: `torchrun ... -m megatron_bit train CONFIG.yaml`."""

from megatron_bit.cli import main

if __name__ == "__main__":  # tokenizer workers import this module again
    main()
