"""Measures the way from rows to batches: `python benchmarks/data.py [collator]`.

`collator`: rows a second of one process and of data loaders with workers, beside TRL's and sentence-transformers'
collators for the same rows, and where the processor time of one process goes. With all features in the vision cache,
the pixels are not processed. The rows hold JPEG images of 640 x 480
pixels, short captions of 6 to 20 words and long captions of 30 to 90 words. The processor is LLaVA-1.5's with CLIP's
image processor at 336 pixels and a tokenizer that is trained in the code.

In each repeat the peers take turns. Times are medians, and ratios are medians of the ratio in each repeat. The script
writes benchmarks/results/data_*.json.
"""

import argparse
import io
import itertools
import json
import os
import platform
import statistics
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch
import transformers
from datasets import Dataset, Features, Value
from datasets import Image as ImageFeature
from PIL import Image, ImageFile
from torch.utils.data import DataLoader
from transformers import ProcessorMixin

from hf_unigd import UniGDDataCollator, UniGDProcessor, UniGDTrainingArguments
from hf_unigd.quickstart.small_llava import build_llava, build_processor
from hf_unigd.trainer.collator import collator_for_objective
from hf_unigd.trainer.examples import prepare_examples
from hf_unigd.trainer.stored_images import StoredImages


RESULTS = Path(__file__).parent / "results"
TEXT = "a red cat sits on the green grass beside two small blue dogs and looks at people who wave from a window"
PROMPT = "Summarize the provided image in one word"
ROWS, BATCH_SIZE = 256, 32


def make_text(count: int, seed: int) -> str:
    return " ".join(np.random.default_rng(seed).choice(TEXT.split(), count).tolist())


