"""The contrastive loss: a plain reference, masks, bounded memory, and several processes."""

import math
import socket
import threading
from concurrent.futures import ThreadPoolExecutor
from unittest.mock import patch

import pytest
import torch
import torch.multiprocessing as mp
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from hf_unigd.trainer import InfoNCELoss
from hf_unigd.trainer.losses import info_nce


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


class Processes:
    """Processes as threads. Each puts down its rows, and takes those of all once everyone has."""

    def __init__(self, count):
        self.barrier, self.table, self.own = threading.Barrier(count, timeout=60), [None] * count, threading.local()

    def run(self, function):
        """Returns what `function` returns for each rank."""

        def start(rank):
            self.own.rank = rank
            return function(rank)

        with ThreadPoolExecutor(self.barrier.parties) as pool:
            return list(pool.map(start, range(self.barrier.parties)))

    def exchange(self, rows):
        self.table[self.own.rank] = rows
        self.barrier.wait()
        everywhere = list(self.table)
        self.barrier.wait()
        return everywhere

    def gather_counts(self, rows):
        return self.exchange(len(rows)), self.own.rank

    def gather_rows(self, rows):
        return GatherFromThreads.apply(rows, self)


class GatherFromThreads(torch.autograd.Function):
    @staticmethod
    def forward(ctx, rows, processes):
        everywhere = processes.exchange(rows)
        ctx.counts, ctx.processes = [len(part) for part in everywhere], processes
        return torch.cat(everywhere)

    @staticmethod
    def backward(ctx, gradient):
        total = torch.stack(ctx.processes.exchange(gradient)).sum(0)
        return total.split(ctx.counts)[ctx.processes.own.rank], None


SIZES = st.lists(st.tuples(st.integers(0, 3), st.integers(0, 2)), min_size=1, max_size=4)  # pairs, hard negatives


@settings(max_examples=60, deadline=None)
@given(
    sizes=SIZES.filter(lambda sizes: any(pairs for pairs, _ in sizes)),
    d=st.integers(2, 6),
    dims=st.booleans(),
    has_keys=st.tuples(st.booleans(), st.booleans()),
    num_matches=st.one_of(st.none(), st.lists(st.integers(0, 3), min_size=4, max_size=4)),
    chunk_elements=st.integers(1, 60),
    scale=st.floats(0.1, 100),
    seed=st.integers(0, 999),
)
def test_every_share_of_rows_and_every_chunk_give_the_reference(
    sizes, d, dims, has_keys, num_matches, chunk_elements, scale, seed
):
    counts = {"queries": [n for n, _ in sizes], "positives": [n for n, _ in sizes], "negatives": [m for _, m in sizes]}
    vectors = {
        name: unit(sum(count), d, seed=seed + place).requires_grad_()
        for place, (name, count) in enumerate(counts.items())
    }
    generator = torch.Generator().manual_seed(seed)
    keys = {name: torch.randint(0, 4, (sum(count),), generator=generator) for name, count in counts.items()}
    used = {"queries": has_keys[0], "positives": has_keys[1], "negatives": has_keys[1]}
    n, m, dims = sum(counts["queries"]), sum(counts["negatives"]), [1, d - 1, d] if dims else [d]
    # Pairs of a query's key and the key of what matches it, a different number on each process.
    matches = [torch.randint(0, 4, (count, 2), generator=generator) for count in (num_matches or [])[: len(sizes)]]
    matches = matches if all(has_keys) and matches else None
    query_keys = keys["queries"].tolist() if has_keys[0] else range(n)
    candidate_keys = [*keys["positives"].tolist(), *keys["negatives"].tolist()] if has_keys[1] else range(n + m)
    masked = set()
    for i in range(n):
        known = {candidate_keys[row] for row in range(n) if query_keys[row] == query_keys[i]}
        known |= {
            match for query, match in torch.cat(matches or [torch.empty(0, 2)]).tolist() if query == query_keys[i]
        }
        masked |= {(i, j) for j in range(n + m) if i != j and candidate_keys[j] in known}
    temperature = torch.tensor(scale, dtype=torch.float64, requires_grad=True)
    prefixes = [[F.normalize(each[:, :dim], dim=-1) if dim < d else each for each in vectors.values()] for dim in dims]
    expected = sum(reference(q, p, temperature, c, masked) for q, p, c in prefixes) / len(dims)
    expected.backward()
    cosines = vectors["queries"] @ torch.cat([vectors["positives"], vectors["negatives"]]).T
    others = [cosines[i, j].item() for i in range(n) for j in range(n + m) if i != j and (i, j) not in masked]

    def step(rank):
        own = {name: vectors[name].detach().split(counts[name])[rank].requires_grad_() for name in vectors}
        own_keys = {name: keys[name].split(counts[name])[rank] if used[name] else None for name in keys}
        own_scale = temperature.detach().requires_grad_()
        parts = InfoNCELoss(dims)(
            own["queries"],
            own["positives"],
            own_scale,
            own["negatives"],
            *(own_keys[name] for name in ("queries", "positives", "negatives")),
            match_keys=matches and matches[rank],
        )
        parts["loss"].backward()
        return parts, {name: each.grad / len(sizes) for name, each in own.items()}, own_scale.grad / len(sizes)

    processes = Processes(len(sizes))
    with patch.multiple(
        info_nce,
        CHUNK_ELEMENTS=chunk_elements,
        gather_counts=processes.gather_counts,
        gather_rows=processes.gather_rows,
    ):
        results = processes.run(step)
    for parts, _, _ in results:
        torch.testing.assert_close(parts["loss"], expected.detach())
        assert parts["positive_similarity"].item() == pytest.approx(cosines.diagonal().mean().item())
        assert parts["negative_similarity"].item() == pytest.approx(sum(others) / max(len(others), 1), abs=1e-9)
        assert parts["masked_fraction"].item() == pytest.approx(len(masked) / max(n * (n + m) - n, 1))
    for name, each in vectors.items():
        gradient = torch.cat([gradients[name] for _, gradients, _ in results])
        torch.testing.assert_close(gradient, torch.zeros_like(each) if each.grad is None else each.grad)
    torch.testing.assert_close(sum(gradient for _, _, gradient in results), temperature.grad)


