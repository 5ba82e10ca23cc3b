"""Files that hold the features of many images, written in the background, and the index of what they hold.

A folder holds any number of shards, safetensors files that no one changes once they have their names. Any number of
processes may read and write in it at once. What a process had not written when it was killed is missing, and nothing
else: it is computed again. A tensor is named after its image, the number of tokens that the image became, and the
[`~hf_unigd.bulk.image_features.split_images`] name of the tensor: `5f0a...-576/pooler_output`.
"""

import json
import logging
import time
import uuid
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from ..bulk.image_features import ImageFeatures
from ..outputs import remove_unfinished, writing


logger = logging.getLogger(__name__)

SHARD_BYTES = 1 << 29  # a process has the features of up to two shards in memory
REFRESH_SECONDS = 60.0
UNFINISHED_SECONDS = 3600.0  # after which what is unfinished was left by a process that was killed
_MERGE = 10_000

ImageKey = tuple[str, int]  # the result of `image_key`, and the number of tokens that the image became


class ShardIndex:
    """
    The images that the shards of a folder hold, in 16 bytes each, which the workers of a data loader share.

    Args:
        folder: The folder, which is made if it does not exist.
    """

    def __init__(self, folder: str | Path):
        self.folder = Path(folder)
        self.folder.mkdir(parents=True, exist_ok=True)
        self._shards: list[str] = []
        self._seen: set[str] = set()
        # Sorted by the first 64 bits of the key.
        self._entries = np.zeros(0, dtype=[("key", "u8"), ("length", "i4"), ("shard", "i4")])
        self._recent: dict[int, dict[int, int]] = {}
        self._refreshed = -float("inf")

    def __len__(self) -> int:
        return len(self._entries) + sum(map(len, self._recent.values()))

    def refresh(self) -> None:
        """Reads the shards that were written since."""
        self._refreshed = time.monotonic()
        for file in self.folder.glob("*.safetensors"):
            self.add(file)

    def add(self, file: Path) -> None:
        """Adds the images of a shard. One that cannot be read is left out with a warning."""
        if file.name in self._seen:
            return
        self._seen.add(file.name)
        try:
            with safe_open(file, "pt") as shard:
                images = {name.partition("/")[0] for name in shard.keys()}  # noqa: SIM118  # it is no dict
        except (OSError, SafetensorError) as error:
            logger.warning("Left out %s, which is damaged: %s. Delete it.", file, error)
            return
        for image in images:
            key, _, length = image.rpartition("-")
            self._recent.setdefault(_short(key), {})[int(length)] = len(self._shards)
        self._shards.append(file.name)
        if len(self._recent) > max(_MERGE, len(self._entries) // 4):
            self._merge()

    def _merge(self) -> None:
        recent = [(key, length, shard) for key, found in self._recent.items() for length, shard in found.items()]
        entries = np.concatenate([self._entries, np.array(recent, dtype=self._entries.dtype)])
        self._entries, self._recent = entries[entries["key"].argsort(kind="stable")], {}

    def knows(self, key: str) -> bool:
        """Whether a shard holds the image, with any number of tokens. What other processes have written is seen within
        a minute."""
        if self._find(key):
            return True
        if time.monotonic() - self._refreshed < REFRESH_SECONDS:
            return False
        self.refresh()
        return bool(self._find(key))

    def find(self, key: ImageKey) -> Path | None:
        """The shard that holds an image."""
        shard = self._find(key[0]).get(key[1])
        return None if shard is None else self.folder / self._shards[shard]

    def _find(self, key: str) -> dict[int, int]:
        """Shards by the number of tokens of the image."""
        short = _short(key)
        keys = self._entries["key"]
        first, last = (keys.searchsorted(np.uint64(short), side) for side in ("left", "right"))
        found = {int(each["length"]): int(each["shard"]) for each in self._entries[first:last]}
        return found | self._recent.get(short, {})


def _short(key: str) -> int:
    return int(key[:16], 16)


def read_images(file: Path, keys: list[ImageKey], device: torch.device) -> list[ImageFeatures]:
    """
    Reads images of a shard, with the types that they had before they were made smaller.

    Raises:
        FileNotFoundError, KeyError, SafetensorError: the file or an image in it is missing.
    """
    images = []
    with safe_open(file, "pt", device=str(device)) as shard:
        names: dict[str, list[str]] = {}
        for name in shard.keys():  # noqa: SIM118  # it is no dict
            names.setdefault(name.partition("/")[0], []).append(name)
        dtypes = {part: getattr(torch, dtype) for part, dtype in json.loads(shard.metadata()["dtypes"]).items()}
        for key in keys:
            parts = {name.partition("/")[2]: name for name in names[_name(key)]}
            images.append({part: shard.get_tensor(name).to(dtypes[part]) for part, name in parts.items()})
    return images


class ShardWriter:
    """
    Writes shards in a thread of its own.

    Args:
        index: The index of the folder, to which shards are added once they are written.
        dtype: Type that floating-point features are stored in, if not their own.
    """

    def __init__(self, index: ShardIndex, dtype: torch.dtype | None = None):
        self.index = index
        self.dtype = dtype
        self._dtypes: dict[str, torch.dtype] = {}  # what the features are read as
        self._open: dict[ImageKey, ImageFeatures] = {}
        self._bytes = 0
        self._written: tuple[dict[ImageKey, ImageFeatures], Future] | None = None
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="vision_cache")
        remove_unfinished(index.folder, "*.safetensors", older_than=UNFINISHED_SECONDS)

    def add(self, key: ImageKey, image: ImageFeatures) -> None:
        """
        Adds the features of an image. It waits if the shard before the one that is full is still being written.

        Raises:
            OSError: a shard before could not be written.
        """
        stored = {}
        for part, tensor in image.items():
            self._dtypes[part] = tensor.dtype
            dtype = self.dtype if self.dtype is not None and tensor.is_floating_point() else tensor.dtype
            copied = tensor.detach().to("cpu", dtype, copy=True)  # not a view of the whole batch
            stored[part] = copied.contiguous()
        self._open[key] = stored
        self._bytes += sum(tensor.nbytes for tensor in stored.values())
        if self._bytes >= SHARD_BYTES:
            self._start()

    def find(self, key: ImageKey) -> ImageFeatures | None:
        """The features of an image that is not written yet."""
        being_written = {} if self._written is None else self._written[0]
        stored = self._open.get(key, being_written.get(key))
        return None if stored is None else {part: each.to(self._dtypes[part]) for part, each in stored.items()}

    def flush(self) -> None:
        """
        Writes what was added, and waits until it is written.

        Raises:
            OSError: a shard could not be written.
        """
        if self._open:
            self._start()
        self._wait()

    def _start(self) -> None:
        self._wait()
        images, self._open, self._bytes = self._open, {}, 0
        file = self.index.folder / f"{uuid.uuid4().hex}.safetensors"
        self._written = images, self._thread.submit(_write, file, images, dict(self._dtypes))

    def _wait(self) -> None:
        if self._written is None:
            return
        written, self._written = self._written[1], None
        try:
            self.index.add(written.result())
        except Exception as error:  # safetensors has an error of its own for a full disk
            raise OSError(
                f"`vision_cache` could not be written to {self.index.folder}: {error}. What was written before is "
                "kept. Free space there, name another folder, or leave `vision_cache` out."
            ) from error


def _write(file: Path, images: dict[ImageKey, ImageFeatures], dtypes: dict[str, torch.dtype]) -> Path:
    tensors = {f"{_name(key)}/{part}": tensor for key, image in images.items() for part, tensor in image.items()}
    names = {part: str(dtype).removeprefix("torch.") for part, dtype in dtypes.items()}
    with writing(file) as unfinished:
        save_file(tensors, unfinished, metadata={"dtypes": json.dumps(names)})
    return file


def _name(key: ImageKey) -> str:
    return f"{key[0]}-{key[1]}"
