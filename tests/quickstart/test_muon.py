"""The optimizer of the quickstart, beside torch's own Muon and AdamW."""

import copy

import pytest
import torch
from torch import nn

from hf_unigd.quickstart.muon import MuonWithAdamW, orthogonalize


class Network(nn.Module):
    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(12, 16)
        self.wide, self.tall = nn.Linear(16, 24), nn.Linear(24, 16)
        self.norm, self.output = nn.LayerNorm(16), nn.Linear(16, 12, bias=False)

    def get_output_embeddings(self):
        return self.output

    def forward(self, ids):
        return self.output(self.norm(self.tall(torch.tanh(self.wide(self.embedding(ids))))))


def take_steps(network, *optimizers):
    generator = torch.Generator().manual_seed(1)
    for _ in range(4):
        ids = torch.randint(0, 12, (8,), generator=generator)
        network.zero_grad()
        nn.functional.cross_entropy(network(ids), (ids + 1) % 12).backward()
        for optimizer in optimizers:
            optimizer.step()


@pytest.mark.parametrize("shape", [(3, 16, 40), (2, 40, 16), (1, 8, 8)])
def test_the_singular_vectors_stay_and_the_values_are_near_one(shape):
    matrices = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    left, _, right = torch.linalg.svd(matrices, full_matrices=False)
    found = left.mT @ orthogonalize(matrices) @ right.mT
    values = found.diagonal(dim1=1, dim2=2)
    assert (values > 0.5).all() and (values < 1.3).all()
    assert (found - torch.diag_embed(values)).abs().max() < 1e-4


def test_linear_layers_step_as_with_torchs_muon_and_the_rest_as_with_adamw(monkeypatch):
    # torch's Muon orthogonalises in bfloat16, which would hide small differences.
    monkeypatch.setattr(torch.Tensor, "bfloat16", torch.Tensor.clone)
    torch.manual_seed(0)
    start = Network()
    ours, theirs = copy.deepcopy(start), copy.deepcopy(start)
    take_steps(ours, MuonWithAdamW(ours, matrix_lr=1e-3, lr=2e-3, weight_decay=0.1, beta2=0.98))
    matrices = [theirs.wide.weight, theirs.tall.weight]
    decayed = [theirs.embedding.weight, theirs.output.weight]
    plain = [theirs.wide.bias, theirs.tall.bias, *theirs.norm.parameters()]
    take_steps(
        theirs,
        torch.optim.Muon(matrices, lr=1e-3, weight_decay=0.1, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(
            [{"params": decayed}, {"params": plain, "weight_decay": 0.0}], 2e-3, (0.9, 0.98), weight_decay=0.1
        ),
    )
    for name, first in start.named_parameters():
        moved = theirs.get_parameter(name) - first
        difference = ours.get_parameter(name) - theirs.get_parameter(name)
        assert difference.norm() < 1e-3 * moved.norm(), name


def test_one_schedule_moves_both_rates_and_frozen_weights_stay():
    torch.manual_seed(0)
    network = Network()
    network.wide.requires_grad_(False)
    before = copy.deepcopy(network.state_dict())
    optimizer = MuonWithAdamW(network, matrix_lr=4e-3, lr=2e-3)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.5)
    assert schedule.get_last_lr() == [1e-3, 1e-3, 2e-3]
    take_steps(network, optimizer)
    changed = {name for name, value in network.state_dict().items() if not torch.equal(value, before[name])}
    assert changed == set(before) - {"wide.weight", "wide.bias"}


def test_a_run_that_was_stopped_goes_on_as_if_it_was_not():
    torch.manual_seed(0)
    whole = Network()
    stopped = copy.deepcopy(whole)
    optimizer = MuonWithAdamW(whole)
    take_steps(whole, optimizer)
    take_steps(whole, optimizer)
    first = MuonWithAdamW(stopped)
    take_steps(stopped, first)
    second = MuonWithAdamW(stopped)
    second.load_state_dict(copy.deepcopy(first.state_dict()))
    take_steps(stopped, second)
    assert all(torch.equal(value, whole.state_dict()[name]) for name, value in stopped.state_dict().items())
