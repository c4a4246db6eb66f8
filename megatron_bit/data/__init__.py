"""Shards in, batches out: manifest -> order -> stream -> batches. Importing it does not import torch."""
