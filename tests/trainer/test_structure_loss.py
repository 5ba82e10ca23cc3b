"""Sugar's structure loss, compared with a reference of the paper's equations."""

import math
import socket

import numpy as np
import pytest
import torch
import torch.multiprocessing as mp
from torch.nn import functional as F

from hf_unigd.data.teachers import slice_columns
from hf_unigd.trainer.losses import StructureLoss
from trainer_cases import Reference


OWN, CROSS = 5, 4
IMAGE, TEXT = 0, 1


@pytest.fixture
def batch():
    return make_batch()


def make_batch():
    """Three samples of 3, 1 and 4 slices with six positions."""
    torch.manual_seed(0)
    lengths = [3, 1, 4]
    slices = [
        (place % 2, F.normalize(torch.randn(OWN, dtype=torch.double), dim=0),
         F.normalize(torch.randn(CROSS, dtype=torch.double), dim=0))
        for place in range(sum(lengths))
    ]  # fmt: skip
    starts, prefix_lengths, samples = [0, 0, 3, 4, 4, 4], [1, 3, 1, 2, 3, 4], [10, 10, 20, 30, 30, 30]
    inputs = {
        "features": torch.stack([torch.cat(part[1:]) for part in slices]),
        "modalities": torch.tensor([part[0] for part in slices]),
        "starts": torch.tensor(starts),
        "lengths": torch.tensor(prefix_lengths),
        "sample_keys": torch.tensor(samples),
    }
    prefixes = [slices[start : start + length] for start, length in zip(starts, prefix_lengths, strict=True)]
    embeddings = F.normalize(torch.randn(6, 7, dtype=torch.double), dim=1)
    return embeddings.requires_grad_(), inputs, prefixes, samples


SETTINGS = [
    {},
    {"normalization": "content"},
    {"delta": 0.5},
    {"one_slice": "kernel"},
    {"target": "mean_slice"},
    {"triple": False},
    {"normalization": "content", "delta": 2.0, "one_slice": "kernel", "triple": False},
]


@pytest.mark.parametrize("setting", SETTINGS, ids=str)
def test_loss_and_gradients_equal_the_equations(batch, setting):
    embeddings, inputs, prefixes, samples = batch
    expected = Reference(**setting).loss(embeddings, prefixes, samples)
    (gradient,) = torch.autograd.grad(expected, embeddings)
    setting = {"normalization": "cosine", **setting}
    modality_columns = slice_columns(OWN, CROSS, setting.pop("triple", True))
    setting["bandwidth"] = setting.pop("delta", 1.0)
    loss = StructureLoss(**setting)(embeddings, **inputs, modality_columns=modality_columns)["loss"]
    assert torch.allclose(loss, expected, rtol=1e-10)
    assert torch.allclose(torch.autograd.grad(loss, embeddings)[0], gradient, rtol=1e-9)
    single = StructureLoss(**setting)(
        embeddings.float(), **{**inputs, "features": inputs["features"].float()}, modality_columns=modality_columns
    )
    assert abs(single["loss"].item() - expected.item()) < 1e-5


