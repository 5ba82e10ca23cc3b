"""The alignment kernel and its peers, which benchmarks/alignment_kernels.py has."""

import alignment_kernels as peers
import torch
from measuring import measure
from models import SHAPES


def kernels() -> dict:
    backend = "triton" if SHAPES["device"] == "cuda" else "auto"
    functions = {
        "ours": lambda case: peers.ours(case, backend),
        "eager autograd": lambda case: peers.autograd(case, peers.step),
        "product": peers.product,
    }

    def run(arguments, dtype, name):
        case = peers.Case(*arguments, dtype, True)
        case.x, case.weights = case.x.to(SHAPES["device"]), case.weights.to(SHAPES["device"])
        found = measure(lambda: functions[name](case), 5) | {"slices": case.total}
        if name == "product" or arguments[0] > 256:  # the reference would not fit
            return found
        case.backward = False
        value, gradient = functions[name](case).double(), measured_gradient(case, functions[name])
        exact = peers.Case(*arguments, dtype, False)
        exact.x, exact.weights, exact.dtype = case.x.double(), case.weights.double(), torch.float64
        reference = functions["eager autograd"](exact)
        exact_gradient = measured_gradient(exact, functions["eager autograd"])
        error = (gradient - exact_gradient).abs().max() / exact_gradient.abs().max()
        return found | {
            "value_error": float((value - reference).abs().max()),
            "largest_value": float(reference.abs().max()),
            "gradient_error": float(error),
        }

    def measured_gradient(case, function):
        case.backward = True
        (gradient,) = function(case)
        return gradient.double()

    parts = {}
    for n, lengths, d in SHAPES["kernels"]:
        for dtype, names in ((torch.float32, list(functions)), (torch.bfloat16, ["ours"])):
            for name in names:
                title = f"N={n} lengths {lengths[0]}..{lengths[1]} d={d} {str(dtype).removeprefix('torch.')}, {name}"
                parts[title] = lambda n=n, lengths=lengths, d=d, dtype=dtype, name=name: run(
                    (n, lengths, d), dtype, name
                )
    return parts
