"""Optimisation in pure bf16 that loses nothing small: gradient sums, Kahan-compensated steps, the schedule.

State a parameter: weight 2 B, gradient sum 4 B (fp32) or 2 B (stochastic), two moments 4 B, compensation 2 B.
"""

from collections.abc import Iterable
from typing import Literal

import optimi
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.tensor import DTensor

from common.ops.weight_gradient import Embedding, Linear

OptimizerName = Literal["adamw", "stable_adamw"]
Accumulation = Literal["fp32", "stochastic"]

WARM_UP_FRACTION = 0.1
FLOOR = 0.001


def learning_rate(step: int, num_steps: int, peak: float) -> float:
    """Learning rate of optimiser step `step` (from 0): 0.001 x peak -> peak over the first tenth, then back.

    Example: 100 steps -> step 0: 0.001 x peak, step 10: peak, step 99: 0.012 x peak.
    """
    warm_up = WARM_UP_FRACTION * num_steps
    risen = step / warm_up if step < warm_up else (num_steps - step) / (num_steps - warm_up)
    return peak * (FLOOR + (1 - FLOOR) * risen)


class GradientSum:
    """Adds up micro-batch gradients without losing small ones, and frees each one as soon as it is added.

    FSDP2 adds gradients in the parameters' dtype: in bf16, 1.0 + 200 x 0.001 stays 1.0. A hook on every
    parameter moves each gradient (each shard, under FSDP2) here instead, before the next one exists. Where a
    weight is whole and on a GPU, its layer adds straight into the fp32 sum and no gradient is ever made.

    Args:
        model: Placed where it trains; under FSDP2 already sharded.
        accumulation: "fp32" sums (4 B a parameter) or "stochastic" rounding into sums of the parameter's own
            dtype (2 B in bf16; right in expectation).
        is_replica: Every process holds all parameters, so sums are reduced over processes by `reduce`.
        fuse: False leaves all weights to the hooks; None decides by what is possible.
    """

    def __init__(
        self, model: nn.Module, *, accumulation: Accumulation, is_replica: bool, fuse: bool | None = None
    ) -> None:
        self.accumulation = accumulation
        self.is_replica = is_replica
        self.sums: dict[nn.Parameter, torch.Tensor] = {}
        for parameter in model.parameters():
            dtype = torch.float32 if accumulation == "fp32" else parameter.dtype
            self.sums[parameter] = torch.zeros_like(local(parameter.detach()), dtype=dtype)
            parameter.register_post_accumulate_grad_hook(self._take)
        for layer in (module for module in model.modules() if isinstance(module, (Linear, Embedding))):
            is_whole = layer.weight.is_cuda and not isinstance(layer.weight, DTensor)
            fuses = accumulation == "fp32" and is_whole if fuse is None else fuse
            layer.weight_sum = self.sums[layer.weight] if fuses else None

    def _take(self, parameter: nn.Parameter) -> None:
        if parameter.grad is None:  # the layer has added it
            return
        gradient, total = local(parameter.grad), self.sums[parameter]
        if self.accumulation == "fp32" or total.dtype == torch.float32:
            total.add_(gradient)
        else:
            total.copy_(round_stochastically(total.float() + gradient.float(), total.dtype))
        parameter.grad = None

    def reduce(self) -> None:
        """Sums over replicas; sharded gradients were reduced in the backward pass."""
        if self.is_replica and dist.is_initialized():
            for total in self.sums.values():
                dist.all_reduce(total)

    def norm(self) -> torch.Tensor:
        """Global 2-norm of all gradients, a float32 scalar equal on every process."""
        norms = (torch.linalg.vector_norm(total, dtype=torch.float32) for total in self.sums.values())
        squares = sum(norm.square() for norm in norms)
        if not self.is_replica:
            dist.all_reduce(squares)
            squares /= self._replica_count()
        return squares.sqrt()

    def scale(self, factor: torch.Tensor) -> None:
        """Multiplies every sum, for clipping."""
        for total in self.sums.values():
            total.mul_(factor)

    def take_gradient(self, parameter: nn.Parameter) -> torch.Tensor:
        """The gradient in the parameter's dtype and layout; the sum starts again at zero."""
        total = self.sums[parameter]
        gradient = total.to(parameter.dtype, copy=True)
        total.zero_()
        if isinstance(parameter, DTensor):
            return DTensor.from_local(
                gradient,
                parameter.device_mesh,
                parameter.placements,
                shape=parameter.shape,
                stride=parameter.stride(),
                run_check=False,
            )
        return gradient

    def _replica_count(self) -> int:
        """Over how many processes each shard is repeated (hybrid sharding)."""
        parameter = next(iter(self.sums))
        mesh = parameter.device_mesh
        shards = [mesh.size(d) for d, placement in enumerate(parameter.placements) if placement.is_shard()]
        return dist.get_world_size() // max(1, int(torch.tensor(shards).prod()))


