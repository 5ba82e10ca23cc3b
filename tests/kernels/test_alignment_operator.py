"""The operators under opcheck, torch.compile, autocast, vmap and DDP, and the errors for bad input."""

import pytest
import torch
import torch.distributed as dist
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook
from torch.nn.parallel import DistributedDataParallel

from hf_unigd.kernels import alignment_kernel, alignment_posterior, mean_slice_similarity, ops, soft_dtw
from kernel_cases import FAST_BACKENDS, assert_close, offsets_of, packed


@pytest.mark.parametrize("paired", [False, True])
@pytest.mark.parametrize("backend", FAST_BACKENDS)
def test_opcheck(backend, paired):
    x, x_offsets = packed([2, 5], 3)
    y, y_offsets = packed([4, 1, 3], 3, seed=1)
    pairs = torch.tensor([[0, 1], [1, 0]]) if paired else None
    sigma = torch.tensor(1.5, dtype=torch.float64, requires_grad=True)
    settings = (pairs, sigma, [], "gaussian", False, backend)
    x.requires_grad_(), y.requires_grad_()
    torch.library.opcheck(ops.alignment, (x, x_offsets, None, y, y_offsets, None, *settings))
    torch.library.opcheck(ops.alignment, (x, x_offsets, None, None, None, None, *settings))
    x, y, sigma = x.detach(), y.detach(), sigma.detach()
    settings = (pairs, sigma, *settings[2:])
    for sides in ((x, x_offsets, None, y, y_offsets, None), (x, x_offsets, None, None, None, None)):
        grad = torch.randn_like(ops.alignment(*sides, *settings))
        torch.library.opcheck(ops.alignment_backward, (grad, *sides, *settings))
    lengths = x_offsets.diff()
    torch.library.opcheck(ops.check_inputs, (torch.randn(2, 5, 3), lengths, None, None, None, None, None, []))
    torch.library.opcheck(ops.check_inputs, (x, x_offsets, None, y, y_offsets, None, pairs, []))
    torch.library.opcheck(ops.log_path_count, (lengths[:, None], lengths[None]))
    torch.library.opcheck(ops.median_bandwidth, (x, x_offsets, None, []))


def test_the_fake_backward_predicts_the_layout_of_gradients():
    """The default compiler relies on this, also for inputs that are not contiguous."""
    x, offsets = torch.randn(4, 7).T.requires_grad_(), offsets_of([3, 4])
    y, settings = torch.randn(4, 5).T, (None, torch.tensor(1.5, dtype=torch.float64), [], "gaussian", False, "eager")
    for sides in ((x, offsets, None, None, None, None), (x, offsets, None, y, offsets_of([2, 3]), None)):
        sides = [side.detach() if isinstance(side, torch.Tensor) else side for side in sides]
        torch.library.opcheck(ops.alignment_backward, (torch.randn(2, 2), *sides, *settings))


def test_an_estimated_bandwidth_is_detached():
    x, offsets = packed([2, 5, 3], 4)
    sigma = ops.median_bandwidth(x, offsets, None, []).item()
    gradients = []
    for bandwidth in ("median", sigma):
        leaf = x.clone().requires_grad_()
        alignment_kernel(leaf, offsets, bandwidth=bandwidth).sum().backward()
        gradients.append(leaf.grad)
    assert_close(*gradients, 1e-12)


@pytest.mark.parametrize("normalize", ["cosine", "content"])
def test_compiles_without_a_graph_break(normalize):
    def loss(x, offsets, y, y_lengths, sigma):
        similarity = alignment_kernel(x, offsets, bandwidth=sigma, normalize=normalize)
        other = alignment_kernel(y, x_lengths=y_lengths, bandwidth="median", normalize=normalize)
        return similarity.square().sum() + other.sum() + mean_slice_similarity(x, offsets).sum()

    compiled_loss = torch.compile(loss, fullgraph=True, dynamic=True, backend="aot_eager")
    for sizes in ([2, 5], [3, 1, 6]):
        x, offsets = packed(sizes, 4)
        y = torch.randn(3, 5, 4, dtype=torch.float64)
        lengths = torch.tensor([2, 5, 1])
        gradients = []
        for function in (loss, compiled_loss):
            leaves = [x.clone().requires_grad_(), torch.tensor(1.5, dtype=torch.float64, requires_grad=True)]
            value = function(leaves[0], offsets, y, lengths, leaves[1])
            gradients.append([value.detach(), *torch.autograd.grad(value, leaves)])
        for a, b in zip(*gradients, strict=True):
            assert_close(a, b, 1e-13)


@pytest.mark.parametrize("backend", FAST_BACKENDS)
def test_autocast_changes_nothing(backend):
    x, offsets = packed([12, 30, 9], 64, dtype=torch.float32)
    expected = alignment_kernel(x, offsets, bandwidth=4.0, backend=backend)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        actual = alignment_kernel(x, offsets, bandwidth=4.0, backend=backend)
    assert actual.dtype == torch.float32
    assert torch.equal(actual, expected)


