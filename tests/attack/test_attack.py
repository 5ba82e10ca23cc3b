"""A part of `make attack`: nothing is wrong, and every planted fault is found."""

from importlib import import_module

import pytest

from attack.__main__ import ATTACKS


ALL = {name: import_module(f"attack.{name}") for name in ATTACKS}
FAULTS = [(name, fault) for name, attack in ALL.items() for fault in attack.PLANTED]


@pytest.mark.parametrize("name", ALL)
def test_nothing_is_wrong(name):
    outcomes = ALL[name].run(bounded=True)
    assert outcomes.total and not outcomes.wrong, outcomes


@pytest.mark.parametrize(("name", "fault"), FAULTS)
def test_planted_faults_are_found(name, fault):
    with ALL[name].PLANTED[fault]():
        assert ALL[name].run(bounded=True).wrong
