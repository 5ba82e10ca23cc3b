"""Compares the alignment kernels with peers: `python benchmarks/alignment_kernels.py [headline] [grid] [scaling]`.

In each repeat the peers take turns, so that other load on the machine affects all of them alike. `ms` is the median.
On a busy machine, `fastest` and `cpu` are more reliable. `cpu` is the least processor time of a call over all its
threads. `product` is the floor, the matrix product of all slices alone, and `xfloor` is the ratio to it. `eager
autograd` is the usual code without this library: batched anti-diagonals, differentiated by autograd. Memory is the
peak of a fresh process minus what it held before the call. A peer is skipped, with the reason, if it would take longer
than LIMIT, judging by its rate on a smaller case, or more memory than MEMORY. After each case, the script writes
benchmarks/results/kernels-*.json.
"""

import argparse
import json
import multiprocessing
import os
import platform
import resource
import statistics
import time
import warnings
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch.nn.utils.rnn import pack_sequence

from hf_unigd.kernels import alignment_kernel, soft_dtw


RESULTS = Path(__file__).parent / "results"
LIMIT = 20.0  # seconds that a call may take (`--limit`); the peers in ALWAYS_FIT may take three times as long
TURNS = 8.0  # seconds after which a slow peer takes no more than two turns
MEMORY = 10e9  # bytes


class Case:
    def __init__(self, n, lengths, d, dtype, backward):
        self.n, self.range, self.d, self.dtype, self.backward = n, lengths, d, dtype, backward
        generator = torch.Generator().manual_seed(0)
        self.lengths = torch.randint(lengths[0], lengths[1] + 1, (n,), generator=generator)
        self.offsets = torch.cat([torch.zeros(1, dtype=torch.int64), self.lengths.cumsum(0)])
        self.total = int(self.offsets[-1])
        self.x = F.normalize(torch.randn(self.total, d, generator=generator), dim=-1).to(dtype)
        self.weights = torch.randn(n, n, generator=generator).to(dtype)
        # The textbook rule: median distance (sqrt 2 for random directions) times sqrt(median length).
        self.bandwidth = (2 * self.lengths.median().item()) ** 0.5
        self.gamma = 2 * self.bandwidth**2

    def __str__(self):
        what = "forward+backward" if self.backward else "forward"
        name = str(self.dtype).removeprefix("torch.")
        return f"N={self.n} lengths {self.range[0]}..{self.range[1]} d={self.d} {name} {what}"

    def sequences(self, x):
        return x.split(self.lengths.tolist())

    def differentiate(self, function):
        """Calls the function and, in a backward case, computes its gradient to the features."""
        if not self.backward:
            with torch.no_grad():
                return function(self.x)
        x = self.x.clone().requires_grad_()
        return torch.autograd.grad((function(x) * self.weights).sum(), x)

    @property
    def work(self):
        return self.total**2 * (self.d + 60)


