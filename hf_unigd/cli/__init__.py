"""The `hf-unigd` command, with one file for each sub-command."""
