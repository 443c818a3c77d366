"""The lecture on pretraining a GPT, as a recipe that runs whole or step by step: `python -m recipes.lecture`."""
