"""What FSDP2 has to know about a UniGD model before it shards it."""

from dataclasses import replace

import torch
from accelerate import Accelerator
from peft import PeftModel
from torch.distributed.fsdp import fully_shard
from transformers import PreTrainedModel

from ..modeling import UniGDHead
from .vision import is_frozen, vision_parameters


def prepare_fsdp2(accelerator: Accelerator, model: PreTrainedModel | PeftModel) -> None:
    """
    Tells FSDP2 what of a UniGD model it must not shard or round.

    Args:
        accelerator: Will shard the model; its FSDP plugin is changed.
        model: The model or an adapter on it.

    Raises:
        ValueError: a setting of the plugin would shard a frozen vision tower.
    """
    plugin = accelerator.state.fsdp_plugin
    if plugin.cpu_ram_efficient_loading:
        raise ValueError(
            "`fsdp_cpu_ram_efficient_loading: true` shards a frozen vision tower, which has to stay whole on each "
            "process. Set it to false, as in examples/accelerate/fsdp2.yaml."
        )
    # By itself, and so in float32; whole until the backward pass, as the temperature is read after it has run.
    for head in [module for module in model.modules() if isinstance(module, UniGDHead)]:
        fully_shard(head, reshard_after_forward=False)
    if plugin.mixed_precision_policy is not None:
        # accelerate rounds what the model returns and adds gradients up in bfloat16, which DDP does not.
        plugin.mixed_precision_policy = replace(
            plugin.mixed_precision_policy, output_dtype=None, reduce_dtype=torch.float32
        )
    if is_frozen(model):
        # Kept whole on every process, outside FSDP: it runs by itself, and only where there are pictures.
        decoder = {type(module).__name__ for module in model.vlm.get_decoder().modules()}
        plugin.ignored_modules = [torch.nn.ParameterList(vision_parameters(model))]
        plugin.transformer_cls_names_to_wrap = sorted(decoder & set(model._no_split_modules))
