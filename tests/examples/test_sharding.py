"""The configurations of one machine with two processes on gloo: training equals one process, saves and resumes."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from hf_unigd.hub import load_checkpoint
from hf_unigd.hub.pushing import pushed_files
from tiny_models import make_image


CONFIGS = Path(__file__).parents[2] / "examples" / "accelerate"
ACCUMULATION = ["--gradient_accumulation_steps", "2"]
ADAPTER = ["--use_peft", "true", "--soft_prompts", "true"]
OWN_FILES = {
    "fsdp2": {"pytorch_model_fsdp.bin", "optimizer.bin"},
    "deepspeed_zero2": {"global_step2", "latest", "zero_to_fp32.py", "zero_to_torch.py"},
}


def train(folder: Path, config: str, processes: int = 2) -> Path:
    """Trains a full model and an adapter. Two processes also train in bfloat16 and with the gradient cache. Runs of a
    configuration that shards the model are also resumed."""
    output = folder / (config if processes > 1 else "one")
    common = {
        "model_name_or_path": folder / "vlm",
        "dataset_name": folder / "rows",
        "per_device_train_batch_size": 8 // processes,
        "max_steps": 4,
        "save_steps": 2,
        "logging_steps": 1,
        "learning_rate": 0.01,
        "ddp_backend": "gloo",
        "use_cpu": "true",
        "report_to": "none",
        "check_rows": "off",
        "trust_caption_columns": "true",
    }
    flags = [part for name, value in common.items() for part in (f"--{name}", str(value))]
    runs = [["bf16", [*flags, "--output_dir", f"{output}/bf16"]]] if processes > 1 else []
    if processes > 1 and config != "deepspeed_zero2":  # it refuses the cache
        cache = ["--gradient_cache_chunk_size", "3"]
        runs.append(["no", [*flags, *ADAPTER, *cache, "--output_dir", f"{output}/cached-adapter"]])
    for kind, more in (("full", ACCUMULATION), ("adapter", ADAPTER)):
        whole, resumed = f"{output}/{kind}", f"{output}/{kind}-resumed"
        resume = ["--resume_from_checkpoint", f"{whole}/checkpoint-2"]
        runs.append(["no", [*flags, *more, "--output_dir", whole]])
        if config != "ddp":
            runs.append(["no", [*flags, *more, "--output_dir", resumed, *resume]])
    launcher = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", str(CONFIGS / f"{config}.yaml")]
    launcher += ["--num_processes", str(processes), "--main_process_port", "0"]  # any free port
    command = [*launcher, "-m", "launched_runs", json.dumps(runs)]
    paths = [str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")]
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(paths),
        "OMP_NUM_THREADS": "1",
        "OMP_WAIT_POLICY": "passive",
        "DS_ACCELERATOR": "cpu",
    }
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-4000:]
    return output


@pytest.fixture(scope="module")
def ddp(folder):
    return train(folder, "ddp")


@pytest.fixture(scope="module")
def one(folder):
    return train(folder, "ddp", processes=1)


@pytest.fixture(scope="module", params=sorted(OWN_FILES))
def sharded(request, folder):
    if request.param == "deepspeed_zero2":
        pytest.importorskip("deepspeed")
    return train(folder, request.param)


def weights(checkpoint: Path) -> dict[str, torch.Tensor]:
    (file,) = checkpoint.glob("*model.safetensors")
    return load_file(file)


def logged(run: Path, *parts: str) -> list[dict[str, float]]:
    """Returns the logged values of each step whose names contain one of `parts`."""
    history = json.loads((run / "checkpoint-4" / "trainer_state.json").read_text())["log_history"]
    steps = [entry for entry in history if "loss" in entry]
    return [{name: value for name, value in entry.items() if any(part in name for part in parts)} for entry in steps]


def assert_same_training(run: Path, expected: Path, tolerance: float = 1e-5):
    names = ("loss", "temperature", "similarity", "grad_norm")
    for found, wanted in zip(logged(run, *names), logged(expected, *names), strict=True):
        assert len(found) >= 7
        assert found == pytest.approx(wanted, rel=tolerance)
    found, wanted = weights(run), weights(expected)
    assert {name: value.dtype for name, value in found.items()} == dict.fromkeys(wanted, torch.float32)
    for name in wanted:
        torch.testing.assert_close(found[name], wanted[name], atol=tolerance, rtol=0)


@pytest.mark.parametrize("kind", ["full", "adapter"])
def test_two_processes_train_like_one(kind, ddp, one):
    """Negatives come from both processes, and tokens are counted over both."""
    assert_same_training(ddp / kind, one / kind, tolerance=1e-4)


@pytest.mark.parametrize("kind", ["full", "adapter"])
def test_a_sharded_model_trains_like_ddp(kind, sharded, ddp):
    assert_same_training(sharded / kind, ddp / kind)


def test_several_steps_with_the_gradient_cache_equal_those_without(sharded, ddp):
    assert_same_training(ddp / "cached-adapter", ddp / "adapter", tolerance=1e-4)
    if sharded.name == "fsdp2":
        assert_same_training(sharded / "cached-adapter", ddp / "adapter", tolerance=1e-4)


@pytest.mark.parametrize("kind", ["full", "adapter"])
def test_a_resumed_run_ends_with_the_weights_of_an_uninterrupted_run(kind, sharded):
    uninterrupted, resumed, before = (
        weights(sharded / name) for name in (kind, f"{kind}-resumed", f"{kind}/checkpoint-2")
    )
    assert not (sharded / f"{kind}-resumed" / "checkpoint-2").exists()
    assert all(torch.equal(uninterrupted[name], resumed[name]) for name in uninterrupted)
    assert any(not torch.equal(uninterrupted[name], before[name]) for name in uninterrupted)


@pytest.mark.parametrize("kind", ["full", "adapter"])
def test_checkpoints_of_a_sharded_model_have_the_files_of_ddp_and_load(kind, sharded, ddp):
    """All files except the weights and what depends on them are the same, including the code and `auto_map`."""
    checkpoint, expected = sharded / kind / "checkpoint-2", ddp / kind / "checkpoint-2"
    names, expected_names = ({path.name for path in each.iterdir()} for each in (checkpoint, expected))
    assert names - expected_names == OWN_FILES[sharded.name]
    assert "probe.safetensors" in expected_names
    assert expected_names - names <= {"optimizer.pt", "probe.safetensors"}
    assert pushed_files(checkpoint) <= pushed_files(expected)
    assert "README.md" not in names  # PEFT's empty template
    for path in expected.iterdir():
        same = path.suffix in (".json", ".py", ".jinja") and path.stem not in ("trainer_state", "digests")
        if path.name in names and same:
            assert (checkpoint / path.name).read_bytes() == path.read_bytes(), path.name
    embeddings = []
    for each in (checkpoint, expected):
        model, processor = load_checkpoint(str(each), verify="digests")
        embeddings.append(model.embed(**processor.process_sequences(["a cat", [make_image(1)]])))
    torch.testing.assert_close(*embeddings, atol=1e-5, rtol=0)


def test_losses_are_computed_in_float32_in_a_bfloat16_run(sharded, ddp):
    found, expected = (logged(run / "bf16", "loss", "temperature")[0] for run in (sharded, ddp))
    # FSDP2 keeps the head in float32, DeepSpeed in bfloat16.
    assert found.pop("temperature") == pytest.approx(0.07, rel=1e-6 if sharded.name == "fsdp2" else 1e-2)
    del expected["temperature"]
    assert found == pytest.approx(expected, rel=1e-3)
    assert all(torch.tensor(value).bfloat16().item() != pytest.approx(value, rel=1e-6) for value in found.values())
    load_checkpoint(str(sharded / "bf16"))
