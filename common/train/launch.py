"""Starting a stage: the processes that the launch asked for are the processes that work together."""

import os
import sys
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import TypeVar

import torch
from accelerate import Accelerator
from accelerate.tracking import get_available_trackers
from accelerate.utils import (
    DistributedType,
    InitProcessGroupKwargs,
    broadcast_object_list,
    fsdp2_prepare_model,
)
from torch import nn
from torch.distributed.fsdp import MixedPrecisionPolicy

from common.console import say
from common.models import use_threads

T = TypeVar("T")
BARRIER_TIMEOUT = timedelta(hours=6)  # other processes wait while the first one tokenises or writes


def start(
    *, tracker: str = "none", tracker_folder: Path | None = None, replicas: bool = False
) -> Accelerator:
    """Makes the Accelerator, sets the threads and refuses a launch that did not connect.

    Without a GPU, `accelerate launch` of a multi-process GPU configuration starts processes that each believe
    to be the only one and exit with 0 after overwriting each other's output: that is caught here.

    Args:
        tracker: An Accelerate tracker by name, or "none".
        tracker_folder: Where the tracker writes.
        replicas: This script computes with a full replica a process, so FSDP is refused.

    Raises:
        ValueError: Environment and Accelerator disagree, or the tracker's package is missing.
    """
    installed = sorted(kind.value for kind in get_available_trackers())
    if tracker not in ("none", *installed):
        raise ValueError(
            f"--tracker {tracker} is not installed here; installed: {installed}. "
            f"Install the package of {tracker}, or say --tracker none."
        )
    if not {"PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"} & set(os.environ):  # the older name still counts
        os.environ["PYTORCH_ALLOC_CONF"] = "expandable_segments:True"  # micro-batches differ in size
    accelerator = Accelerator(
        log_with=None if tracker == "none" else tracker,
        project_dir=tracker_folder,
        kwargs_handlers=[InitProcessGroupKwargs(timeout=BARRIER_TIMEOUT)],
    )
    wanted = int(os.environ.get("WORLD_SIZE", "1"))
    if wanted != accelerator.num_processes:
        raise ValueError(
            f"the launch started {wanted} processes, but this one sees {accelerator.num_processes}: they are "
            "not connected (a GPU configuration on a machine without GPUs does that). Use "
            "accelerate_configs/cpu.yaml, or for several connected CPU processes "
            "ACCELERATE_USE_CPU=true torchrun --nproc-per-node 2 stages/..."
        )
    wants_fsdp = os.environ.get("ACCELERATE_USE_FSDP", "false").lower() == "true"
    if wants_fsdp != is_fsdp(accelerator):
        raise ValueError(
            "the launch configuration asks for FSDP, but Accelerate turned it off (it does so without a "
            "GPU). Use accelerate_configs/cpu.yaml or accelerate_configs/ddp.yaml."
        )
    if wants_fsdp and not accelerator.is_fsdp2:
        raise ValueError(
            "the launch configuration asks for FSDP 1; set fsdp_version: 2, as in accelerate_configs/"
        )
    if wants_fsdp and replicas:
        raise ValueError(
            "this script computes with a full replica on every process; launch it with "
            "accelerate_configs/ddp.yaml (or single_gpu.yaml, cpu.yaml) instead of an FSDP configuration"
        )
    is_told, threads = "OMP_NUM_THREADS" in os.environ, use_threads()
    if not is_told:
        say(f"the CPU computes with {threads} a process; OMP_NUM_THREADS sets another number")
    return accelerator


def on_first(accelerator: Accelerator, function: Callable[[], T]) -> T:
    """What `function` finds on the first process, on every one; its ValueError is raised on every one."""
    found: list[object] = [None]
    if accelerator.is_main_process:
        try:
            found[0] = function()
        except (ValueError, OSError) as error:
            found[0] = ValueError(str(error))
    broadcast_object_list(found)
    if isinstance(found[0], ValueError):
        raise found[0]
    return found[0]


def leave(accelerator: Accelerator) -> None:
    """Ends a script, once every process has nothing left to do.

    Several processes leave without tearing PyTorch down: its threads have aborted one on its way out
    ("terminate called without an active exception", about one launch in a hundred), and a launcher then ends
    the others, in the middle of what they write, and reports a failure.
    """
    accelerator.wait_for_everyone()
    accelerator.end_training()
    if accelerator.num_processes > 1:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(0)


def is_fsdp(accelerator: Accelerator) -> bool:
    """Whether parameters will be sharded over processes."""
    return accelerator.distributed_type == DistributedType.FSDP


def place(model: nn.Module, accelerator: Accelerator, *, reduce_dtype: torch.dtype | None) -> nn.Module:
    """Puts a loaded model where it trains: sharded by FSDP2, or a full replica on this process's device.

    Replicas are not wrapped in DistributedDataParallel: `train.optim` sums their gradients once a step.

    Args:
        model: Weights on rank 0; under FSDP the other processes may hold it on the meta device.
        reduce_dtype: Dtype of gradient reduction under FSDP; None reduces in the parameters' own dtype.
    """
    if not is_fsdp(accelerator):
        return model.to(accelerator.device)
    plugin = accelerator.state.fsdp_plugin
    plugin.mixed_precision_policy = MixedPrecisionPolicy(reduce_dtype=reduce_dtype)
    plugin.set_auto_wrap_policy(model)
    return fsdp2_prepare_model(accelerator, model)
