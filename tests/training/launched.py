"""What each process of `accelerate launch` runs in test_distributed.py: `twinweave train RECIPE`.

accelerate 1.15 shards models over accelerators only; where FSDP is asked for, this tells it that CPU processes will do.
"""

import os
import sys

import accelerate.accelerator
from accelerate.state import AcceleratorState
from accelerate.utils import DistributedType


def shard_on_the_cpu() -> None:
    make = AcceleratorState.__init__

    def make_sharded(self, *args, fsdp_plugin=None, **kwargs):
        make(self, *args, fsdp_plugin=fsdp_plugin, **kwargs)
        plugin = fsdp_plugin or self.__dict__.get("fsdp_plugin")  # every later instance shares the first one's state
        if plugin is not None and self.distributed_type is DistributedType.MULTI_CPU:
            self.distributed_type, self.fsdp_plugin = DistributedType.FSDP, plugin

    AcceleratorState.__init__ = make_sharded
    shard = accelerate.accelerator.fsdp2_prepare_model

    def shard_and_say_so(*args):
        model = shard(*args)
        print("sharded", type(model.gate.w_a).__name__, file=sys.stderr)
        return model

    accelerate.accelerator.fsdp2_prepare_model = shard_and_say_so


if __name__ == "__main__":
    if os.environ.get("ACCELERATE_USE_FSDP") == "true":
        shard_on_the_cpu()
    from twinweave.cli import main

    sys.argv = ["twinweave", *sys.argv[1:]]
    main()
