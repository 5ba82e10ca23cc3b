"""Explained alignments, compared with path enumeration and with the pixels of their figure."""

import math

import matplotlib
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from torch.nn import functional as F

from hf_unigd import UniGDProcessor
from hf_unigd.data import Example, SentenceSplitter
from hf_unigd.data.example import IMAGE, TEXT
from hf_unigd.data.slices import slices_of
from hf_unigd.data.teachers import slice_columns
from hf_unigd.evaluation.alignment import align_slices, embed_slices
from hf_unigd.evaluation.figures import draw_alignment
from tiny_models import make_image


OWN, CROSS = 4, 3


def make_slices(length, seed):
    """Features as the teachers compute them, two unit vectors side by side, and modalities."""
    draw = torch.Generator().manual_seed(seed)
    parts = [torch.randn(length, width, generator=draw, dtype=torch.float64) for width in (OWN, CROSS)]
    features = torch.cat([F.normalize(part, dim=-1) for part in parts], 1)
    return features, torch.randint(0, 2, (length,), generator=draw)


def local_kernel(a, b, a_modality, b_modality, sigma):
    """exp(-phi_sigma) of equation 2 of the paper, with slices compared as in equation 4."""
    columns = slice(0, OWN) if a_modality == b_modality else slice(OWN, None)
    s = math.exp(-float((a[columns] - b[columns]).square().sum()) / (2 * sigma**2))
    return s / (2 - s)


def alignments(n, m):
    """Every path from the first cell to the last, as a list of cells."""

    def walk(path):
        i, j = path[-1]
        if (i, j) == (n - 1, m - 1):
            yield path
        for cell in ((i + 1, j), (i, j + 1), (i + 1, j + 1)):
            if cell[0] < n and cell[1] < m:
                yield from walk([*path, cell])

    return list(walk([(0, 0)]))


def brute_force(x, y, bandwidth):
    """The posterior, the kernel and the number of alignments, by enumeration."""
    (a, a_modalities), (b, b_modalities) = x, y
    sigma = bandwidth * math.sqrt((len(a) + len(b)) / 2)
    kappa = [
        [local_kernel(p, q, s, t, sigma) for q, t in zip(b, b_modalities, strict=True)]
        for p, s in zip(a, a_modalities, strict=True)
    ]
    met = torch.zeros(len(a), len(b), dtype=torch.float64)
    paths = alignments(len(a), len(b))
    for path in paths:
        weight = math.prod(kappa[i][j] for i, j in path)
        for i, j in path:
            met[i, j] += weight
    return met / met[0, 0], met[0, 0].item(), len(paths)


@settings(max_examples=15, deadline=None)
@given(n=st.integers(1, 4), m=st.integers(1, 4), seed=st.integers(0, 99), bandwidth=st.sampled_from([0.4, 1.0, 2.0]))
@pytest.mark.parametrize("normalization", ["content", "cosine"])
def test_posterior_and_similarity_equal_path_enumeration(normalization, n, m, seed, bandwidth):
    x, y = make_slices(n, seed), make_slices(m, seed + 100)
    posterior, similarity = align_slices(
        x[0], y[0], x[1], y[1], slice_columns(OWN, CROSS), bandwidth=bandwidth, normalization=normalization
    )
    expected, kernel, paths = brute_force(x, y, bandwidth)
    torch.testing.assert_close(posterior, expected, atol=1e-9, rtol=1e-9)
    selves = [brute_force(side, side, bandwidth) for side in (x, y)]
    ratio = kernel / math.sqrt(selves[0][1] * selves[1][1])
    if normalization == "content":
        ratio /= paths / math.sqrt(selves[0][2] * selves[1][2])
    assert similarity == pytest.approx(min(1.0, ratio), rel=1e-9)


def test_the_similarity_is_limited_to_one():
    # CLIP finds two unlike images equal to both sentences, so that they are closer to these than to each other.
    own, cross = torch.eye(OWN), torch.eye(CROSS)[:1].expand(2, CROSS)
    images, texts = torch.cat([own[:2], cross], 1), torch.cat([own[2:3].expand(2, OWN), cross], 1)
    modalities = torch.tensor([IMAGE, IMAGE]), torch.tensor([TEXT, TEXT])
    x, y = (images, modalities[0]), (texts, modalities[1])
    kernel, *selves = (brute_force(*pair, 1.0)[1] for pair in ((x, y), (x, x), (y, y)))
    assert kernel > 1.1 * math.sqrt(math.prod(selves))
    _, similarity = align_slices(images, texts, *modalities, slice_columns(OWN, CROSS))
    assert similarity == 1.0


