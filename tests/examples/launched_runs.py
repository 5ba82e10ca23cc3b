"""Several runs of `hf-unigd train`, one after another, in the processes that `accelerate launch` has started.

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
    """FSDP2 works on CPUs, but accelerate turns it on where there is an accelerator only."""
    initialize(self, *args, fsdp_plugin=fsdp_plugin, **kwargs)
    if fsdp_plugin is not None:
        if self._mixed_precision != "no":
            fsdp_plugin.set_mixed_precision(self._mixed_precision)
        self.fsdp_plugin = fsdp_plugin
        # Where every later `AcceleratorState()` reads it from.
        self.distributed_type = PartialState._shared_state["distributed_type"] = DistributedType.FSDP


if __name__ == "__main__":
    AcceleratorState.__init__ = initialize_with_fsdp
    for precision, flags in json.loads(sys.argv[1]):
        AcceleratorState._reset_state()
        os.environ["ACCELERATE_MIXED_PRECISION"] = precision
        main(["train", *flags])