def test_autocast_changes_neither_the_posterior_nor_the_baseline():
    x, offsets = packed([12, 30, 9], 64, dtype=torch.float32)
    for function in (
        lambda: mean_slice_similarity(x, offsets),
        lambda: alignment_posterior(x, offsets, bandwidth=4.0),
    ):
        expected = function()
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert torch.equal(function(), expected)


def test_the_baseline_gives_padding_no_gradient():
    x = torch.randn(2, 3, 4)
    x[1, 2] = torch.nan
    x.requires_grad_()
    mean_slice_similarity(x, x_lengths=torch.tensor([3, 2])).sum().backward()
    assert (x.grad[1, 2] == 0).all() and x.grad.isfinite().all()


def test_vmap_is_refused_with_the_remedy():
    x, offsets = packed([2, 3], 4)
    with pytest.raises(NotImplementedError, match=r"does not support torch\.func\.vmap.*`pairs`"):
        torch.func.vmap(lambda x: alignment_kernel(x, offsets, bandwidth=1.0))(x.expand(2, -1, -1))


def test_second_derivatives_are_refused():
    x, offsets = packed([2, 3], 4)
    x.requires_grad_()
    log_k = alignment_kernel(x, offsets, bandwidth=1.0)
    (gradient,) = torch.autograd.grad(log_k.sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="no autograd formula was registered"):
        torch.autograd.grad(gradient.sum(), x)


def test_distributed_data_parallel_hooks(tmp_path):
    """The gradient of the operator passes through DDP's buckets and a communication hook."""
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        torch.manual_seed(0)
        head = torch.nn.Linear(8, 4)
        parallel = DistributedDataParallel(head)
        parallel.register_comm_hook(None, allreduce_hook)
        x, offsets = packed([3, 6, 2], 8, dtype=torch.float32)
        alignment_kernel(parallel(x), offsets, bandwidth=1.0).sum().backward()
        through_ddp = head.weight.grad.clone()
        head.zero_grad()
        alignment_kernel(head(x), offsets, bandwidth=1.0).sum().backward()
        assert_close(through_ddp, head.weight.grad, 1e-6)
        assert through_ddp.abs().max() > 0
    finally:
        dist.destroy_process_group()


X, OFFSETS = packed([2, 3], 4)
OTHER = X.float()
COLUMNS = {(0, 0): (0, 4)}
IDS = torch.zeros(5, dtype=torch.long)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"x": X.tolist()}, r"`x` must be a tensor, but is list"),
        ({"x": X.long()}, r"`x` must be float64, float32, bfloat16 or float16, but is torch.int64"),
        ({"x": X[0]}, r"`x` must be packed.*or padded.*shape \(4,\)"),
        ({"x": X[:0]}, r"`x` must not be empty"),
        ({"x_offsets": None}, r"`x` is packed.*give `x_offsets`"),
        ({"x": X[None], "x_offsets": OFFSETS}, r"`x` is padded.*give `x_lengths`"),
        ({"x_offsets": OFFSETS.float()}, r"`x_offsets` must be an int64 or int32 tensor, but is torch.float32"),
        ({"x_offsets": torch.tensor([0])}, r"`x_offsets` must have shape \(n \+ 1,\)"),
        ({"x_offsets": torch.tensor([0, 2, 4])}, r"`x_offsets` must run from 0 to the number of slices, 5, .* 0 to 4"),
        ({"x_offsets": torch.tensor([1, 2, 5])}, r"`x_offsets` must run from 0.*from 1"),
        ({"x_offsets": torch.tensor([0, 2, 2, 5])}, r"`x_offsets` must increase, but sequence 1 is empty"),
        ({"x_offsets": torch.tensor([0, 3, 2, 5])}, r"`x_offsets` must increase, but sequence 1 ends before"),
        ({"x": X[None], "x_offsets": None, "x_lengths": torch.tensor([0])}, r"`x_lengths`: sequence 0 is empty"),
        ({"x": X[None], "x_offsets": None, "x_lengths": torch.tensor([6])}, r"`x_lengths`: sequence 0 has length 6"),
        ({"x": X[None], "x_offsets": None, "x_lengths": OFFSETS}, r"`x_lengths` must have shape \(1,\)"),
        ({"x": X.clone().fill_(torch.nan)}, r"`x` must be finite, but 5 slice\(s\) hold NaN or inf, .* position 0"),
        ({"x": X.clone().index_fill_(0, torch.tensor([3]), torch.inf)}, r"`x` must be finite.*position 3"),
        ({"bandwidth": 0.0}, r"`bandwidth` must be a positive, finite number, but is 0.0"),
        ({"bandwidth": -1}, r"`bandwidth` must be a positive"),
        ({"bandwidth": float("nan")}, r"`bandwidth` must be a positive"),
        ({"bandwidth": torch.tensor(-2.0)}, r"`bandwidth` must be positive and finite, but is -2.0"),
        ({"bandwidth": torch.ones(2)}, r"`bandwidth` must be one floating-point number.*\(2,\)"),
        ({"bandwidth": "mean"}, r"`bandwidth` must be one of 'median', but is 'mean'"),
        ({"y": OTHER, "y_offsets": OFFSETS}, r"`x` and `y` must have the same dtype and device.*float64.*float32"),
        ({"y": X.to("meta"), "y_offsets": OFFSETS}, r"`x` and `y` must have the same dtype and device.*cpu.*meta"),
        ({"y": X[:, :3], "y_offsets": OFFSETS}, r"`x` and `y` must have the same number of features .* have 4 and 3"),
        ({"y_offsets": OFFSETS}, r"`y_offsets`.*describe `y`, but `y` is None"),
        ({"y": X, "y_offsets": torch.tensor([0, 0, 5])}, r"`y_offsets` must increase"),
        ({"pairs": torch.tensor([0, 1])}, r"`pairs` must be an integer tensor of shape \(p, 2\)"),
        ({"pairs": torch.tensor([[0, 2]])}, r"`pairs` must index 2 sequences of x"),
        ({"normalize": "l2"}, r"`normalize` must be one of 'none', 'cosine', 'length', 'content', but is 'l2'"),
        ({"local": "laplace"}, r"`local` must be one of"),
        ({"backend": "cuda"}, r"`backend` must be one of"),
        ({"backend": "triton"}, r"`backend=\"triton\"` needs the `triton` package and a CUDA input"),
        (
            {"modality_columns": COLUMNS},
            r"`x_modalities` must be an integer tensor of shape \(5,\), one id per slice, but is None",
        ),
        ({"x_modalities": IDS}, r"`x_modalities` was given without `modality_columns`"),
        ({"modality_columns": {}, "x_modalities": IDS}, r"`modality_columns` must name at least one"),
        (
            {"modality_columns": {(0, 0): (0, 5)}, "x_modalities": IDS},
            r"`modality_columns` must map.*\(0, 0\) to \(0, 5\)",
        ),
        (
            {"modality_columns": {(0, 1): (0, 2), (1, 0): (2, 4)}, "x_modalities": IDS},
            r"`modality_columns` must be symmetric",
        ),
        ({"modality_columns": COLUMNS, "x_modalities": IDS + 1}, r"no columns for the modality pair \(1, 1\)"),
    ],
)
def test_bad_input_is_refused_by_name(arguments, message):
    with pytest.raises(ValueError, match=message):
        alignment_kernel(**{"x": X, "x_offsets": OFFSETS, "bandwidth": 1.0, **arguments})


