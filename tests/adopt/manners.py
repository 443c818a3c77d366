"""GPTs as strangers write them, in strangers/, and how each is made."""

from pathlib import Path

STRANGERS = Path(__file__).parent / "strangers"

ENCODER = {"ntoken": 61, "d_model": 16, "nhead": 2, "d_hid": 32, "nlayers": 2}

KINDS = {
    "constants of a script": ("lecture.py:LanguageModel", {"vocab_size": 40}),
    "a dataclass": (
        "single_file.py:GPT",
        {"vocab_size": 320, "n_layer": 2, "n_embd": 16, "n_head": 2, "betas": [0.9, 0.99]},
    ),
    "a dictionary": (
        "book.py:GPTModel",
        {"vocab_size": 61, "context_length": 16, "emb_dim": 16, "n_heads": 2, "n_layers": 2, "drop_rate": 0.1},
    ),
    "a mask, time first": ("encoder.py:TransformerModel", ENCODER),
    "keywords, in a package": ("pack/model.py:Decoder", {"n_vocab": 61}),
    "an object within an object": (
        "settings.py:TinyGPT",
        {"vocab": 61, "hparams": {"model": {"width": 16, "length": 12}}},
    ),
}
"""What the constructor takes -> the class, and its config."""
