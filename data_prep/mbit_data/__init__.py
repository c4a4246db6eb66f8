"""Text into shards: read, tokenizer, write, verify."""
