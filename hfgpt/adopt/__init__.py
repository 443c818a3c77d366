"""Other people's GPTs, made citizens of Hugging Face."""
