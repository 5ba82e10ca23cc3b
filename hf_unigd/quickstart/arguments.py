"""Arguments of `hf-unigd quickstart`."""

from dataclasses import dataclass, field
from pathlib import Path

from ..settings import NotNegative, Positive


# Values of the arguments that are not given, by recipe.
DEFAULTS = {
    "vladva": {"output": "runs/quickstart", "max_steps": 1000, "batch_size": 128},
    "sugar": {"output": "runs/quickstart-sugar", "max_steps": 1500, "batch_size": 32},
    "scenes": {"output": "runs/scenes", "max_steps": 1000, "batch_size": 128},
}


@dataclass
class QuickstartArguments:
    recipe: str = field(
        default="vladva",
        metadata={
            "help": "What to train: VladVA on icons, Sugar on stories, or VladVA on scenes with hard negatives.",
            "choices": list(DEFAULTS),
        },
    )
    output: str | None = field(
        default=None,
        metadata={"help": "Folder to write, runs/quickstart, runs/quickstart-sugar or runs/scenes by default."},
    )
    max_steps: Positive | None = field(
        default=None,
        metadata={"help": "Number of training steps, 1500 (Sugar) or 1000 (VladVA, scenes) by default."},
    )
    batch_size: Positive | None = field(
        default=None, metadata={"help": "Number of rows per step, 128 (VladVA, scenes) or 32 (Sugar) by default."}
    )
    seed: NotNegative = field(
        default=0, metadata={"help": "Seed of the data, the initial weights and the order of the rows."}
    )

    def __post_init__(self):
        for name, value in DEFAULTS[self.recipe].items():
            if getattr(self, name) is None:
                setattr(self, name, value)

    @property
    def folder(self) -> Path:
        """The folder to write."""
        assert self.output is not None  # __post_init__ has set it
        return Path(self.output)