def make_jpeg(seed: int, size: tuple[int, int] = (640, 480)) -> bytes:
    """Smooth random colours, which compress as a photograph does: to about 60 kB."""
    coarse = np.random.default_rng(seed).integers(0, 256, (size[1] // 16, size[0] // 16, 3), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(coarse).resize(size, Image.Resampling.BICUBIC).save(file, "JPEG", quality=90)
    return file.getvalue()


def make_rows(**columns: list[str]) -> Dataset:
    features = Features({"image": ImageFeature(), **{name: Value("string") for name in columns}})
    images = [{"bytes": make_jpeg(place), "path": None} for place in range(ROWS)]
    return Dataset.from_dict({"image": images, **columns}, features=features)


class OwnRows:
    """The dataset and the collator of [`UniGDTrainer`]."""

    def __init__(self, rows: Dataset, processor: ProcessorMixin, **kwargs):
        args = UniGDTrainingArguments(
            output_dir=tempfile.mkdtemp(), use_cpu=True, report_to=[], check_rows="off", **kwargs
        )
        wrapped = UniGDProcessor(processor)
        self.collate = collator_for_objective(UniGDDataCollator(wrapped), args)
        self.rows = prepare_examples(rows, wrapped, args, self.collate, None, True)


class AllStored:
    """An index of a vision cache that holds every image."""

    def knows(self, key: str) -> bool:
        return True

    def find(self, key: tuple[str, int]) -> Path:
        return Path("shard.safetensors")


class StoredRows(OwnRows):
    """The same with a vision cache that holds the features of all images."""

    def __init__(self, rows: Dataset, processor: ProcessorMixin):
        super().__init__(rows, processor, vision_cache=tempfile.mkdtemp())
        self.collate.stored_images = StoredImages.for_processor(AllStored(), self.collate.processor)


class TRLRows:
    """The captions as completions of the prompt."""

    def __init__(self, rows: Dataset, processor: ProcessorMixin, column: str):
        from trl.trainer.sft_trainer import DataCollatorForVisionLanguageModeling

        self.rows = rows.map(
            lambda text: {
                "prompt": [{"role": "user", "content": PROMPT}],
                "completion": [{"role": "assistant", "content": text}],
            },
            input_columns=column,
            remove_columns=column,
        )
        self.collate = DataCollatorForVisionLanguageModeling(processor, completion_only_loss=True)


class SentenceTransformersRows:
    """The images as anchors, and the captions as positives."""

    def __init__(self, rows: Dataset, processor: ProcessorMixin):
        from sentence_transformers.base.data_collator import BaseDataCollator
        from sentence_transformers.sentence_transformer.modules import Transformer

        with tempfile.TemporaryDirectory() as folder:
            build_llava(processor, hidden_size=32, vision_layers=1, text_layers=1).save_pretrained(folder)
            processor.save_pretrained(folder)
            transformer = Transformer(folder)
        self.rows = rows
        self.collate = BaseDataCollator(preprocess_fn=transformer.preprocess)


class Places:
    """A sampler without end."""

    def __iter__(self) -> Iterator[int]:
        return itertools.cycle(range(ROWS))


def seconds_per_row(peer, workers: int, batches: int) -> float:
    loader = DataLoader(peer.rows, BATCH_SIZE, sampler=Places(), collate_fn=peer.collate, num_workers=workers)
    loaded = iter(loader)
    for _ in range(3 * max(workers, 1)):  # until all workers are busy, and nothing is waiting that they made before
        next(loaded)
    start = time.perf_counter()
    for _ in range(batches):
        next(loaded)
    return (time.perf_counter() - start) / (batches * BATCH_SIZE)


class Parts:
    """Processor time by part. What is called inside of a part, and is a part itself, does not count twice."""

    def __init__(self):
        self.seconds: dict[str, float] = defaultdict(float)
        self._names, self._start = ["own"], time.process_time()

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        self._count()
        self._names.append(name)
        try:
            yield
        finally:
            self._count()
            self._names.pop()

    def _count(self) -> None:
        now = time.process_time()
        self.seconds[self._names[-1]] += now - self._start
        self._start = now

    def watch(self, owner: Any, method: str, name: str):
        function: Callable = getattr(owner, method)

        def watched(*args, **kwargs):
            with self.part(name):
                return function(*args, **kwargs)

        return mock.patch.object(owner, method, watched)


def profile_parts(peer, processor: ProcessorMixin, batches: int) -> dict[str, float]:
    """Milliseconds of processor time a row. `own` is what neither Pillow nor `datasets` nor transformers does, nor the
    allocator when pixels are freed."""
    parts = Parts()
    with ExitStack() as stack:
        for owner, method, name in (
            (Image, "open", "decoding"),
            (ImageFile.ImageFile, "load", "decoding"),
            (Dataset, "__getitem__", "reading"),
            (type(processor.image_processor), "__call__", "image processor"),
            (type(processor.tokenizer), "__call__", "tokenizer"),
            (type(processor), "__call__", "processor"),
            (type(processor), "apply_chat_template", "chat template"),
        ):
            stack.enter_context(parts.watch(owner, method, name))
        parts._start = time.process_time()
        places = itertools.cycle(range(ROWS))
        for _ in range(batches):
            examples = [peer.rows[place] for place in itertools.islice(places, BATCH_SIZE)]
            batch = peer.collate(examples)
            with parts.part("freeing"):
                del examples, batch
        parts._count()
    return {name: 1000 * value / (batches * BATCH_SIZE) for name, value in parts.seconds.items()}


def collator(arguments) -> dict:
    """Ours, and the peers' for the same rows."""
    processor = build_processor([TEXT, PROMPT], 336, 14)
    short = {"short_caption": [make_text(6 + place * 7 % 15, place) for place in range(ROWS)]}
    long = {"long_caption": [make_text(30 + place * 23 % 61, 1000 + place) for place in range(ROWS)]}
    both, captioned, paired = make_rows(**short, **long), make_rows(**long), make_rows(**short)
    cases = {
        "short and long captions": {"ours": OwnRows(both, processor)},
        "short and long captions, features stored": {"ours": StoredRows(both, processor)},
        "long captions": {
            "ours": OwnRows(captioned, processor, contrastive_weight=0.0),
            "trl": TRLRows(captioned, processor, "long_caption"),
        },
        "short captions": {
            "ours": OwnRows(paired, processor, causal_lm_weight=0.0),
            "sentence-transformers": SentenceTransformersRows(paired, processor),
        },
    }
    found: dict[str, dict] = {}
    for name, peers in cases.items():
        found[name] = {"milliseconds": profile_repeatedly(peers["ours"], processor, arguments)}
        parts = found[name]["milliseconds"]
        found[name]["own_share"] = parts["own"] / sum(parts.values())
        listing = ", ".join(f"{part} {value:.2f}" for part, value in sorted(parts.items(), key=lambda each: -each[1]))
        print(f"{name}: ms a row: {listing}; own share {found[name]['own_share']:.1%}", flush=True)
        for workers in arguments.workers:
            found[name][f"{workers} workers"] = compare(f"{name}, {workers} workers", peers, workers, arguments)
    return found


def profile_repeatedly(peer, processor: ProcessorMixin, arguments) -> dict[str, float]:
    profile_parts(peer, processor, 1)  # warms up
    runs = [profile_parts(peer, processor, arguments.batches) for _ in range(arguments.repeats)]
    return {part: statistics.median(run[part] for run in runs) for part in runs[0]}


def compare(name: str, peers: dict, workers: int, arguments) -> dict:
    times: dict[str, list[float]] = {peer: [] for peer in peers}
    for _ in range(arguments.repeats):
        for peer, each in peers.items():
            times[peer].append(seconds_per_row(each, workers, arguments.batches * max(workers, 1)))
    found: dict = {"rows_per_second": {peer: 1 / statistics.median(each) for peer, each in times.items()}}
    for peer in peers.keys() - {"ours"}:
        found["ratio"] = statistics.median(a / b for a, b in zip(times[peer], times["ours"], strict=True))
    rates = ", ".join(f"{peer} {value:.0f} rows/s" for peer, value in found["rows_per_second"].items())
    print(f"{name}: {rates}" + (f"; ratio {found['ratio']:.2f}" if "ratio" in found else ""), flush=True)
    return found


BENCHMARKS = {"collator": collator}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", default=list(BENCHMARKS), help=", ".join(BENCHMARKS))
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--batches", type=int, default=8, help="Batches of 32 rows that each worker is measured with.")
    parser.add_argument("--workers", type=int, nargs="+", default=[0, 1, 2])
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    transformers.logging.set_verbosity_error()
    cpu = [line.split(": ")[1] for line in Path("/proc/cpuinfo").read_text().splitlines() if "model name" in line]
    for name in arguments.names:
        result = {
            "command": f"python benchmarks/data.py {name} --repeats {arguments.repeats} --batches {arguments.batches} "
            f"--workers {' '.join(map(str, arguments.workers))}",
            "cpu": cpu[0],
            "cores": os.cpu_count(),
            "load_average": os.getloadavg()[0],
            "python": platform.python_version(),
            **{each: version(each) for each in ("torch", "transformers", "pillow", "trl", "sentence-transformers")},
            "results": BENCHMARKS[name](arguments),
        }
        (RESULTS / f"data_{name}.json").write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