def round_stochastically(values: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Rounds float32 to bfloat16, up or down with the probability that makes the expectation exact."""
    assert values.dtype == torch.float32 and dtype == torch.bfloat16, (values.dtype, dtype)
    bits = values.view(torch.int32)
    noise = torch.randint(0, 1 << 16, bits.shape, dtype=torch.int32, device=bits.device)
    return ((bits + noise) & -0x10000).view(torch.float32).to(torch.bfloat16)


class KahanOptimizer:
    """optimi's AdamW or StableAdamW, one parameter at a time, with states that shard like their parameters.

    The functional form is called with its plain backend by name: optimi's own choice of backend differs
    between parameters and DTensors, and its Triton kernels read a DTensor's null pointer. AdamW is
    elementwise and works on local shards. StableAdamW scales by the RMS of the whole tensor and so gets the
    DTensors.

    Args:
        named_parameters: (name, parameter) pairs, sharded or not.
        name: "adamw" or "stable_adamw".
        betas: With bf16 states beta2 must stay at or below 0.995, or the second moment never decays.
        kahan_sum: Keep the rounding error of every bf16 weight and add it to the next step.
    """

    def __init__(
        self,
        named_parameters: Iterable[tuple[str, nn.Parameter]],
        *,
        name: OptimizerName,
        betas: tuple[float, float],
        eps: float,
        weight_decay: float,
        kahan_sum: bool,
    ) -> None:
        self.name = name
        self.betas = betas
        self.eps = eps
        self.weight_decay = weight_decay
        self.parameters = dict(named_parameters)
        self.num_steps = torch.zeros((), dtype=torch.int32)
        self.states: dict[str, dict[str, torch.Tensor]] = {}
        for key, parameter in self.parameters.items():
            is_low = parameter.dtype in (torch.bfloat16, torch.float16)
            if is_low and betas[1] > 0.995:
                raise ValueError(
                    f"beta2 is {betas[1]}, but a bf16 second moment decays only up to 0.995; lower --beta2"
                )
            kinds = ("exp_avg", "exp_avg_sq", *(("kahan_comp",) if kahan_sum and is_low else ()))
            self.states[key] = {kind: torch.zeros_like(parameter.detach()) for kind in kinds}

    @torch.no_grad()
    def step(self, gradients: GradientSum, *, lr: float) -> None:
        """Applies one step from the summed gradients, which start again at zero."""
        for key, parameter in self.parameters.items():
            state = self.states[key]
            tensors = [parameter, gradients.take_gradient(parameter), state["exp_avg"], state["exp_avg_sq"]]
            kahan_comp = state.get("kahan_comp")
            if self.name == "adamw":
                tensors = [local(tensor) for tensor in tensors]
                kahan_comp = None if kahan_comp is None else local(kahan_comp)
            elif self.name == "stable_adamw":
                tensors.append(torch.tensor(self.eps**2, dtype=parameter.dtype, device=parameter.device))
            else:
                raise ValueError(f"optimizer {self.name!r} is unknown; known: adamw, stable_adamw")
            function = optimi.adamw if self.name == "adamw" else optimi.stableadamw
            function(
                *([tensor] for tensor in tensors),
                [kahan_comp],
                lr=lr,
                beta1=self.betas[0],
                beta2=self.betas[1],
                weight_decay=self.weight_decay,
                eps=self.eps,
                step=self.num_steps.clone(),
                kahan_sum=kahan_comp is not None,
                foreach=False,
                triton=False,
            )
        self.num_steps += 1

    def tensors(self) -> dict[str, torch.Tensor]:
        """Name -> state tensor, for saving and for loading in place."""
        named = {
            f"{kind}.{key}": value for key, state in self.states.items() for kind, value in state.items()
        }
        return {**named, "num_steps": self.num_steps}


def local(tensor: torch.Tensor) -> torch.Tensor:
    """This process's shard of a DTensor; any other tensor as it is."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def soft_cross_entropy(logits_SC: torch.Tensor, labels_SC: torch.Tensor) -> torch.Tensor:
    """Cross entropy against label weights, one value a sequence: float32 [S]; a row of zeros gives zero."""
    return -(labels_SC * logits_SC.float().log_softmax(-1)).sum(-1)
