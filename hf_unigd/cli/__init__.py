"""The `hf-unigd` command: one thin file a sub-command."""
