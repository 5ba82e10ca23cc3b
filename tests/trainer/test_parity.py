"""A subset of `make parity`: the gradient does not depend on how the objective is run."""

from functools import partial
from pathlib import Path

import pytest
from accelerate.state import AcceleratorState

import parity
from parity import RECIPES, Case, ParityTrainer, cases, check, is_good, make_args, make_model, run_group


DOCUMENT = Path(__file__).parents[2] / "docs" / "parity.md"


@pytest.mark.parametrize("case", [c for c in cases() if c.in_subset and c.world_size == 1], ids=str)
def test_one_process_gives_the_gradient_of_the_oracle(case):
    result = check(case)
    assert is_good(result), result


def test_two_processes_give_the_gradient_of_the_oracle():
    results = run_group(2, subset=True)
    compared = [result for result in results if result["recipe"] in RECIPES]
    assert len(compared) == sum(case.in_subset and case.world_size == 2 for case in cases())
    assert not [result for result in results if not is_good(result)]


def test_the_documented_table_lists_all_cases():
    lines = [line for line in DOCUMENT.read_text().splitlines() if line.startswith("|") and "e-" in line]
    assert {line.split(" | ")[0][2:] for line in lines} == {case.name for case in cases()}


def test_fsdp_settings_that_would_shard_the_frozen_tower_are_refused(tmp_path, monkeypatch):
    plugin = partial(parity.FullyShardedDataParallelPlugin, cpu_ram_efficient_loading=True)
    monkeypatch.setattr(parity, "FullyShardedDataParallelPlugin", plugin)
    case = Case("vladva", fsdp=True)
    model, processor, _ = make_model("full", dropout=False)
    AcceleratorState._reset_state()
    try:
        with pytest.raises(ValueError, match="Set it to false"):
            ParityTrainer(case, model, make_args(case, str(tmp_path)), processor)
    finally:
        AcceleratorState._reset_state()
