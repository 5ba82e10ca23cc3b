"""The optimizer of a model that is trained from scratch: Muon for the matrices of its layers, AdamW for the rest."""

from collections import defaultdict
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel


MOMENTUM = 0.95
# Of an odd polynomial whose iteration takes all singular values close to 1.
COEFFICIENTS, ITERATIONS = (3.4445, -4.7750, 2.0315), 5
UPDATE_SIZE = 0.2  # root mean square of an update, about that of AdamW


class MuonWithAdamW(torch.optim.AdamW):
    """
    AdamW, except for the weights of linear layers, which Muon updates.

    Muon orthogonalises the momentum of a matrix, so that all its directions are learned at the same rate. Embeddings,
    patches, norms, biases, the output layer and the temperature are left to AdamW, as Muon's authors advise.

    torch has a Muon too, whose products are in bfloat16. On a processor without instructions for that, they take
    longer than the rest of a step.

    Args:
        model: The model. Parameters that require no gradient are left out.
        matrix_lr: Learning rate of Muon, for updates of the size of AdamW's.
        lr: Learning rate of AdamW.
        weight_decay: Of all weights with two dimensions or more.
        beta2: The second momentum of AdamW.

    Citation: Jordan et al., "Muon: An optimizer for hidden layers in neural networks", 2024. The size of updates:
    Liu et al., "Muon is Scalable for LLM Training", 2025.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        matrix_lr: float = 4e-3,
        lr: float = 2e-3,
        weight_decay: float = 0.2,
        beta2: float = 0.98,
    ):
        output_layer = model.get_output_embeddings()
        linear = {
            module.weight for module in model.modules() if isinstance(module, nn.Linear) and module is not output_layer
        }
        trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        others = [parameter for parameter in trained if parameter not in linear]
        groups: list[dict[str, Any]] = [
            {"params": [parameter for parameter in others if parameter.ndim > 1]},
            {"params": [parameter for parameter in others if parameter.ndim < 2], "weight_decay": 0.0},
        ]
        super().__init__(groups, lr=lr, weight_decay=weight_decay, betas=(0.9, beta2))
        self.add_param_group({"params": [each for each in trained if each in linear], "lr": matrix_lr, "muon": True})

    def __setstate__(self, state):
        # AdamW's own would look for what it keeps of a parameter in what Muon keeps of a matrix.
        torch.optim.Optimizer.__setstate__(self, state)

    @torch.no_grad()
    def step(self, closure=None):
        loss = None if closure is None else torch.enable_grad()(closure)()
        groups = self.param_groups
        self.param_groups = [group for group in groups if "muon" not in group]
        super().step()
        self.param_groups = groups
        for group in groups:
            if "muon" in group:
                self._step_matrices(group)
        return loss

    def _step_matrices(self, group: dict) -> None:
        by_shape = defaultdict(list)
        for matrix in group["params"]:
            if matrix.grad is not None:
                by_shape[matrix.shape].append(matrix)
        for shape, matrices in by_shape.items():
            gradients = [matrix.grad for matrix in matrices]
            for matrix in matrices:
                if not self.state[matrix]:
                    self.state[matrix]["momentum"] = torch.zeros_like(matrix)
            momenta = [self.state[matrix]["momentum"] for matrix in matrices]
            torch._foreach_lerp_(momenta, gradients, 1 - MOMENTUM)
            updates = orthogonalize(torch.stack(torch._foreach_lerp(gradients, momenta, MOMENTUM)))
            torch._foreach_mul_(matrices, 1 - group["lr"] * group["weight_decay"])
            scale = group["lr"] * UPDATE_SIZE * max(shape) ** 0.5
            torch._foreach_sub_(matrices, list(scale * updates))


def orthogonalize(matrices: torch.Tensor) -> torch.Tensor:
    """Brings the singular values of `(n, rows, columns)` near 1, to 0.7 to 1.2, and keeps the singular vectors."""
    a, b, c = COEFFICIENTS
    wide = matrices if matrices.shape[1] <= matrices.shape[2] else matrices.mT
    wide = wide / wide.flatten(1).norm(dim=1).clamp(min=1e-7)[:, None, None]
    for _ in range(ITERATIONS):
        square = wide @ wide.mT
        wide = a * wide + (b * square + c * square @ square) @ wide
    return wide if matrices.shape[1] <= matrices.shape[2] else wide.mT
