"""A GPT of your own: a project that starts where hfgpt is, and what makes a stranger's module a transformers model."""
