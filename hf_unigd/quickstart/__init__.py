"""Both recipes on data drawn in code: a small LLaVA is trained from scratch in minutes, without a download."""