def test_every_ablation_of_table_4b_changes_only_the_pairs_that_it_names(batch):
    _, inputs, prefixes, _ = batch
    modality_columns, cross_only = slice_columns(OWN, CROSS), slice_columns(OWN, CROSS, triple_kernel=False)
    kwargs = {key: inputs[key] for key in ("features", "modalities", "lengths")}
    packed = torch.cat([torch.arange(s, s + n) for s, n in zip(inputs["starts"], inputs["lengths"], strict=True)])
    kwargs["features"], kwargs["modalities"] = inputs["features"][packed], inputs["modalities"][packed]

    def target(loss, modality_columns):
        return loss._target(modality_columns=modality_columns, **kwargs)

    base = target(StructureLoss(normalization="cosine"), modality_columns)
    one = torch.tensor([len(prefix) == 1 for prefix in prefixes])
    one_slice_pairs = one[:, None] & one[None, :]
    same_modality = torch.tensor([[x[0][0] == y[0][0] for y in prefixes] for x in prefixes])

    without_kernel = target(StructureLoss(target="mean_slice"), modality_columns)
    assert torch.allclose(without_kernel[one_slice_pairs], base[one_slice_pairs])
    assert not torch.isclose(without_kernel, base)[~one_slice_pairs].any()

    without_triple = target(StructureLoss(normalization="cosine"), cross_only)
    unlike = one_slice_pairs & ~same_modality
    assert unlike.any()
    assert torch.allclose(without_triple[unlike], base[unlike])
    others = ~unlike & ~torch.eye(len(prefixes), dtype=torch.bool)
    assert not torch.isclose(without_triple, base)[others].any()

    by_kernel = target(StructureLoss(normalization="cosine", one_slice="kernel"), modality_columns)
    assert torch.equal(by_kernel[~one_slice_pairs], base[~one_slice_pairs])
    assert not torch.isclose(by_kernel, base)[one_slice_pairs & ~torch.eye(len(prefixes), dtype=torch.bool)].any()


def test_no_gradient_reaches_the_teachers(batch):
    embeddings, inputs, _, _ = batch
    features = inputs["features"].requires_grad_()
    loss = StructureLoss()(embeddings, **{**inputs, "features": features}, modality_columns=slice_columns(OWN, CROSS))[
        "loss"
    ]
    assert torch.autograd.grad(loss, features, allow_unused=True) == (None,)


@pytest.mark.parametrize("normalization", ["cosine", "content"])
def test_kernel_similarity_aligns_the_models_own_embeddings(batch, normalization):
    _, inputs, prefixes, samples = batch
    torch.manual_seed(1)
    vectors = torch.randn(8, 6, dtype=torch.double).requires_grad_()
    unit = F.normalize(vectors, dim=1)
    loss = StructureLoss(similarity="kernel", normalization=normalization)
    result = loss(unit, **inputs, modality_columns=slice_columns(OWN, CROSS))["loss"]

    student = Reference(normalization=normalization)
    student.parts = lambda a, b: (1, 1)
    own = [
        [(0, unit[place].detach()) for place in range(start, start + length)]
        for start, length in zip(inputs["starts"].tolist(), inputs["lengths"].tolist(), strict=True)
    ]
    teacher = Reference(normalization=normalization)
    total = 0.0
    for i in range(len(own)):
        for j in range(len(own)):
            if len(own[i]) == len(own[j]) == 1:
                similarity = student.cosine(own[i][0], own[j][0])
            else:
                similarity = student.kernel(own[i], own[j]) / math.sqrt(
                    student.kernel(own[i], own[i]) * student.kernel(own[j], own[j])
                )
                if normalization == "content":
                    counts = [student.kernel(a, b, constant=True) for a, b in
                              ((own[i], own[j]), (own[i], own[i]), (own[j], own[j]))]  # fmt: skip
                    similarity /= counts[0] / math.sqrt(counts[1] * counts[2])
            target = 1.0 if samples[i] == samples[j] else teacher.target(prefixes[i], prefixes[j])
            total += (similarity - target) ** 2
    assert result.item() == pytest.approx(total / len(own), rel=1e-9)

    def value(vectors):
        return loss(F.normalize(vectors, dim=1), **inputs, modality_columns=slice_columns(OWN, CROSS))["loss"]

    assert torch.autograd.gradcheck(value, vectors)


def test_the_metrics_leave_out_pairs_of_one_sample(batch):
    embeddings, inputs, prefixes, samples = batch
    metrics = StructureLoss()(embeddings, **inputs, modality_columns=slice_columns(OWN, CROSS))
    others = torch.tensor(samples)[:, None] != torch.tensor(samples)[None, :]
    similarity = (embeddings @ embeddings.T).detach()[others]
    reference = Reference(normalization="content")
    target = torch.tensor([[reference.target(x, y) for y in prefixes] for x in prefixes], dtype=torch.double)[others]
    assert metrics["alignment_similarity"].item() == pytest.approx(similarity.mean().item())
    assert metrics["alignment_target"].item() == pytest.approx(target.mean().item())
    correlation = np.corrcoef(similarity, target)[0, 1]
    assert abs(correlation) > 0.01
    assert metrics["alignment_correlation"].item() == pytest.approx(correlation)
    assert not metrics["alignment_target"].requires_grad


