"""How a model writes: params, logits, decoding and beam_search from scratch; generator for texts; explore and play."""
