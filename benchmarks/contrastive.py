"""Compares the contrastive loss with plain torch: `python benchmarks/contrastive.py`.

The peer is OpenCLIP's local loss: each process compares its own rows with all gathered rows, once in each direction.
Of several processes, one is run. The others have copies of its rows, so its gradients are exact. Both get the same
rows and compute the loss and all gradients in float32. Ours also masks duplicates and computes its metrics, as in
training. In each repeat they take turns. Times are medians, and the ratio is the median of the ratio in each repeat.
Memory is the peak of a fresh process above what it held before the call, with the gathered rows. The script writes
benchmarks/results/contrastive.json.
"""

import argparse
import json
import multiprocessing
import os
import platform
import statistics
import time
from pathlib import Path

import torch
from torch.nn import functional as F

from hf_unigd.trainer.losses import InfoNCELoss, info_nce


RESULTS = Path(__file__).parent / "results"
CASES = {  # own rows, processes
    "1k rows": (1024, 1),
    "4k rows": (4096, 1),
    "32k rows on 8 processes, one of them": (4096, 8),
}
DIM = 768


class Step:
    """One call of each peer on the same rows."""

    def __init__(self, rows: int, processes: int):
        generator = torch.Generator().manual_seed(0)
        self.rows, self.processes = rows, processes
        self.inputs = [F.normalize(torch.randn(rows, DIM, generator=generator), dim=-1) for _ in range(2)]
        self.inputs.append(torch.tensor(14.0))
        for each in self.inputs:
            each.requires_grad_()
        self.keys = torch.arange(rows)

    def gather(self, rows: torch.Tensor) -> torch.Tensor:
        if rows.dtype == torch.long:  # content keys, which differ between processes
            return torch.cat([rows + place * self.rows for place in range(self.processes)])
        return rows if self.processes == 1 else rows.repeat(self.processes, *[1] * (rows.ndim - 1))

    def ours(self) -> torch.Tensor:
        info_nce.gather_rows = self.gather
        info_nce.gather_counts = lambda rows: ([len(rows)] * self.processes, 0)
        queries, positives, scale = self.inputs
        return InfoNCELoss()(queries, positives, scale, query_keys=self.keys, positive_keys=self.keys)["loss"]

    def plain(self) -> torch.Tensor:
        queries, positives, scale = self.inputs
        first = scale * queries @ self.gather(positives).T
        second = scale * positives @ self.gather(queries).T
        return F.cross_entropy(first, self.keys) + F.cross_entropy(second, self.keys)

    def __call__(self, peer: str) -> list[torch.Tensor]:
        """Returns the loss and the gradients, averaged over processes."""
        loss = getattr(self, peer)()
        gradients = torch.autograd.grad(loss, self.inputs)
        # Every process has the same rows here, so the mean over processes is that of one.
        return [loss.detach(), *gradients]


PEERS = ("ours", "plain")


def status(name: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{name}:"))


def measure_peak(peer: str, case: tuple[int, int], threads: int, queue) -> None:
    torch.set_num_threads(threads)
    Step(64, 1)(peer)  # loads the libraries
    step = Step(*case)
    Path("/proc/self/clear_refs").write_text("5")  # resets the peak
    before = status("VmRSS")
    step(peer)
    queue.put(status("VmHWM") - before)


def peak(peer: str, case: tuple[int, int], threads: int) -> int:
    context = multiprocessing.get_context("spawn")
    queue = context.Queue()
    process = context.Process(target=measure_peak, args=(peer, case, threads, queue))
    process.start()
    process.join()
    if process.exitcode:
        raise RuntimeError(f"{peer} ended with {process.exitcode}.")
    return queue.get()


def compare(name: str, repeats: int, threads: int) -> dict:
    step = Step(*CASES[name])
    for ours, plain in zip(step("ours"), step("plain"), strict=True):  # warms up, too
        torch.testing.assert_close(ours, plain, rtol=1e-3, atol=1e-6)
    times: dict[str, list[float]] = {peer: [] for peer in PEERS}
    for _ in range(repeats):
        for peer in PEERS:
            start = time.perf_counter()
            step(peer)
            times[peer].append(time.perf_counter() - start)
    found = {
        "seconds": {peer: statistics.median(each) for peer, each in times.items()},
        "ratio": statistics.median(a / b for a, b in zip(times["ours"], times["plain"], strict=True)),
        "peak_bytes": {peer: peak(peer, CASES[name], threads) for peer in PEERS},
        "repeats": repeats,
    }
    seconds = ", ".join(f"{peer} {value:.3f} s" for peer, value in found["seconds"].items())
    memory = ", ".join(f"{peer} {value / 1e6:.0f} MB" for peer, value in found["peak_bytes"].items())
    print(f"{name}: {seconds}; ratio {found['ratio']:.2f}; {memory}", flush=True)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    cpu = [line.split(": ")[1] for line in Path("/proc/cpuinfo").read_text().splitlines() if "model name" in line]
    result = {
        "command": f"python benchmarks/contrastive.py --repeats {arguments.repeats} --threads {arguments.threads}",
        "cpu": cpu[0],
        "cores": os.cpu_count(),
        "threads": arguments.threads,
        "load_average": os.getloadavg()[0],
        "python": platform.python_version(),
        "torch": torch.__version__,
        "results": {name: compare(name, arguments.repeats, arguments.threads) for name in CASES},
    }
    (RESULTS / "contrastive.json").write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