def product(case):
    """Computes X X^T, also in a backward case. It is computed in blocks of rows, because it may not fit in memory."""
    rows = max(1, (1 << 28) // case.total)
    for part in case.x.split(rows):
        part @ case.x.T


def ours(case, backend):
    return case.differentiate(
        lambda x: alignment_kernel(x, case.offsets, bandwidth=case.bandwidth, normalize="none", backend=backend)
    )


def ours_soft_dtw(case):
    return case.differentiate(lambda x: soft_dtw(x, case.offsets, gamma=case.gamma, backend="compiled"))


def step(kappa, one, two):
    above, diagonal = F.pad(one[..., :-1], (1, 0), value=-1e30), F.pad(two[..., :-1], (1, 0), value=-1e30)
    return kappa + torch.logsumexp(torch.stack([one, above, diagonal]), 0)


def autograd(case, step_function):
    """Pads all pairs, skews them to anti-diagonals and runs the recursion in the log domain."""

    def gram(x):
        padded = torch.nn.utils.rnn.pad_sequence(case.sequences(x), batch_first=True)
        n, length, d = padded.shape
        flat = padded.reshape(n * length, d)
        norms = flat.square().sum(1)
        u = (norms[:, None] + norms - 2 * flat @ flat.T).clamp_min(0) / (2 * case.bandwidth**2)
        kappa = (-u - torch.log(2 - torch.exp(-u))).view(n, length, n, length).transpose(1, 2)
        steps = 2 * length - 1
        skewed = F.pad(kappa, (0, length), value=-1e30).reshape(n, n, length * (steps + 1))
        skewed = skewed[..., : length * steps].view(n, n, length, steps).permute(3, 0, 1, 2).contiguous()
        skewed = skewed.unbind()  # the gradient of an indexed diagonal would be as large as the whole tensor
        two = torch.full_like(skewed[0], -1e30)
        one = F.pad(skewed[0][..., :1], (0, length - 1), value=-1e30)
        diagonals = [one]
        for t in range(1, steps):
            one, two = step_function(skewed[t], one, two), one
            diagonals.append(one)
        rows = torch.arange(n)
        ends = case.lengths[:, None] + case.lengths - 2
        return torch.stack(diagonals)[ends, rows[:, None], rows, (case.lengths - 1)[:, None]]

    return case.differentiate(gram)


_compiled_step = torch.compile(step, dynamic=True)


def tslearn_dataset(case):
    from tslearn.utils import to_time_series_dataset

    return to_time_series_dataset([part.numpy() for part in case.sequences(case.x)])


def tslearn_gak(case):
    from tslearn.metrics import cdist_gak

    cdist_gak(tslearn_dataset(case), sigma=case.bandwidth)


def tslearn_soft_dtw(case):
    from tslearn.metrics import cdist_soft_dtw

    cdist_soft_dtw(tslearn_dataset(case), gamma=case.gamma)


def pysdtw_soft_dtw(case):
    """Computes the upper triangle, 2,048 pairs at a time, because not all of them fit in memory."""
    import pysdtw

    function = pysdtw.SoftDTW(gamma=case.gamma, use_cuda=False)
    i, j = torch.triu_indices(case.n, case.n).unbind()

    def gram(x):
        parts = case.sequences(x)
        values = []
        for a, b in zip(i.split(2048), j.split(2048), strict=True):
            first = pack_sequence([parts[k] for k in a.tolist()], enforce_sorted=False)
            second = pack_sequence([parts[k] for k in b.tolist()], enforce_sorted=False)
            values.append(function(first, second))
        return torch.zeros_like(case.weights).index_put((i, j), torch.cat(values).flatten())

    return case.differentiate(gram)


# name -> (function, whether it has a backward)
PEERS = {
    "product": (product, True),
    "compiled (ours)": (lambda case: ours(case, "compiled"), True),
    "eager (ours)": (lambda case: ours(case, "eager"), True),
    "eager autograd": (lambda case: autograd(case, step), True),
    "torch.compile of it": (lambda case: autograd(case, _compiled_step), True),
    "tslearn cdist_gak": (tslearn_gak, False),
    "soft-DTW compiled (ours)": (ours_soft_dtw, True),
    "soft-DTW tslearn": (tslearn_soft_dtw, False),
    "soft-DTW pysdtw": (pysdtw_soft_dtw, True),
}
MEMORY_PEERS = ("product", "compiled (ours)", "eager (ours)", "eager autograd", "tslearn cdist_gak")
ALWAYS_FIT = ("product", "compiled (ours)", "soft-DTW compiled (ours)")


class Seconds(NamedTuple):
    wall: float
    cpu: float


def seconds(call):
    wall, cpu = time.perf_counter(), time.process_time()
    call()
    return Seconds(time.perf_counter() - wall, time.process_time() - cpu)


def median(values):
    return statistics.median(value.wall for value in values)


def min_cpu(values):
    return min(value.cpu for value in values)


def reason_to_skip(name, case, rates):
    """Returns why this peer is skipped, or None."""
    if case.backward and not PEERS[name][1]:
        return "it has no backward"
    if name in ("eager autograd", "torch.compile of it"):
        padded = (case.n * case.range[1]) ** 2 * case.dtype.itemsize
        memory = padded * (25 if case.backward else 8)  # measured at N = 192 and 256
        if memory > MEMORY:
            return f"it would take some {memory / 1e9:.0f} GB"
    # A case with a backward takes at least as long as one without.
    rate = max(rates.get((name, case.d, case.dtype, backward), 0.0) for backward in (False, case.backward))
    if rate * case.work > (3 * LIMIT if name in ALWAYS_FIT else LIMIT):
        return f"it would take some {rate * case.work:.0f} s or more, by its rate on a smaller case"
    return None


def measure(case, names, repeats, rates):
    """Returns the seconds of each peer's turns, and why the other peers are skipped. The first call of a fast peer is
    not counted."""
    times, left_out = {}, {}

    def call(name):
        try:
            return seconds(lambda: PEERS[name][0](case))
        except (MemoryError, RuntimeError) as error:  # over the limit that `main` sets
            times.pop(name, None)
            left_out[name] = str(error).splitlines()[0]
            return None

    for name in names:
        if reason := reason_to_skip(name, case, rates):
            left_out[name] = reason
        elif (first := call(name)) is not None:
            times[name] = [first] if first.wall > TURNS else []
    for _ in range(repeats):
        for name, values in list(times.items()):
            # A fast peer is called several times per turn.
            for _ in range(5 if values and values[0].wall < 0.1 else 1):
                more = sum(value.wall for value in values) < TURNS or len(values) < 2
                if more and (value := call(name)) is not None:
                    values.append(value)
    for name, values in times.items():
        rates[name, case.d, case.dtype, case.backward] = min(values).wall / case.work
    return times, left_out


def _megabytes(field):
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith(field)).split()[1]) / 1024


