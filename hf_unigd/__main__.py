"""Runs `hf-unigd` as `python -m hf_unigd`, which `accelerate launch -m hf_unigd` needs."""

from .cli.main import main


main()
