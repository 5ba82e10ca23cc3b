"""The torch.library namespace. A Hub export has its own, so that both can be loaded together."""

NAMESPACE = "unigd"
