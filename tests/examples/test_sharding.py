"""The configurations of one machine, started with 2 processes on gloo: the training of one, saved and resumed."""

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
    """Trains a whole model and an adapter; on two processes also in the configuration's precision and with the cache,
    and where the model is sharded, also resumed."""
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
        "check_rows": "false",
    }
    flags = [part for name, value in common.items() for part in (f"--{name}", str(value))]
    runs = [["bf16", [*flags, "--output_dir", f"{output}/bf16"]]] if processes > 1 else []
    if processes > 1 and config != "deepspeed_zero2":  # which refuses the cache
        cache = ["--gradient_cache_chunk_size", "3"]
        runs.append(["no", [*flags, *ADAPTER, *cache, "--output_dir", f"{output}/cached-adapter"]])
    for kind, more in (("full", ACCUMULATION), ("adapter", ADAPTER)):
        whole, resumed = f"{output}/{kind}", f"{output}/{kind}-resumed"
        resume = ["--resume_from_checkpoint", f"{whole}/checkpoint-2"]
        runs.append(["no", [*flags, *more, "--output_dir", whole]])
        if config != "ddp":
            runs.append(["no", [*flags, *more, "--output_dir", resumed, *resume]])
    launcher = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", str(CONFIGS / f"{config}.yaml")]
    launcher += ["--num_processes", str(processes), "--main_process_port", "0"]  # any that is free
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
    """What was logged of each step, by names with one of these parts."""
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
def test_two_processes_train_as_one_does(kind, ddp, one):
    """With global negatives, and tokens counted over both."""
    assert_same_training(ddp / kind, one / kind, tolerance=1e-4)


@pytest.mark.parametrize("kind", ["full", "adapter"])
def test_it_trains_as_ddp_does(kind, sharded, ddp):
    assert_same_training(sharded / kind, ddp / kind)


def test_several_steps_with_the_gradient_cache_are_those_without(sharded, ddp):
    assert_same_training(ddp / "cached-adapter", ddp / "adapter", tolerance=1e-4)
    if sharded.name == "fsdp2":
        assert_same_training(sharded / "cached-adapter", ddp / "adapter", tolerance=1e-4)


@pytest.mark.parametrize("kind", ["full", "adapter"])
def test_a_resumed_run_ends_in_the_same_weights(kind, sharded):
    at_one_go, resumed, before = (
        weights(sharded / name) for name in (kind, f"{kind}-resumed", f"{kind}/checkpoint-2")
    )
    assert not (sharded / f"{kind}-resumed" / "checkpoint-2").exists()
    assert all(torch.equal(at_one_go[name], resumed[name]) for name in at_one_go)
    assert any(not torch.equal(at_one_go[name], before[name]) for name in at_one_go)


@pytest.mark.parametrize("kind", ["full", "adapter"])
def test_its_checkpoints_are_ddps_and_load(kind, sharded, ddp):
    """Besides the weights the same files, code and `auto_map` among them."""
    checkpoint, expected = sharded / kind / "checkpoint-2", ddp / kind / "checkpoint-2"
    names, expected_names = ({path.name for path in each.iterdir()} for each in (checkpoint, expected))
    assert names - expected_names == OWN_FILES[sharded.name]
    assert "probe.safetensors" in expected_names
    assert expected_names - names <= {"optimizer.pt", "probe.safetensors"}
    assert pushed_files(checkpoint) <= pushed_files(expected)
    assert "README.md" not in names  # PEFT's, which says nothing
    for path in expected.iterdir():
        if path.name in names and path.suffix in (".json", ".py", ".jinja") and path.stem != "trainer_state":
            assert (checkpoint / path.name).read_bytes() == path.read_bytes(), path.name
    embeddings = []
    for each in (checkpoint, expected):
        model, processor = load_checkpoint(str(each))
        embeddings.append(model.embed(**processor.process_sequences(["a cat", [make_image(1)]])))
    torch.testing.assert_close(*embeddings, atol=1e-5, rtol=0)


def test_in_bfloat16_the_losses_are_still_computed_in_float32(sharded, ddp):
    found, expected = (logged(run / "bf16", "loss", "temperature")[0] for run in (sharded, ddp))
    # FSDP2 holds the head in float32, DeepSpeed in bfloat16.
    assert found.pop("temperature") == pytest.approx(0.07, rel=1e-6 if sharded.name == "fsdp2" else 1e-2)
    del expected["temperature"]
    assert found == pytest.approx(expected, rel=1e-3)
    assert all(torch.tensor(value).bfloat16().item() != pytest.approx(value, rel=1e-6) for value in found.values())
    load_checkpoint(str(sharded / "bf16"))
