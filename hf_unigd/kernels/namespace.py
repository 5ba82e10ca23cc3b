"""The torch.library namespace. An export for the Hub carries its own, so that both can be loaded together."""

NAMESPACE = "unigd"