def test_the_other_functions_refuse_too():
    with pytest.raises(ValueError, match="`gamma` must be a positive"):
        soft_dtw(X, OFFSETS, gamma=0.0)
    with pytest.raises(ValueError, match="`x_offsets` must increase"):
        alignment_posterior(X, torch.tensor([0, 0, 5]), bandwidth=1.0)
    with pytest.raises(ValueError, match="`x` is packed"):
        mean_slice_similarity(X)
    with pytest.raises(ValueError, match="`x_offsets` must"):
        mean_slice_similarity(X, offsets_of([2, 2]))
    with pytest.raises(ValueError, match=r"no columns for the modality pair \(0, 1\)"):
        modality_columns = {(0, 0): (0, 4), (1, 1): (0, 4)}
        mean_slice_similarity(X, OFFSETS, modality_columns=modality_columns, x_modalities=torch.arange(5) % 2)
    with pytest.raises(ValueError, match="`pairs` must index"):
        mean_slice_similarity(X, OFFSETS, pairs=torch.tensor([[-1, 0]]))
    with pytest.raises(ValueError, match="`x` must be finite"):
        mean_slice_similarity(X * torch.nan, OFFSETS)
    with pytest.raises(ValueError, match="`gamma` must be positive and finite, but is -1"):
        soft_dtw(X, OFFSETS, gamma=torch.tensor(-1.0))


def test_every_pair_of_modalities_may_have_its_own_columns():
    ids = torch.arange(4)
    pairs = [(a, b) for a in range(4) for b in range(a, 4)]
    modality_columns = {pair: (2 * k, 2 * k + 2) for k, pair in enumerate(pairs)}
    modality_columns |= {(b, a): columns for (a, b), columns in modality_columns.items()}
    x, offsets = packed([4, 4, 4], 20)
    options = {"bandwidth": 2.0, "modality_columns": modality_columns, "x_modalities": ids.repeat(3)}
    expected = alignment_kernel(x, offsets, backend="reference", **options)
    for backend in FAST_BACKENDS:
        assert_close(alignment_kernel(x, offsets, backend=backend, **options), expected, 1e-12)


def test_half_precision_and_int32_offsets():
    x, offsets = packed([3, 6], 8, dtype=torch.float16)
    x.requires_grad_()
    log_k = alignment_kernel(x, offsets.int(), bandwidth=2.0)
    assert log_k.dtype == torch.float32
    log_k.sum().backward()
    assert x.grad.dtype == torch.float16
