"""Gradient sums, Kahan steps, the schedule, the loss."""

import copy

import numpy as np
import optimi
import pytest
import torch
from torch import nn

from common.train.optim import (
    GradientSum,
    KahanOptimizer,
    learning_rate,
    round_stochastically,
    soft_cross_entropy,
)


def test_schedule_rises_to_the_peak_and_falls_to_the_floor():
    rates = [learning_rate(step, 100, 2.0) for step in range(100)]
    assert rates == pytest.approx(np.interp(range(100), [0, 10, 100], [0.002, 2.0, 0.002]))
    assert rates[99] == pytest.approx(2.0 * (0.001 + 0.999 / 90))
    assert rates.index(max(rates)) == 10
    assert learning_rate(100, 100, 2.0) == pytest.approx(0.002)
    assert learning_rate(0, 1, 2.0) == pytest.approx(0.002)


def test_soft_cross_entropy_equals_torch_and_ignores_weightless_rows():
    logits, labels = torch.randn(5, 3), torch.rand(5, 3).softmax(-1)
    expected = nn.functional.cross_entropy(logits, labels, reduction="none")
    torch.testing.assert_close(soft_cross_entropy(logits, labels), expected)
    logits = torch.randn(1, 3, requires_grad=True)
    soft_cross_entropy(logits, torch.zeros(1, 3)).sum().backward()
    assert logits.grad.abs().sum() == 0


class Weight(nn.Module):
    def __init__(self, dtype, size=64):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(size, dtype=dtype))


@pytest.mark.parametrize("accumulation", ["fp32", "stochastic"])
def test_small_gradients_are_not_lost(accumulation):
    """1.0 + 200 x 0.001 is 1.2; adding in bf16 it stays 1.0."""
    torch.manual_seed(0)
    model = Weight(torch.bfloat16, size=4096)
    sums = GradientSum(model, accumulation=accumulation, is_replica=True)
    plain = torch.zeros(4096, dtype=torch.bfloat16)
    for factor in [1.0, *[0.001] * 200]:
        (model.weight * factor).sum().backward()
        plain += factor
        assert model.weight.grad is None
    found = sums.take_gradient(model.weight).float()
    assert plain.float().mean() == 1.0
    assert abs(found.mean().item() - 1.2) < (0.005 if accumulation == "fp32" else 0.01)
    assert sums.norm() == 0  # taken: the next step starts at zero


def test_stochastic_rounding_is_right_in_expectation_and_keeps_what_fits():
    torch.manual_seed(0)
    values = torch.full((200_000,), 1.0 + 1 / 1024)
    found = round_stochastically(values, torch.bfloat16).float()
    assert set(found.unique().tolist()) == {1.0, 1.0 + 1 / 128}
    assert abs(found.mean().item() - values[0].item()) < 1e-4
    exact = torch.tensor([0.0, -1.5, 3.0e38, 2.0**-130])
    assert torch.equal(round_stochastically(exact[:2], torch.bfloat16).float(), exact[:2])
    many = torch.full((2**20,), -1.5)  # no draw of 65,536 may change what fits
    assert torch.equal(round_stochastically(many, torch.bfloat16).float(), many)
    assert round_stochastically(-values[:1000], torch.bfloat16).float().max() <= -1.0


def test_gradient_sum_equals_autograd_and_clips():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 7), nn.GELU(), nn.Linear(7, 3))
    reference = copy.deepcopy(model)
    sums = GradientSum(model, accumulation="fp32", is_replica=True)
    data = torch.randn(6, 5)
    for part in data.split(2):
        model(part).square().sum().backward()
    reference(data).square().sum().backward()
    expected = nn.utils.get_total_norm([p.grad for p in reference.parameters()])
    torch.testing.assert_close(sums.norm(), expected)
    sums.scale(torch.tensor(0.5))
    for mine, theirs in zip(model.parameters(), reference.parameters(), strict=True):
        torch.testing.assert_close(sums.take_gradient(mine), theirs.grad / 2)


@pytest.mark.parametrize("name", ["adamw", "stable_adamw"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("size", [1.0, 1e-4])  # of the data: gradients that eps does not matter to, or does
def test_steps_equal_optimis_own_optimizer(name, dtype, size):
    torch.manual_seed(0)
    model = nn.Linear(9, 5).to(dtype)
    reference = copy.deepcopy(model)
    theirs = (optimi.AdamW if name == "adamw" else optimi.StableAdamW)(
        reference.parameters(),
        lr=0.02,
        betas=(0.9, 0.99),
        eps=1e-6,
        weight_decay=0.01,
        triton=False,
        foreach=False,
    )
    sums = GradientSum(model, accumulation="fp32", is_replica=True)
    ours = optimizer(model, name=name)
    for _ in range(7):
        data = size * torch.randn(4, 9, dtype=dtype)
        model(data).square().sum().backward()
        reference(data).square().sum().backward()
        ours.step(sums, lr=0.02)
        theirs.step()
        theirs.zero_grad()
    for mine, its in zip(model.parameters(), reference.parameters(), strict=True):
        assert torch.equal(mine, its)


def optimizer(model, *, name="adamw", kahan_sum=True, beta2=0.99):
    return KahanOptimizer(
        model.named_parameters(),
        name=name,
        betas=(0.9, beta2),
        eps=1e-6,
        weight_decay=0.01,
        kahan_sum=kahan_sum,
    )


def train_regression(dtype, kahan_sum, *, steps=400):
    """Weights of a linear regression after steps far below what bf16 weights of size 1 can take up."""
    torch.manual_seed(0)
    model = nn.Linear(16, 1, bias=False)
    model.weight.data.uniform_(0.5, 1.5)
    target = torch.rand(16, 1) * 2
    model.to(dtype)
    sums = GradientSum(model, accumulation="fp32", is_replica=True)
    ours = optimizer(model, kahan_sum=kahan_sum)
    for step in range(steps):
        torch.manual_seed(step)
        data = torch.randn(8, 16)
        (model(data.to(dtype)).float() - data @ target).square().mean().backward()
        ours.step(sums, lr=5e-4)
    return model.weight.detach().float()


def test_bf16_with_kahan_follows_fp32_closer_than_without(capsys):
    exact = train_regression(torch.float32, False)
    with_kahan = (train_regression(torch.bfloat16, True) - exact).norm().item()
    without = (train_regression(torch.bfloat16, False) - exact).norm().item()
    with capsys.disabled():
        print(f"\n  distance to fp32 after 400 steps: bf16 + Kahan {with_kahan:.4f}, bf16 {without:.4f}")
    assert with_kahan < without / 3


def test_states_have_the_dtype_of_their_parameters_and_kahan_only_where_it_is_needed():
    low, full = optimizer(nn.Linear(3, 2).bfloat16()), optimizer(nn.Linear(3, 2))
    assert {t.dtype for n, t in low.tensors().items() if n != "num_steps"} == {torch.bfloat16}
    assert "kahan_comp.weight" in low.tensors() and "kahan_comp.weight" not in full.tensors()


def test_beta2_too_high_for_bf16_states_is_refused():
    with pytest.raises(ValueError, match=r"beta2 is 0\.999"):
        optimizer(nn.Linear(3, 2).bfloat16(), beta2=0.999)
    assert optimizer(nn.Linear(3, 2), beta2=0.999) and optimizer(nn.Linear(3, 2).bfloat16(), beta2=0.995)
