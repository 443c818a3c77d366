"""Not in transformers' source distribution; tests/citizen/test_generate.py holds hfgpt's generation against GPT-2's."""


class GenerationTesterMixin:
    """Tests nothing."""
