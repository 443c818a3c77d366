"""Text to micro-batches; in reading order: text, tokenizer, rows, prepare, loaders, and streaming beside them."""