class Largest(TorchDispatchMode):
    """Records the size of the largest tensor that an operation returns."""

    elements = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for each in tree_leaves(result):
            if isinstance(each, torch.Tensor):
                self.elements = max(self.elements, each.numel())
        return result


@pytest.mark.parametrize("kinds", [1, 5, 80])  # with 80, every row is like every other
def test_no_tensor_has_an_element_for_every_pair(kinds):
    n, m, d, keys = 64, 16, 8, torch.arange(80) // kinds
    vectors = [unit(count, d, seed=place).requires_grad_() for place, count in enumerate((n, n, m))]
    scale = torch.tensor(5.0, dtype=torch.float64, requires_grad=True)
    for chunk_elements in (160, n * (n + m)):
        with patch.object(info_nce, "CHUNK_ELEMENTS", chunk_elements), Largest() as largest:
            given = keys[:n], keys[:n], keys[n:], torch.stack([keys, keys], 1)
            loss = InfoNCELoss([4, d])(vectors[0], vectors[1], scale, vectors[2], *given)["loss"]
            loss.backward()
        assert largest.elements == max(chunk_elements, (n + m) * d)


def test_a_good_match_keeps_its_digits_in_float32():
    queries, scale = unit(16, 32, seed=1), torch.tensor(100.0, dtype=torch.float64)
    positives = F.normalize(queries + 0.1 * unit(16, 32, seed=2), dim=-1)
    gradients = []
    for dtype in (torch.float32, torch.float64):
        leaf = queries.to(dtype, copy=True).requires_grad_()
        loss = InfoNCELoss()(leaf, positives.to(dtype), scale.to(dtype))["loss"]
        loss.backward()
        gradients.append(leaf.grad.double())
    assert loss < 1e-3
    assert (gradients[0] - gradients[1]).norm() < 1e-3 * gradients[1].norm()


