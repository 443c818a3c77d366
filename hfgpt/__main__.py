"""`python -m hfgpt`, and so `accelerate launch -m hfgpt`."""

from hfgpt.cli import main

main()
