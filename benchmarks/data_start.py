"""Measures how long and how much memory it takes to come to the first step, and back after an interruption.

python benchmarks/data_start.py --rows 1000000

The rows hold small JPEG images and captions. They are written once: as Parquet, as WebDataset, and (a tenth of them)
as a folder of images with `metadata.jsonl`. Every case is a process of its own, in which a tiny LLaVA trains. Seconds
count from the construction of the dataset to the first step, after all imports, and megabytes are what the process
has grown by at its peak, with what it has read of the files of the dataset, which are mapped and shared. `datasets`
has its own cache of the rows by then; `first load` is how long it took to write it. The same is measured with a tenth
of the rows, so that the growth per row is seen.

- `check off`, `check text`, `check cached`: a run that starts, with the check of the rows left out, done, or done
  before.
- `resumed`: a run that continues in the middle of an epoch.
- `2 workers`, `4 processes` and so on: the memory that no other process shares, at the first step: of each worker of a
  data loader, and what each process of `torchrun` has grown by.

The script writes benchmarks/results/data_start.json, and keeps what it holds of other formats and numbers of rows.
"""

import argparse
import io
import itertools
import json
import os
import platform
import resource
import shutil
import statistics
import subprocess
import sys
import tarfile
import tempfile
import time
from importlib.metadata import version
from pathlib import Path


RESULTS = Path(__file__).parent / "results" / "data_start.json"
IMAGES, FILES = 1000, 20
BATCH_SIZE = 8
CHECKS = {"map": ("off", "text", "cached"), "stream": ("off",)}


def make_jpeg(seed: int) -> bytes:
    import numpy as np
    from PIL import Image

    pixels = np.random.default_rng(seed).integers(0, 256, (4, 4, 3), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).resize((32, 32)).save(file, "JPEG")
    return file.getvalue()


def caption(place: int) -> str:
    return f"a red cat on the grass beside {place} dogs"


def write_parquet(folder: Path, rows: int) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    images = [make_jpeg(seed) for seed in range(IMAGES)]
    for number in range(FILES):
        places = range(number, rows, FILES)
        table = pa.table(
            {
                "image": pa.array([{"bytes": images[place % IMAGES], "path": None} for place in places]),
                "caption": [caption(place) for place in places],
            }
        )
        pq.write_table(table, folder / f"{number:03d}.parquet", row_group_size=1000)


def write_webdataset(folder: Path, rows: int) -> None:
    images = [make_jpeg(seed) for seed in range(IMAGES)]
    for number in range(FILES):
        with tarfile.open(folder / f"{number:03d}.tar", "w") as tar:
            for place in range(number, rows, FILES):
                for suffix, content in (("jpg", images[place % IMAGES]), ("txt", caption(place).encode())):
                    info = tarfile.TarInfo(f"{place:09d}.{suffix}")
                    info.size = len(content)
                    tar.addfile(info, io.BytesIO(content))


def write_folder(folder: Path, rows: int) -> None:
    with (folder / "metadata.jsonl").open("w") as metadata:
        for place in range(rows):
            (folder / f"{place:09d}.jpg").write_bytes(make_jpeg(place % IMAGES))
            metadata.write(json.dumps({"file_name": f"{place:09d}.jpg", "caption": caption(place)}) + "\n")


FORMATS = {"parquet": write_parquet, "webdataset": write_webdataset, "imagefolder": write_folder}
NAMES = {"parquet": "*.parquet", "webdataset": "*.tar", "imagefolder": ""}


def run_case(case: dict) -> dict:
    """What one process measures."""
    import torch

    from hf_unigd import UniGDForConditionalGeneration, UniGDProcessor, UniGDTrainer, UniGDTrainingArguments
    from hf_unigd.data import load_rows
    from hf_unigd.quickstart.small_llava import build_llava, build_processor

    torch.set_num_threads(1)
    processor = build_processor([caption(place) for place in range(100)], 32, 16)
    vlm = build_llava(processor, hidden_size=32, vision_layers=1, text_layers=1)
    model = UniGDForConditionalGeneration.from_vlm(vlm)
    args = UniGDTrainingArguments(
        output_dir=case["output"],
        per_device_train_batch_size=BATCH_SIZE,
        max_steps=case["max_steps"],
        save_strategy="steps",
        save_steps=1,
        check_rows="text" if case["check"] == "cached" else case["check"],
        dataloader_num_workers=case.get("workers", 0),
        use_cpu=True,
        report_to=[],
        disable_tqdm=True,
    )
    before, own_before, start = peak_memory(), own_memory(os.getpid()), time.monotonic()
    rows = load_rows(case["name"], streaming=case["kind"] == "stream")
    loaded = time.monotonic() - start
    reached = []

    class Trainer(UniGDTrainer):
        def training_step(self, *args, **kwargs):
            workers = Path(f"/proc/self/task/{os.getpid()}/children").read_text().split()
            own = [megabytes for worker in workers if (megabytes := own_memory(int(worker)))]
            own = own or [own_memory(os.getpid()) - own_before]
            reached.append((time.monotonic() - start, peak_memory() - before, statistics.mean(own)))
            return super().training_step(*args, **kwargs)

    trainer = Trainer(model, args, train_dataset=rows, processing_class=UniGDProcessor(processor))
    trainer.train(resume_from_checkpoint=case.get("resumes_from"))
    if case.get("steps_to_skip"):
        move_on(trainer, Path(case["output"]), case["steps_to_skip"])
    seconds, megabytes, own_megabytes = reached[0]
    return {"load": loaded, "seconds": seconds, "megabytes": megabytes, "own_megabytes": own_megabytes}


