"""Data loaders of streaming datasets and of evaluation blocks, which divide the rows among processes."""

from typing import Any

from accelerate.data_loader import BatchSamplerShard, prepare_data_loader
from torch.utils.data import BatchSampler, DataLoader, Dataset, SequentialSampler

from ..data import ExampleStream
from .arguments import UniGDTrainingArguments
from .collator import UniGDDataCollator
from .stream_positions import StreamPositions


def stream_loader(
    dataset: ExampleStream,
    args: UniGDTrainingArguments,
    collator: UniGDDataCollator,
    batch_size: int,
    endless: bool = False,
    positions: StreamPositions | None = None,
    checkpoint: str | None = None,
) -> DataLoader:
    """
    Returns a loader of a streaming dataset. Each process reads its own shard.

    Args:
        dataset: The examples.
        args: The training arguments.
        collator: Makes the batches.
        batch_size: Number of rows per batch.
        endless: Whether to start again at the end of the shard.
        positions: The positions of the stream, if it is trained on.
        checkpoint: Folder of the checkpoint whose run is resumed.

    Raises:
        ValueError: the stream cannot be divided among so many workers.
    """
    # With accelerate's own sharding, each process would read the whole stream.
    part = dataset.shard(args.world_size, args.process_index, batch_size, endless)
    if endless:
        part.check_workers(max(1, args.dataloader_num_workers))
    if positions is not None and checkpoint is not None:
        positions.resume(part, checkpoint)
    return _prepare(DataLoader(part, batch_size=batch_size, **_settings(args, collator)), args)


def block_loader(dataset: Dataset, args: UniGDTrainingArguments, collator: UniGDDataCollator) -> DataLoader:
    """
    Returns a loader of blocks of `args.eval_block_size` consecutive rows. Each block is on one process. No row is left
    out or repeated, so processes may have different numbers of blocks.

    Args:
        dataset: The examples, map-style or streaming. A streaming dataset is first sharded, then divided into blocks.
        args: The training arguments.
        collator: Makes the batches.
    """
    if isinstance(dataset, ExampleStream):
        return stream_loader(dataset, args, collator, args.eval_block_size)
    blocks = BatchSampler(SequentialSampler(dataset), args.eval_block_size, drop_last=False)  # type: ignore[arg-type]
    own = BatchSamplerShard(blocks, args.world_size, args.process_index, even_batches=False)
    return _prepare(DataLoader(dataset, batch_sampler=own, **_settings(args, collator)), args)


def _settings(args: UniGDTrainingArguments, collator: UniGDDataCollator) -> dict[str, Any]:
    return {
        "collate_fn": collator,
        "num_workers": args.dataloader_num_workers,
        "pin_memory": args.dataloader_pin_memory,
        "persistent_workers": args.dataloader_persistent_workers,
        "multiprocessing_context": args.dataloader_multiprocessing_context,
        "prefetch_factor": args.dataloader_prefetch_factor,
        "in_order": args.dataloader_in_order,
    }


def _prepare(loader: DataLoader, args: UniGDTrainingArguments) -> DataLoader:
    # By default, accelerate dispatches streaming datasets: the first process reads the rows of all processes.
    return prepare_data_loader(
        loader, args.device, num_processes=1, process_index=0, put_on_device=True, dispatch_batches=False
    )
