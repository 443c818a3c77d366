"""Not in transformers' source distribution; tests/citizen/test_training_features.py exports hfgpt."""


class ExportTesterMixin:
    """Tests nothing."""
