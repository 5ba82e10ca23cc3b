"""Does the joint objective work? Trains small models with parts of it left out: `python benchmarks/ablations.py`.

    base              build the model that every arm starts from, and count how many of its captions are right
    run [TABLE ...]   run the arms of tables with three seeds: components, long_captions, structure, mixture, towers,
                      and prompt_entropy
    report            write the tables and pictures of docs/evidence.md

The base model is a LLaVA that has learned to speak about drawn pictures by next-token prediction alone
(runs/ablations/base). It needs the rows of benchmarks/openclipart.py, whose help says how to get them. An arm tunes it
with UniGDTrainer, after its learning rate was chosen on validation scenes, and is measured on held-out scenes.

Every result is a file of benchmarks/results/evidence, written as soon as it is there. `run` does what is missing, so
that it can be stopped at any time and called again; it builds the base model first if there is none.
"""

import argparse

import transformers
from ablation_parts import english
from ablation_parts.arms import TABLES
from ablation_parts.base import make_base
from ablation_parts.report import write_report
from ablation_parts.running import run
from ablation_parts.tables import SEEDS, seeds_of


STUDIES = (*TABLES, english.NAME)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["base", "run", "report"])
    parser.add_argument("tables", nargs="*", metavar="TABLE", help=f"of `run`: {', '.join(STUDIES)}; all by default")
    arguments = parser.parse_args()
    if unknown := set(arguments.tables) - set(STUDIES):
        parser.error(f"there is no table {', '.join(sorted(unknown))}; the tables are {', '.join(STUDIES)}")
    if arguments.tables and arguments.what != "run":
        parser.error(f"`{arguments.what}` takes no tables")
    transformers.logging.set_verbosity_error()
    if arguments.what == "report":
        write_report()
        return
    make_base()
    if arguments.what == "run":
        tables = arguments.tables or STUDIES
        names = dict.fromkeys(name for table in tables if table in TABLES for name in TABLES[table].rows)
        for seed in SEEDS:  # so that a study that is stopped has all arms with the first seeds
            for name in names:
                if seed in seeds_of(name):
                    run(name, seed)
            if english.NAME in tables:
                english.run(seed)


if __name__ == "__main__":
    main()