def move_on(trainer, output: Path, steps: int) -> None:
    """Makes the checkpoint of the first step one of a later step, whose batches were read, but not trained on."""
    from hf_unigd.data import Example, ExampleStream
    from hf_unigd.trainer.stream_positions import StreamPositions

    checkpoint = (output / "checkpoint-1").rename(output / f"checkpoint-{steps}")
    file = checkpoint / "trainer_state.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "global_step": steps}))
    if isinstance(trainer.train_dataset, ExampleStream):
        share = trainer.train_dataset.shard(1, 0, BATCH_SIZE, endless=True)
        share.parser = lambda row, index, epoch: Example(index, [])
        *_, last = itertools.islice(share, steps * BATCH_SIZE)
        positions = StreamPositions(trainer.args)
        positions.use([{"position": json.dumps([0, last.position])}, *[{}] * (steps - 1)])
        positions.save(checkpoint)


def peak_memory() -> float:
    """Megabytes that this process has held at most, with what it has read of the files that it has mapped."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def own_memory(process: int) -> float:
    """Megabytes of a process that no other process shares; 0 if it has ended."""
    try:
        lines = Path(f"/proc/{process}/smaps_rollup").read_text().splitlines()
    except ProcessLookupError:
        return 0.0
    return sum(int(line.split()[1]) for line in lines if line.startswith("Private_")) / 1024


def measure(processes: int = 1, **case) -> dict:
    """Runs a case in a process of its own, or in many, and returns what one of them measured."""
    launcher = ["-m", "torch.distributed.run", f"--nproc-per-node={processes}"] if processes > 1 else []
    command = [sys.executable, *launcher, __file__, "--case", json.dumps(case)]
    run = subprocess.run(command, capture_output=True, text=True)
    if run.returncode:
        raise RuntimeError(f"{case}: {run.stderr[-2000:]}")
    return json.loads(run.stdout.splitlines()[-1])


def measure_rows(folder: Path, rows: int, formats: list[str], wanted: list[str]) -> dict:
    found: dict = {}
    for form in formats:
        write = FORMATS[form]
        count = rows // 10 if form == "imagefolder" else rows
        data = folder / f"{form}-{count}"
        if not data.exists():
            unfinished = data.with_suffix(".unfinished")
            shutil.rmtree(unfinished, ignore_errors=True)
            unfinished.mkdir(parents=True)
            write(unfinished, count)
            unfinished.rename(data)
        for kind, possible in CHECKS.items():
            checks = [check for check in possible if check in wanted]
            with tempfile.TemporaryDirectory() as output:
                common: dict = {"name": str(data / NAMES[form]), "kind": kind, "output": output}
                first = measure(**common, check="off", max_steps=1)
                found[f"{form}, {kind}, first load"] = {**first, "seconds": first["load"]}
                shutil.rmtree(output)
                for check in checks:
                    found[f"{form}, {kind}, check {check}"] = measure(**common, check=check, max_steps=1)
                    shutil.rmtree(output)
                steps = count // BATCH_SIZE // 2
                measure(**common, check="off", max_steps=1, steps_to_skip=steps)
                resumed = {"resumes_from": f"{output}/checkpoint-{steps}", "max_steps": steps + 1}
                found[f"{form}, {kind}, resumed"] = measure(**common, check=checks[-1], **resumed)
                for count_of in (2, 4):
                    shutil.rmtree(output)
                    start = {**common, "check": checks[-1], "max_steps": 1}
                    found[f"{form}, {kind}, {count_of} workers"] = measure(**start, workers=count_of)
                    shutil.rmtree(output)
                    found[f"{form}, {kind}, {count_of} processes"] = measure(count_of, **start)
            for name, result in found.items():
                if name.startswith(f"{form}, {kind}"):
                    result["rows"] = count
                    own = f", {result['own_megabytes']:.0f} MB not shared" if name.split()[-2] in ("2", "4") else ""
                    line = f"{name:<32} {result['seconds']:7.1f} s {result['megabytes']:7.0f} MB{own}"
                    print(f"{count:>9,} rows, {line}", flush=True)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=100_000)
    parser.add_argument("--formats", nargs="+", choices=list(FORMATS), default=list(FORMATS))
    parser.add_argument(
        "--checks",
        nargs="+",
        choices=["off", "text", "cached"],
        default=["off", "text", "cached"],
        help="Cases of the check. Texts take about 1.1 ms a row; `cached` needs them.",
    )
    parser.add_argument("--folder", type=Path, default=Path("runs/data"))
    parser.add_argument("--case", type=json.loads, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.case:
        result = run_case(arguments.case)
        if os.environ.get("RANK", "0") == "0":
            print(json.dumps(result))
        return
    os.environ["HF_HOME"] = str(arguments.folder.absolute() / f"cache-{'-'.join(arguments.formats)}")
    shutil.rmtree(os.environ["HF_HOME"], ignore_errors=True)  # what earlier runs loaded and checked
    earlier = json.loads(RESULTS.read_text())["results"] if RESULTS.exists() else {}
    measured = {
        str(count): {
            **earlier.get(str(count), {}),
            **measure_rows(arguments.folder, count, arguments.formats, arguments.checks),
        }
        for count in (arguments.rows // 10, arguments.rows)
    }
    results = {
        "command": f"python benchmarks/data_start.py --rows {arguments.rows}",
        "cores": os.cpu_count(),
        "python": platform.python_version(),
        **{each: version(each) for each in ("torch", "transformers", "datasets")},
        "results": {**earlier, **measured},
    }
    RESULTS.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