def test_a_batch_without_positions_has_zero_loss():
    empty = torch.zeros(0, dtype=torch.long)
    embeddings = torch.zeros(0, 7, requires_grad=True)
    loss = StructureLoss()(
        embeddings, torch.zeros(0, OWN + CROSS), empty, empty, empty, empty, slice_columns(OWN, CROSS)
    )["loss"]
    assert loss.item() == 0
    loss.backward()


@pytest.mark.parametrize("name", ["target", "normalization", "one_slice", "similarity"])
def test_an_unknown_choice_is_refused(name):
    with pytest.raises(ValueError, match=f"`{name}` must be one of '.*', '.*', but is 'other'"):
        StructureLoss(**{name: "other"})


def part_of(inputs, embeddings, rank):
    """The first two samples for one process, the third for the other."""
    slices, positions = (slice(0, 4), slice(0, 3)) if rank == 0 else (slice(4, 8), slice(3, 6))
    part = {name: inputs[name][slices] for name in ("features", "modalities")}
    part |= {name: inputs[name][positions] for name in ("starts", "lengths", "sample_keys")}
    return {**part, "starts": part["starts"] - slices.start}, embeddings[slices if len(embeddings) == 8 else positions]


def losses_of(embeddings, slice_embeddings, inputs):
    """The loss and its gradient with both similarities. The kernel's compares the embeddings of all slices."""
    results = []
    for similarity, given in (("cosine", embeddings), ("kernel", slice_embeddings)):
        given = given.detach().requires_grad_()
        loss = StructureLoss(similarity=similarity)
        value = loss(given, **inputs, modality_columns=slice_columns(OWN, CROSS))["loss"]
        own = loss.eval()(given, **inputs, modality_columns=slice_columns(OWN, CROSS))["loss"]
        results.append((value.detach(), torch.autograd.grad(value, given)[0], own.detach()))
    return results


def losses_on_rank(rank, port, folder):
    torch.distributed.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=2)
    torch.set_num_threads(1)
    embeddings, inputs, _, _ = make_batch()
    part, own = part_of(inputs, embeddings, rank)
    _, own_slices = part_of(inputs, slice_embeddings(), rank)
    torch.save(losses_of(own, own_slices, part), folder / f"{rank}.pt")
    torch.distributed.destroy_process_group()


def slice_embeddings():
    return F.normalize(torch.randn(8, 7, dtype=torch.double, generator=torch.Generator().manual_seed(3)), dim=1)


def test_two_processes_give_the_loss_and_gradient_of_one(tmp_path):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    mp.spawn(losses_on_rank, (port, tmp_path), nprocs=2)
    embeddings, inputs, _, _ = make_batch()
    whole = losses_of(embeddings, slice_embeddings(), inputs)
    ranks = [torch.load(tmp_path / f"{rank}.pt") for rank in range(2)]
    for rank in range(2):  # in eval mode, a process compares its own positions alone
        part, own = part_of(inputs, embeddings, rank)
        alone = losses_of(own, part_of(inputs, slice_embeddings(), rank)[1], part)
        for (_, _, found), (expected, _, _) in zip(ranks[rank], alone, strict=True):
            torch.testing.assert_close(found, expected)
    for number, (loss, gradient, _) in enumerate(whole):
        for rank in range(2):
            torch.testing.assert_close(ranks[rank][number][0], loss)
        # The gradient that a process sees is summed over processes, and DDP divides it by their number.
        torch.testing.assert_close(torch.cat([ranks[0][number][1], ranks[1][number][1]]) / 2, gradient)
