"""The configurations for `accelerate launch` with two processes on gloo: start, SIGTERM, and a killed process."""

import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
import yaml

from hf_unigd.hub import load_checkpoint


CONFIGS = Path(__file__).parents[2] / "examples" / "accelerate"


def launch(folder, output, config, *flags):
    """Starts `accelerate launch` of an endless run. Returns the process and the file of its output."""
    arguments = {
        "model_name_or_path": folder / "vlm",
        "dataset_name": folder / "rows",
        "output_dir": output,
        "per_device_train_batch_size": 4,
        "max_steps": 100000,
        "save_steps": 2,
        "logging_steps": 1,
        "ddp_backend": "gloo",
        "use_cpu": "true",
        "report_to": "none",
        "check_rows": "off",
        "trust_caption_columns": "true",
    }
    train = [
        "-m",
        "hf_unigd",
        "train",
        *(part for name, value in arguments.items() for part in (f"--{name}", str(value))),
    ]
    command = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", str(CONFIGS / config), *flags]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "passive"}
    log = Path(f"{output}-{len(list(output.parent.glob('*.log')))}.log")
    return subprocess.Popen([*command, *train], stdout=log.open("w"), stderr=subprocess.STDOUT, env=environment), log


def wait_for(condition, seconds, logs):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "\n".join(log.read_text()[-3000:] for log in logs)
        time.sleep(0.2)


def workers(launcher):
    """Returns the training processes of a launcher."""
    return [child for child in psutil.Process(launcher.pid).children() if "train" in child.cmdline()]


def test_ddp_starts_and_sigterm_saves_a_checkpoint_and_ends_the_run(folder, tmp_path):
    output = tmp_path / "out"
    launcher, log = launch(folder, output, "ddp.yaml", "--num_processes", "2", "--main_process_port", "0")
    try:
        wait_for(lambda: (output / "checkpoint-2" / "trainer_state.json").exists(), 120, [log])
        assert len(workers(launcher)) == 2
        launcher.send_signal(signal.SIGTERM)
        assert launcher.wait(60) != 0
    finally:
        launcher.kill()
    (name,) = re.findall(r"SIGTERM: saved (checkpoint-\d+) in", log.read_text())
    saved = output / name
    state = json.loads((saved / "trainer_state.json").read_text())
    assert name == f"checkpoint-{state['global_step']}"
    assert state["epoch"] == state["global_step"] * 2 * 4 / 32  # two processes with four rows each
    load_checkpoint(str(saved))


def test_a_killed_process_ends_the_run_on_all_machines_and_is_named(folder, tmp_path):
    """The agents of two machines with one process each run on this machine."""
    output = tmp_path / "out"
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    flags = ["--num_machines", "2", "--num_processes", "2", "--main_process_port", port, "--machine_rank"]
    machines = [launch(folder, output, "multi_node.yaml", *flags, rank) for rank in "01"]
    logs = [log for _, log in machines]
    try:
        wait_for(lambda: (output / "checkpoint-4" / "trainer_state.json").exists(), 180, logs)
        (victim,) = workers(machines[1][0])
        victim.kill()
        start = time.monotonic()
        codes = [machine.wait(60) for machine, _ in machines]
        assert time.monotonic() - start < 60
    finally:
        for machine, _ in machines:
            machine.kill()
    assert all(codes)
    named = logs[1].read_text()
    assert "rank      : 1" in named and "Signal 9 (SIGKILL)" in named
    whole = [path for path in output.glob("checkpoint-*") if (path / "trainer_state.json").exists()]
    load_checkpoint(str(max(whole, key=lambda path: int(path.name.rpartition("-")[2]))))


@pytest.mark.parametrize("file", sorted(CONFIGS.glob("*.yaml")), ids=lambda file: file.stem)
def test_accelerate_knows_every_key_of_a_configuration(file):
    from accelerate.commands.config.config_args import ClusterConfig
    from accelerate.commands.launch import launch_command_parser

    config = yaml.safe_load(file.read_text())
    known = ClusterConfig.from_yaml_file(str(file))  # raises for unknown keys
    assert known.num_processes == config["num_processes"]
    options = {action.dest for action in launch_command_parser()._actions}
    for section in ("fsdp_config", "deepspeed_config"):
        assert set(config.get(section, {})) <= options, section