def test_an_empty_sequence_raises():
    x, _ = make_slices(2, 0)
    with pytest.raises(ValueError, match="`x` must not be empty"):
        align_slices(x[:0], x)
    with pytest.raises(ValueError, match=r"\(0, 2\), both positive"):
        draw_alignment([], ["a", "b"], torch.zeros(0, 2), "unused.png")
    with pytest.raises(ValueError, match="`posterior` must be of shape"):
        draw_alignment(["a"], ["a", "b"], torch.zeros(2, 1), "unused.png")


def user(*parts):
    contents = [
        {"type": "text", "text": part} if isinstance(part, str) else {"type": "image", "image": part} for part in parts
    ]
    return [{"role": "user", "content": contents}]


def test_a_model_embeds_slices_in_the_context_of_the_slices_before(llava):
    model, processor = llava
    splitter, image = SentenceSplitter(), make_image(1)
    sequence = ["A red cat.", image, "Two dogs. Blue.", make_image(2)]
    example = Example(row=0, anchor=user(*sequence), slices=slices_of(user(*sequence), None, splitter))
    embeddings = embed_slices(model, processor, example, splitter)
    assert [one.modality for one in example.slices] == [TEXT, IMAGE, TEXT, TEXT, IMAGE]
    # The embedding of a prefix is that of its last slice. Attention is causal, so later slices change nothing.
    prefixes = [sequence[:1], sequence[:2], [*sequence[:2], "Two dogs."], sequence[:3], sequence]
    at_end = UniGDProcessor(processor.vlm_processor, embedding_position="last_slice")
    for prefix, embedding in zip(prefixes, embeddings, strict=True):
        with torch.no_grad():
            (expected,) = model.embed(**at_end.process_sequences([prefix]))
        torch.testing.assert_close(embedding, expected, atol=1e-5, rtol=1e-5)


DOWN = [(255, 0, 0), (0, 160, 0), (255, 128, 0)]
ACROSS = [(255, 0, 255), (128, 0, 64), (0, 255, 255), (255, 255, 0)]


def centre_of(pixels, colour):
    """Mean row, mean column and number of the pixels of a colour."""
    rows, columns = np.nonzero((pixels == np.array(colour)).all(-1))
    return (rows.mean(), columns.mean(), len(rows)) if len(rows) else (None, None, 0)


@pytest.mark.parametrize("size", [(20, 20), (300, 100)])
def test_the_figure_shows_every_slice_and_the_posterior_of_every_pair(tmp_path, size):
    posterior = torch.rand(5, 6, generator=torch.Generator().manual_seed(0))
    down = [Image.new("RGB", size, colour) for colour in DOWN]
    across = [Image.new("RGB", size, colour) for colour in ACROSS]
    long = "It costs $5, or $6 to those who come late, and has no end that anybody would care to read. " * 3
    draw_alignment(
        [down[0], "A sentence.", down[1], long, down[2]],
        [across[0], across[1], long, across[2], "A sentence.", across[3]],
        posterior,
        tmp_path / "alignment.png",
        "Title",
    )
    pixels = np.asarray(Image.open(tmp_path / "alignment.png").convert("RGB")).astype(int)
    assert max(pixels.shape) < 1200
    found = {colour: centre_of(pixels, colour) for colour in DOWN + ACROSS}
    assert all(count > 500 for _, _, count in found.values())
    heights = [found[colour][0] for colour in DOWN]
    widths = [found[colour][1] for colour in ACROSS]
    assert heights == sorted(heights) and widths == sorted(widths)

    # A cell is in the row of its left image and in the column of its top image.
    shades = matplotlib.colormaps["Blues"](np.linspace(0, 1, 256))[:, :3] * 255
    for i, height in zip((0, 2, 4), heights, strict=True):
        for j, width in zip((0, 1, 3, 5), widths, strict=True):
            shade = pixels[round(height), round(width)]
            shown = np.abs(shades - shade).sum(-1).argmin() / 255
            assert shown == pytest.approx(float(posterior[i, j]), abs=0.01)
