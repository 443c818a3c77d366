"""The lecture on pretraining a GPT, as a recipe that runs whole or step by step: `hfgpt lecture`."""
