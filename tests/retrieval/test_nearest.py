"""The nearest of many vectors, against brute force in float64."""

import numpy
import pytest
import torch

from hf_unigd.retrieval.nearest import make_faiss_index, nearest_exactly, read_faiss_index, write_faiss_index


def unit_vectors(count, seed=0, width=16):
    return torch.nn.functional.normalize(
        torch.randn(count, width, generator=torch.Generator().manual_seed(seed)), dim=-1
    )


def brute_force(queries, vectors, k):
    return numpy.argsort(-(queries.double().numpy() @ vectors.double().numpy().T), axis=1)[:, :k].tolist()


@pytest.mark.parametrize("chunk", [1, 7, 50, 1000])
@pytest.mark.parametrize("k", [1, 10, 200])
def test_exact_search_is_brute_force_whatever_the_chunks(chunk, k):
    queries, vectors = unit_vectors(9, seed=1), unit_vectors(200)
    assert nearest_exactly(queries, vectors.split(chunk), k).tolist() == brute_force(queries, vectors, k)


@pytest.mark.parametrize(("factory", "parameters"), [("Flat", None), ("IVF8,Flat", "nprobe=8"), ("HNSW32", None)])
def test_faiss_that_sees_everything_is_brute_force(tmp_path, factory, parameters):
    queries, vectors = unit_vectors(9, seed=1), unit_vectors(400)
    write_faiss_index(factory, 16, 400, lambda: vectors.split(60), tmp_path / "index.faiss")
    found = read_faiss_index(tmp_path / "index.faiss", parameters).search(queries.numpy(), 10)[1]
    assert found.tolist() == brute_force(queries, vectors, 10)
    assert [file.name for file in tmp_path.iterdir()] == ["index.faiss"]


def test_what_faiss_cannot_do_is_said(tmp_path):
    with pytest.raises(ValueError, match=r"no index `faiss='Flatt'`.*could not parse"):
        make_faiss_index("Flatt", 16)
    with pytest.raises(ValueError, match=r"cannot train `faiss='IVF64,Flat'` on 10 vectors"):
        write_faiss_index("IVF64,Flat", 16, 10, lambda: [unit_vectors(10)], tmp_path / "index.faiss")
    write_faiss_index("Flat", 16, 10, lambda: [unit_vectors(10)], tmp_path / "index.faiss")
    with pytest.raises(ValueError, match="cannot set `faiss_parameters='nprobe=4'`"):
        read_faiss_index(tmp_path / "index.faiss", "nprobe=4")


def test_without_faiss_its_absence_is_said(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "faiss", None)
    with pytest.raises(ImportError, match=r"hf-unigd\[faiss\]"):
        make_faiss_index("Flat", 16)
