"""Where the stream of a training run stands, which is saved with its checkpoints."""

import json
import logging
from pathlib import Path
from typing import Any

from ..data.streams import ExampleStream, Position
from .arguments import UniGDTrainingArguments
from .batches import Batch


logger = logging.getLogger(__name__)


class StreamPositions:
    """
    The positions of this process's share of a stream.

    Args:
        args: The training arguments.
    """

    def __init__(self, args: UniGDTrainingArguments):
        self.args = args
        self._used: tuple[int, dict[int, Position]] = (0, {})
        self._before_step = self._used

    def use(self, batches: list[Batch]) -> None:
        """Takes the positions out of the batches of an optimizer step."""
        self._before_step = self._used
        count, positions = self._used
        positions = dict(positions)
        for batch in batches:
            if "position" in batch:
                worker, position = json.loads(batch.pop("position"))
                positions[worker] = position
        self._used = count + len(batches), positions

    def undo_step(self) -> None:
        """Forgets the batches of the last step, which a resumed run shall use again."""
        self._used = self._before_step

    @property
    def _settings(self) -> dict[str, Any]:
        """What decides which worker of which process reads which rows."""
        return {
            "processes": self.args.world_size,
            "dataloader_num_workers": self.args.dataloader_num_workers,
            "per_device_train_batch_size": self.args.train_batch_size,
            "gradient_accumulation_steps": self.args.gradient_accumulation_steps,
            "shuffle_buffer_size": self.args.shuffle_buffer_size,
        }

    def save(self, folder: str | Path) -> None:
        """Writes the positions to the folder of a checkpoint, if there are any."""
        batches, positions = self._used
        if positions:
            content = {"settings": self._settings, "batches": batches, "positions": positions}
            self._file(folder).write_text(json.dumps(content) + "\n", encoding="utf-8")

    def resume(self, stream: ExampleStream, folder: str | Path) -> None:
        """
        Lets a stream continue from the positions in a checkpoint. Without them, or if they are those of other
        settings, the rows before are read again and skipped, with a warning.
        """
        file = self._file(folder)
        if not file.is_file():
            logger.warning("%s has no position of the stream, so all rows before are read again.", folder)
            return
        saved = json.loads(file.read_text(encoding="utf-8"))
        changed = [name for name, value in self._settings.items() if saved["settings"].get(name) != value]
        if changed:
            listing = ", ".join(f"{name} was {saved['settings'].get(name)}" for name in changed)
            logger.warning(
                "The stream is read from its beginning and the used rows are skipped, because the run has other "
                "settings now: %s.",
                listing,
            )
            return
        positions = {int(worker): position for worker, position in saved["positions"].items()}
        self._used = self._before_step = saved["batches"], positions
        stream.resume(*self._used)

    def _file(self, folder: str | Path) -> Path:
        return Path(folder, f"stream_position_{self.args.process_index}.json")
