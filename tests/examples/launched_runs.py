"""Runs `hf-unigd train` several times in the processes that `accelerate launch` started.

`accelerate launch --config_file examples/accelerate/fsdp2.yaml -m launched_runs '[["no", [flags]], ...]'`
"""

import json
import os
import sys
from functools import wraps

from accelerate.state import AcceleratorState, PartialState
from accelerate.utils import DistributedType

from hf_unigd.cli.main import main


initialize = AcceleratorState.__init__


@wraps(initialize)
def initialize_with_fsdp(self, *args, fsdp_plugin=None, **kwargs):
    """Enables FSDP2, which works on CPUs, but which accelerate enables only with an accelerator device."""
    initialize(self, *args, fsdp_plugin=fsdp_plugin, **kwargs)
    if fsdp_plugin is not None:
        if self._mixed_precision != "no":
            fsdp_plugin.set_mixed_precision(self._mixed_precision)
        self.fsdp_plugin = fsdp_plugin
        # Every later `AcceleratorState()` reads it from here.
        self.distributed_type = PartialState._shared_state["distributed_type"] = DistributedType.FSDP


def leave_out_shared_memory():
    """DeepSpeed would compile an operator for processes of one machine, which takes minutes, and waits forever if an
    earlier build was killed. Without it, gloo does the same."""
    import deepspeed

    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False


if __name__ == "__main__":
    AcceleratorState.__init__ = initialize_with_fsdp
    if os.environ.get("ACCELERATE_USE_DEEPSPEED") == "true":
        leave_out_shared_memory()
    for precision, flags in json.loads(sys.argv[1]):
        AcceleratorState._reset_state()
        os.environ["ACCELERATE_MIXED_PRECISION"] = precision
        main(["train", *flags])