def _peak(arguments, name, queue):
    torch.set_num_threads(2)
    small = Case(4, (2, 3), 4, arguments[3], arguments[4])
    PEERS[name][0](small)  # so that the memory of code and libraries is not counted
    case = Case(*arguments)
    Path("/proc/self/clear_refs").write_text("5")  # resets the peak
    before = _megabytes("VmRSS")
    PEERS[name][0](case)
    queue.put(_megabytes("VmHWM") - before)


def peak_memory(arguments, name):
    """Returns the MB that a call takes in its own process."""
    context = multiprocessing.get_context("spawn")
    queue = context.Queue()
    process = context.Process(target=_peak, args=(arguments, name, queue))
    process.start()
    process.join()
    return queue.get() if process.exitcode == 0 else None  # None: over the limit that `main` sets


def report(case, times, left_out, memory=None):
    medians = {name: median(values) for name, values in times.items()}
    floor = medians.get("product")
    ours_time = medians.get("soft-DTW compiled (ours)"), medians.get("compiled (ours)")
    print(f"\n{case}, {case.total} slices")
    print(
        f"  {'':26}{'ms':>12}{'fastest':>12}{'cpu':>12}{'xours':>9}{'xfloor':>9}"
        + (f"{'peak MB':>10}" if memory else "")
    )
    for name, value in medians.items():
        mine = ours_time[0] if name.startswith("soft-DTW") else ours_time[1]
        row = f"  {name:26}{value * 1e3:12.1f}{min(times[name]).wall * 1e3:12.1f}{min_cpu(times[name]) * 1e3:12.1f}"
        row += f"{value / mine:9.1f}" if mine else f"{'':9}"
        row += f"{value / floor:9.2f}" if floor else f"{'':9}"
        print(row + (f"{memory[name]:10.0f}" if memory and name in memory else ""), flush=True)
    for name, reason in left_out.items():
        print(f"  {name:26}left out: {reason}", flush=True)
    return {
        "case": str(case),
        "slices": case.total,
        "seconds": medians,
        "fastest_seconds": {name: min(values).wall for name, values in times.items()},
        "cpu_seconds": {name: min_cpu(values) for name, values in times.items()},
        "left_out": left_out,
        "peak_mb": memory or {},
    }


def measure_memory(arguments, times):
    """Measures the peak memory of the peers whose call is fast enough for a fresh process."""
    names = [name for name in times if name in MEMORY_PEERS and min(times[name]).wall < LIMIT]
    return {name: peak for name in names if (peak := peak_memory(arguments, name)) is not None}


