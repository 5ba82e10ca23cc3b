"""What a UniGD model needs under FSDP2, where all processes run every layer together."""

from dataclasses import replace

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from peft import PeftModel
from torch.distributed.fsdp import fully_shard
from transformers import PreTrainedModel

from ..modeling import UniGDHead
from .batches import Batch, idle_chunk
from .vision import is_frozen, vision_parameters


def prepare_fsdp2(accelerator: Accelerator, model: PreTrainedModel | PeftModel) -> None:
    """
    Prepares a UniGD model for FSDP2: the head stays in float32 and unsharded until the backward pass, gradients are
    summed in float32, and a frozen vision tower stays whole on every process.

    Args:
        accelerator: The accelerator that will shard the model. Its FSDP plugin is changed.
        model: The model or its `PeftModel`.

    Raises:
        ValueError: `fsdp_cpu_ram_efficient_loading` is on, which would shard a frozen vision tower.
    """
    plugin = accelerator.state.fsdp_plugin
    if plugin.cpu_ram_efficient_loading:
        raise ValueError(
            "`fsdp_cpu_ram_efficient_loading: true` shards a frozen vision tower, which must stay whole on every "
            "process. Set it to false, as in examples/accelerate/fsdp2.yaml."
        )
    # A unit of its own stays in float32. It is not resharded, because the temperature is read after its forward pass.
    for head in [module for module in model.modules() if isinstance(module, UniGDHead)]:
        fully_shard(head, reshard_after_forward=False)
    if plugin.mixed_precision_policy is not None:
        # accelerate would round the outputs and sum gradients in bfloat16, which DDP does not.
        plugin.mixed_precision_policy = replace(
            plugin.mixed_precision_policy, output_dtype=None, reduce_dtype=torch.float32
        )
    if is_frozen(model):
        # FSDP ignores the tower, because it runs on its own, and only on processes that have images.
        decoder = {type(module).__name__ for module in model.vlm.get_decoder().modules()}
        plugin.ignored_modules = [torch.nn.ParameterList(vision_parameters(model))]
        plugin.transformer_cls_names_to_wrap = sorted(decoder & set(model._no_split_modules))


def add_idle_chunks(chunks: list[Batch]) -> list[Batch]:
    """
    Appends idle chunks until every process has equally many.

    Args:
        chunks: The chunks of this process.

    Raises:
        ValueError: a process has images for a trained vision tower in a chunk where another process has none.
    """
    everywhere = gather_object([["pixel_values" in chunk for chunk in chunks]])
    longest = max(everywhere, key=len)
    if any(each != longest[: len(each)] for each in everywhere):
        raise ValueError(
            "Under FSDP every process runs the same layers, but some processes have images for the vision tower where "
            "others have none. Freeze the tower (`freeze_vision_tower=True`), or train without FSDP."
        )
    return chunks + [idle_chunk(chunks[0])] * (len(longest) - len(chunks))
