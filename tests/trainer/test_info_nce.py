"""The contrastive loss: a plain reference, masks, and several processes."""

import math
import socket

import pytest
import torch
import torch.multiprocessing as mp
from hypothesis import given, settings
from hypothesis import strategies as st

from hf_unigd.trainer import InfoNCELoss


def unit(*shape, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.nn.functional.normalize(torch.randn(*shape, generator=generator, dtype=torch.float64), dim=-1)


def reference(queries, positives, scale, negatives=(), masked=()):
    """Returns the loss as VladVA writes it, with loops, hard negatives for the queries, and masked pairs."""
    n = len(queries)
    candidates = [*positives, *negatives]
    total = 0.0
    for k in range(n):
        scores = [scale * (queries[k] @ candidate) for candidate in candidates]
        kept = [score for j, score in enumerate(scores) if (k, j) not in masked]
        total += -scores[k] + torch.logsumexp(torch.stack(kept), 0)
        back = [scale * (queries[j] @ positives[k]) for j in range(n) if (j, k) not in masked]
        total += -scores[k] + torch.logsumexp(torch.stack(back), 0)
    return total / n


@settings(max_examples=20, deadline=None)
@given(n=st.integers(2, 6), m=st.integers(0, 4), d=st.integers(2, 8), scale=st.floats(0.1, 50))
def test_loss_and_gradients_equal_the_reference(n, m, d, scale):
    inputs = [
        unit(n, d, seed=1).requires_grad_(),
        unit(n, d, seed=2).requires_grad_(),
        unit(m, d, seed=3).requires_grad_(),
    ]
    scale = torch.tensor(scale, dtype=torch.float64, requires_grad=True)
    loss = InfoNCELoss()(inputs[0], inputs[1], scale, inputs[2])["loss"]
    expected = reference(inputs[0], inputs[1], scale, inputs[2])
    torch.testing.assert_close(loss, expected)
    ours = torch.autograd.grad(loss, [*inputs[: 3 if m else 2], scale])
    theirs = torch.autograd.grad(expected, [*inputs[: 3 if m else 2], scale])
    torch.testing.assert_close(ours, theirs)


def test_duplicates_are_masked_in_both_directions():
    queries, positives, negatives = unit(4, 5, seed=1), unit(4, 5, seed=2), unit(2, 5, seed=3)
    scale = torch.tensor(3.0, dtype=torch.float64)
    parts = InfoNCELoss()(
        queries,
        positives,
        scale,
        negatives,
        query_keys=torch.tensor([1, 2, 1, 3]),  # rows 0 and 2 have the same image
        positive_keys=torch.tensor([7, 8, 9, 8]),  # rows 1 and 3 have the same caption
        negative_keys=torch.tensor([7, 6]),  # the first hard negative is the caption of row 0
    )
    masked = {(0, 2), (2, 0), (1, 3), (3, 1), (0, 4)}
    torch.testing.assert_close(parts["loss"], reference(queries, positives, scale, negatives, masked))
    assert parts["masked_fraction"].item() == pytest.approx(len(masked) / (4 * 6 - 4))


def test_the_logged_values_of_orthogonal_queries():
    queries = torch.eye(3)
    parts = InfoNCELoss()(queries, queries, torch.tensor(10.0))
    assert parts["positive_similarity"].item() == 1
    assert parts["negative_similarity"].item() == 0
    assert parts["loss"].item() == pytest.approx(2 * math.log(1 + 2 * math.exp(-10)), rel=1e-3)


def test_matryoshka_is_the_mean_over_normalised_prefixes():
    queries, positives, scale = unit(4, 8, seed=1), unit(4, 8, seed=2), torch.tensor(5.0, dtype=torch.float64)
    expected = torch.stack(
        [
            InfoNCELoss()(*(torch.nn.functional.normalize(x[:, :dim], dim=-1) for x in (queries, positives)), scale)[
                "loss"
            ]
            for dim in (2, 4, 8)
        ]
    ).mean()
    torch.testing.assert_close(InfoNCELoss([2, 4, 8])(queries, positives, scale)["loss"], expected)


def test_a_batch_of_one_without_a_negative_has_zero_loss_and_a_warning(caplog):
    one, scale = unit(1, 4).requires_grad_(), torch.tensor(1.0)
    parts = InfoNCELoss()(one, one, scale)
    parts["loss"].backward()
    assert parts["loss"] == 0 and one.grad.abs().max() == 0 and parts["masked_fraction"] == 0
    assert "no negatives" in caplog.text
    assert InfoNCELoss()(one, one, scale, unit(1, 4, seed=3))["loss"] > 0


def test_a_batch_without_pairs_has_zero_loss_that_can_be_differentiated():
    scale = torch.tensor(1.0, requires_grad=True)
    loss = InfoNCELoss()(torch.empty(0, 4), torch.empty(0, 4), scale)["loss"]
    loss.backward()
    assert loss.item() == 0


COUNTS = [(3, 3), (4, 2), (0, 6)]  # numbers of pairs per process


def _rank(rank, port, output):
    torch.distributed.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=2)
    torch.set_num_threads(1)
    results = [_loss_and_gradient(rank, counts) for counts in COUNTS]
    if rank == 0:
        torch.save(results, output)
    torch.distributed.destroy_process_group()


def _loss_and_gradient(rank, counts):
    start = sum(counts[:rank])
    rows = slice(start, start + counts[rank])
    weight = torch.eye(5, dtype=torch.float64).requires_grad_()
    queries = torch.nn.functional.normalize(unit(sum(counts), 5, seed=1)[rows] @ weight, dim=-1)
    positives = torch.nn.functional.normalize(unit(sum(counts), 5, seed=2)[rows] @ weight.T, dim=-1)
    negatives = unit(2, 5, seed=3)[rank : rank + 1] @ weight
    loss = InfoNCELoss()(queries, positives, torch.tensor(7.0, dtype=torch.float64), negatives)["loss"]
    loss.backward()
    torch.distributed.all_reduce(weight.grad)  # DDP divides the sum by 2, as below
    return loss.detach(), weight.grad / 2


def test_two_processes_give_the_gradient_of_one(tmp_path):
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        port = sock.getsockname()[1]
    mp.spawn(_rank, (port, tmp_path / "results.pt"), nprocs=2)
    results = torch.load(tmp_path / "results.pt")

    weight = torch.eye(5, dtype=torch.float64).requires_grad_()
    queries = torch.nn.functional.normalize(unit(6, 5, seed=1) @ weight, dim=-1)
    positives = torch.nn.functional.normalize(unit(6, 5, seed=2) @ weight.T, dim=-1)
    expected = reference(queries, positives, 7.0, unit(2, 5, seed=3) @ weight)
    expected.backward()
    assert len(results) == len(COUNTS)
    for loss, gradient in results:
        torch.testing.assert_close(loss, expected.detach())
        torch.testing.assert_close(gradient, weight.grad, rtol=1e-9, atol=1e-12)
