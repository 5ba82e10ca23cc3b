"""`make attack`: runs every attack whole, then with each planted fault. Exits with 1 if anything is wrong."""

import os
import sys
from importlib import import_module


os.environ["HF_HUB_OFFLINE"] = "1"

ATTACKS = ("pictures", "rows", "checkpoints", "commands")


def main(names: list[str]) -> int:
    failures = 0
    for name in names or ATTACKS:
        attack = import_module(f"attack.{name}")
        outcomes = attack.run(bounded=False)
        print(outcomes, flush=True)
        failures += len(outcomes.wrong)
        missed = []
        for fault, planted in attack.PLANTED.items():
            with planted():
                if not attack.run(bounded=True).wrong:
                    missed.append(fault)
        count = len(attack.PLANTED)
        print(f"  planted faults: {count - len(missed)} of {count} found{''.join(f'; not {m}' for m in missed)}")
        failures += len(missed)
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
