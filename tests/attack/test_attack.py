"""A part of `make attack`: nothing is wrong, and planted faults are found. `make attack` plants all of them."""

from importlib import import_module

import pytest

from attack.__main__ import ATTACKS


ALL = {name: import_module(f"attack.{name}") for name in ATTACKS}
QUICK = ("pictures", "commands")
FAULTS = [(name, fault) for name in QUICK for fault in ALL[name].PLANTED]


@pytest.mark.parametrize("name", ALL)
def test_nothing_is_wrong(name):
    outcomes = ALL[name].run(bounded=True)
    assert outcomes.total and not outcomes.wrong, outcomes


@pytest.mark.parametrize(("name", "fault"), FAULTS)
def test_planted_faults_are_found(name, fault):
    with ALL[name].PLANTED[fault]():
        assert ALL[name].run(bounded=True).wrong