def test_bfloat16_embeddings_are_compared_in_float32():
    queries, positives = unit(8, 16, seed=1).bfloat16().requires_grad_(), unit(8, 16, seed=2).bfloat16()
    loss = InfoNCELoss()(queries, positives, torch.tensor(20.0))["loss"]
    loss.backward()
    torch.testing.assert_close(loss, InfoNCELoss()(queries.float(), positives.float(), torch.tensor(20.0))["loss"])
    assert queries.grad.dtype == torch.bfloat16


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
        negative_keys=torch.tensor([7, 6]),  # the first hard negative is the caption of row 0, whose image row 2 has
    )
    masked = {(0, 2), (2, 0), (1, 3), (3, 1), (0, 4), (2, 4)}
    torch.testing.assert_close(parts["loss"], reference(queries, positives, scale, negatives, masked))
    assert parts["masked_fraction"].item() == pytest.approx(len(masked) / (4 * 6 - 4))


def test_a_candidate_is_masked_only_for_the_images_that_it_is_a_caption_of():
    """Images 1 and 2 share the caption 7, but the other captions of 2 may be negatives of 1."""
    queries, positives, negatives = unit(4, 5, seed=1), unit(4, 5, seed=2), unit(3, 5, seed=3)
    scale = torch.tensor(3.0, dtype=torch.float64)
    inputs = [each.requires_grad_() for each in (queries, positives, negatives)]
    parts = InfoNCELoss()(
        queries,
        positives,
        scale,
        negatives,
        query_keys=torch.tensor([1, 2, 3, 4]),
        positive_keys=torch.tensor([7, 7, 5, 6]),
        negative_keys=torch.tensor([8, 9, 5]),
        # 8 is another caption of image 1, 9 and 6 are others of image 2, and image 5 is not in the batch.
        match_keys=torch.tensor([[1, 8], [2, 9], [2, 6], [2, 9], [5, 6]]),
    )
    masked = {(0, 1), (1, 0), (0, 4), (1, 5), (1, 3), (2, 6)}
    expected = reference(queries, positives, scale, negatives, masked)
    torch.testing.assert_close(parts["loss"], expected)
    torch.testing.assert_close(
        torch.autograd.grad(parts["loss"], inputs), torch.autograd.grad(expected, inputs), rtol=1e-9, atol=1e-12
    )
    assert parts["masked_fraction"].item() == pytest.approx(len(masked) / (4 * 7 - 4))


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"negative_keys": torch.zeros(2, dtype=torch.long)}, "`negative_keys` need `positive_keys`"),
        (
            {"positive_keys": torch.arange(4), "match_keys": torch.zeros(1, 2, dtype=torch.long)},
            "`match_keys` need `query_keys`",
        ),
    ],
)
def test_keys_that_nothing_is_compared_with_are_refused(given, message):
    with pytest.raises(ValueError, match=message):
        InfoNCELoss()(unit(4, 5), unit(4, 5), torch.tensor(3.0), unit(2, 5), **given)


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
    info_nce.logger.warning_once.cache_clear()
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
# Of queries, positives and negatives, and further matches: query 0 has the captions 10, 14 and 21.
KEYS = [
    torch.tensor(each)
    for each in ([0, 1, 2, 2, 4, 5], [10, 11, 12, 13, 14, 11], [20, 21], [[0, 14], [0, 21], [9, 20], [4, 20]])
]
MASKED = {(0, 4), (0, 7), (1, 5), (5, 1), (2, 3), (3, 2), (4, 6)}


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
    keys = KEYS[0][rows], KEYS[1][rows], KEYS[2][rank : rank + 1], KEYS[3][: 3 * rank] if rank else KEYS[3][3:]
    loss = InfoNCELoss()(queries, positives, torch.tensor(7.0, dtype=torch.float64), negatives, *keys)["loss"]
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
    expected = reference(queries, positives, 7.0, unit(2, 5, seed=3) @ weight, MASKED)
    expected.backward()
    assert len(results) == len(COUNTS)
    for loss, gradient in results:
        torch.testing.assert_close(loss, expected.detach())
        torch.testing.assert_close(gradient, weight.grad, rtol=1e-9, atol=1e-12)
