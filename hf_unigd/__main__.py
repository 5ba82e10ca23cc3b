"""`python -m hf_unigd`, and so `accelerate launch -m hf_unigd`."""

from .cli.main import main


main()
