"""Every command, with wrong flags and with outputs that cannot be written or are somebody's."""

import pytest

from attack import commands
from attack.command_table import workplace
from attack.outcomes import Outcomes
from hf_unigd.cli.main import COMMANDS


@pytest.mark.parametrize("name", COMMANDS)
@pytest.mark.parametrize(
    "attack",
    [commands.attack_flags, commands.attack_outputs, commands.attack_foreign_output, commands.attack_full_disk],
)
def test_nothing_is_wrong(name, attack):
    outcomes = Outcomes(name)
    for command in workplace().commands:
        if command.name == name:
            attack(commands.Attacker(outcomes), command, bounded=True)
    assert not outcomes.wrong, outcomes
