"""Runs a script under real FSDP2 on a CPU.

Accelerate turns FSDP on only for GPU-like devices; here it is told that two gloo processes are such.

Run   ACCELERATE_TORCH_DEVICE=cpu accelerate launch --config_file X.yaml tests/shim.py stages/stage1.py ...
"""

import runpy
import sys
from pathlib import Path

from accelerate.state import PartialState
from accelerate.utils import DistributedType

PartialState._prepare_backend = lambda self, *args, **kwargs: ("gloo", DistributedType.MULTI_GPU)

if __name__ == "__main__":
    sys.argv = sys.argv[1:]
    sys.path.insert(0, str(Path(sys.argv[0]).resolve().parent))
    runpy.run_path(sys.argv[0], run_name="__main__")