def headline():
    """Every peer, with memory, for N = 256, lengths 8 to 32 and float32."""
    rates = {}
    for d in (64, 768):
        for backward in (False, True):
            arguments = (256, (8, 32), d, torch.float32, backward)
            case = Case(*arguments)
            # Compilation gains little without a backward, so it isn't measured with one. The slow peers are measured
            # for d = 64 only.
            skipped = {"torch.compile of it"} if backward else set()
            if d > 64:
                skipped = {"eager autograd", "torch.compile of it", "soft-DTW tslearn", "soft-DTW pysdtw"}
            times, left_out = measure(case, [name for name in PEERS if name not in skipped], 9, rates)
            left_out |= dict.fromkeys(sorted(skipped), "not asked for here")
            yield report(case, times, left_out, measure_memory(arguments, times))


def grid():
    rates = {}
    names = [name for name in PEERS if "torch.compile" not in name]
    for dtype in (torch.float32, torch.float64):
        for d in (64, 768):
            for lengths in ((8, 32), (64, 256)):
                for n in (64, 256, 1024):
                    for backward in (False, True):
                        arguments = (n, lengths, d, dtype, backward)
                        case = Case(*arguments)
                        times, left_out = measure(case, names, 3, rates)
                        yield report(case, times, left_out, measure_memory(arguments, times))


def scaling():
    """Shows that the cost depends only on the square of the total number of slices: N up to 4,096, and other lengths
    with as many slices. The columns are forward, then forward + backward."""
    print(f"\n{'N':>6}{'lengths':>10}{'slices':>9}" + f"{'s':>10}{'cpu s':>8}{'cpu ns/slices^2':>17}" * 2)
    for n, lengths in ((256, (8, 32)), (512, (8, 32)), (1024, (8, 32)), (2048, (8, 32)), (4096, (8, 32)),
                       (2560, (4, 12)), (640, (16, 48)), (160, (64, 192))):  # fmt: skip
        row = {"n": n, "lengths": lengths}
        line = f"{n:6}{lengths[0]:>5}..{lengths[1]:<3}"
        for backward in (False, True):
            case = Case(n, lengths, 64, torch.float32, backward)
            values = measure(case, ["compiled (ours)"], 3, {})[0]["compiled (ours)"]
            wall, cpu = median(values), min_cpu(values)
            row["slices"] = case.total
            row["forward_backward" if backward else "forward"] = {"seconds": wall, "cpu_seconds": cpu}
            line += "" if backward else f"{case.total:9}"
            line += f"{wall:10.3f}{cpu:8.3f}{cpu * 1e9 / case.total**2:17.3f}"
        print(line, flush=True)
        yield row


PARTS = {"headline": headline, "grid": grid, "scaling": scaling}


def processor():
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return {"name": platform.processor()}
    read = {key.strip(): value.strip() for key, _, value in (line.partition(":") for line in lines)}
    flags = read.get("flags", "").split()
    return {
        "name": read.get("model name"),
        "flags": [f for f in flags if f in ("avx2", "avx512f", "amx_bf16", "avx512_bf16")],
    }


def main():
    global LIMIT
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="*", help=f"any of {', '.join(PARTS)}; all by default")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--limit", type=float, default=LIMIT, help="seconds that the call of a peer may take")
    arguments = parser.parse_args()
    LIMIT = arguments.limit
    if unknown := set(arguments.parts) - set(PARTS):
        parser.error(f"unknown parts {sorted(unknown)}")
    torch.set_num_threads(arguments.threads)
    # A peer that needs more memory fails instead of taking down the machine. The mappings of libraries do not count.
    limit = int(_megabytes("VmSize") * 1e6 + MEMORY)
    resource.setrlimit(resource.RLIMIT_AS, (limit, resource.getrlimit(resource.RLIMIT_AS)[1]))
    warnings.filterwarnings("ignore")
    machine = {
        "processor": processor(),
        "threads": arguments.threads,
        "torch": torch.__version__,
        "load_average": os.getloadavg()[0],
    }
    print(json.dumps(machine))
    RESULTS.mkdir(exist_ok=True)
    for part in arguments.parts or PARTS:
        results = []
        for result in PARTS[part]():
            results.append(result)
            text = json.dumps({"machine": machine, "results": results}, indent=1)
            (RESULTS / f"kernels-{part}.json").write_text(text + "\n")


if __name__ == "__main__":
    main()
