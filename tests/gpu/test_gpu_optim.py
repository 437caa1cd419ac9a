"""optimi's Triton form of AdamW on a GPU, against float64 and its plain form."""

import pytest
import torch
from torch import nn

from common.train.optim import GradientSum, KahanOptimizer

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"),
]
LR, BETAS, EPS, WEIGHT_DECAY, STEPS = 2e-5, (0.9, 0.99), 1e-6, 0.01, 60


def start():
    return torch.randn(10_007, generator=torch.Generator().manual_seed(0)).bfloat16()


def gradient(step):
    return torch.randn(10_007, generator=torch.Generator().manual_seed(step)) + 0.3


def in_float64():
    weight, mean, square = start().double(), torch.zeros(10_007).double(), torch.zeros(10_007).double()
    for step in range(1, STEPS + 1):
        g = gradient(step).bfloat16().double()
        mean = BETAS[0] * mean + (1 - BETAS[0]) * g
        square = BETAS[1] * square + (1 - BETAS[1]) * g * g
        scaled = (square / (1 - BETAS[1] ** step)).sqrt() + EPS
        weight = weight * (1 - LR * WEIGHT_DECAY) - LR * (mean / (1 - BETAS[0] ** step)) / scaled
    return weight


def error(device, lr=LR):
    """Relative error of what the steps have changed, the compensation included."""
    model = nn.Module()
    model.weight = nn.Parameter(start().to(device))
    sums = GradientSum(model, accumulation="fp32", is_replica=True)
    optimizer = KahanOptimizer(
        model.named_parameters(),
        name="adamw",
        betas=BETAS,
        eps=EPS,
        weight_decay=WEIGHT_DECAY,
        kahan_sum=True,
    )
    for step in range(1, STEPS + 1):
        (model.weight * gradient(step).to(device, torch.bfloat16)).sum().backward()
        optimizer.step(sums, lr=lr)
    found = model.weight.detach().double() + optimizer.states["weight"]["kahan_comp"].double()
    change, truth = found.cpu() - start().double(), in_float64() - start().double()
    return float((change - truth).norm() / truth.norm())


def test_triton_steps_are_at_least_as_near_to_float64_as_plain_ones():
    triton, plain = error("cuda"), error("cpu")
    assert triton <= 1.1 * plain < 0.05
    assert error("cuda", lr=1.1 * LR) > 0.05


def test_an_empty_shard_is_no_error():
    model = nn.Module()
    model.weight = nn.Parameter(torch.zeros(0, dtype=torch.bfloat16, device="cuda"))
    sums = GradientSum(model, accumulation="fp32", is_replica=True)
    optimizer = KahanOptimizer(
        model.named_parameters(), name="adamw", betas=BETAS, eps=EPS, weight_decay=0.0, kahan_sum=True
    )
    optimizer.step(sums, lr=LR)
