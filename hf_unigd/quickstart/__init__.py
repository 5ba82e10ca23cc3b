"""The main job on the embedded default: a small LLaVA trained on icons, from nothing to a checkpoint, in minutes."""
