"""Attacks with awkward input, whose every outcome must be right or a named refusal.

`make attack` runs them whole, and with planted faults that they must find. `test_attack.py` runs a part of each.
"""
