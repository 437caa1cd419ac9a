"""Whole models on a GPU: compiled, fused and fast against plain ops, without a device synchronisation."""

import copy

import numpy as np
import pytest
import torch
from transformers import Gemma2Config, LlamaConfig

from common.batching import pack, plan_micro_batches
from common.models.families import read_gemma2, read_llama
from common.models.preference import PreferenceModel
from common.ops import BACKENDS, choose
from common.train.optim import GradientSum, KahanOptimizer, soft_cross_entropy

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"),
    pytest.mark.filterwarnings("ignore"),
]

SIZES = {"vocab_size": 5000, "num_hidden_layers": 3, "num_attention_heads": 4, "num_key_value_heads": 2}
GEMMA = Gemma2Config(
    **SIZES,
    hidden_size=512,
    intermediate_size=1024,
    head_dim=256,
    sliding_window=64,
    query_pre_attn_scalar=256,
)
LLAMA = LlamaConfig(**SIZES, hidden_size=512, intermediate_size=1024, head_dim=128)
NINE_B = Gemma2Config(
    vocab_size=256_000,
    hidden_size=3584,
    intermediate_size=14_336,
    num_hidden_layers=4,
    num_attention_heads=16,
    num_key_value_heads=8,
    head_dim=256,
    query_pre_attn_scalar=256,
    sliding_window=4096,
)
READERS = {"gemma": (GEMMA, read_gemma2), "llama": (LLAMA, read_llama), "9B width": (NINE_B, read_gemma2)}
LENGTHS = [300, 17, 129, 1, 64, 200]


def build(name, *, ops="auto", compile="auto", dtype=torch.bfloat16):
    """Random weights, the same whatever the ops; None where a backend is not there."""
    config, read = READERS[name]
    decoder = read(config, dtype)
    asked = {"device": "cuda", "dtype": dtype, "head_dim": decoder.head_dim}
    try:
        chosen = choose(ops, compile=compile, softcap=decoder.softcap, window=decoder.sliding_window, **asked)
    except ValueError as error:
        pytest.skip(str(error))
    with torch.device("meta"):
        model = PreferenceModel(decoder, num_classes=3, dropout=0.0, ops=chosen)
    model = model.to(dtype).to_empty(device="cuda").train()
    generator = torch.Generator("cuda").manual_seed(0)
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            parameter.normal_(0, 0.02, generator=generator)
            if "norm" in key:
                parameter.add_(0.0 if decoder.unit_offset else 1.0)
    return model


def made_up(lengths, vocab_size, seed=0):
    rng = np.random.default_rng(seed)
    return [torch.from_numpy(rng.integers(8, vocab_size, n)) for n in lengths]


def micro_batch(lengths=LENGTHS):
    packed = pack(made_up(lengths, SIZES["vocab_size"]), labels=[[0.5, 0.2, 0.3]] * len(lengths))
    return packed.to("cuda")


def gradients(model, packed, *, fuse, recompute=0):
    """Logits and every parameter's gradient sum, float32; a model is summed once, for the hooks stay."""
    sums = GradientSum(model, accumulation="fp32", is_replica=True, fuse=fuse)
    logits_SC = model(packed, recompute=recompute)
    soft_cross_entropy(logits_SC, packed.labels_SC).sum().backward()
    names = {parameter: name for name, parameter in model.named_parameters()}
    return {"logits": logits_SC.detach()} | {names[p]: total.float() for p, total in sums.sums.items()}


def worst_error(found, truth):
    """Largest relative error over logits and gradients."""
    return max(float((found[name] - truth[name]).norm() / truth[name].norm()) for name in truth)


@pytest.mark.parametrize("recompute", [0, 2])
@pytest.mark.parametrize("backend", [name for name in BACKENDS["attention"] if name != "torch"])
@pytest.mark.parametrize("family", ["gemma", "llama"])
def test_fast_models_are_as_near_to_fp32_as_plain_ones(family, backend, recompute):
    fast = build(family, ops=backend, compile="on")
    plain = build(family, ops="torch", compile="off")
    exact = build(family, ops="torch", compile="off", dtype=torch.float32)
    # Gemma's embedding scale is rounded to the dtype of the weights.
    exact.model.embedding_scale = plain.model.embedding_scale
    exact.load_state_dict(plain.state_dict())
    packed = micro_batch()
    truth = gradients(exact, packed, fuse=False)
    bound = 2 * worst_error(gradients(plain, packed, fuse=False), truth)
    wrong = copy.deepcopy(fast)
    assert worst_error(gradients(fast, packed, fuse=True, recompute=recompute), truth) <= bound
    wrong.model.layers[1].self_attn.scale *= 1.5
    assert worst_error(gradients(wrong, packed, fuse=True), truth) > bound


@pytest.mark.parametrize("family", ["gemma", "llama"])
def test_fused_sums_are_the_hooks_without_their_rounding(family):
    packed = micro_batch()
    hooks, fused = (
        gradients(build(family, ops="torch", compile="off"), packed, fuse=fuse) for fuse in (False, True)
    )
    for name, total in hooks.items():
        assert float((fused[name] - total).norm() / total.norm()) < 2**-8, name  # one rounding to bf16
    assert any(not torch.equal(fused[name], hooks[name]) for name in hooks)


@pytest.mark.parametrize("compile", ["on", "off"])
@pytest.mark.parametrize("backend", [name for name in BACKENDS["attention"] if name != "torch"])
@pytest.mark.parametrize("family", ["gemma", "llama"])
def test_nothing_in_a_pass_synchronises_the_device(family, backend, compile):
    if backend == "flex" and compile == "off":
        pytest.skip("flex is compiled")
    model = build(family, ops=backend, compile=compile)
    for lengths in (LENGTHS, LENGTHS[:3]):
        gradients(model, micro_batch(lengths), fuse=None)  # compiles
    packed = micro_batch(LENGTHS[::-1])
    sums = GradientSum(model, accumulation="fp32", is_replica=True)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        loss = soft_cross_entropy(model(packed, recompute=1), packed.labels_SC).sum()
        loss.backward()
        with pytest.raises(RuntimeError, match="synchroniz"):
            loss.item()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert sum(float(total.abs().sum()) for total in sums.sums.values()) > 0


@pytest.mark.parametrize("backend", ["auto", "flex"])
def test_one_compilation_serves_all_lengths_and_layers(backend):
    model = build("gemma", ops=backend, compile="on")
    torch._dynamo.reset()
    for lengths in (LENGTHS, LENGTHS[:3]):
        gradients(model, micro_batch(lengths), fuse=None)
    with torch._dynamo.config.patch(error_on_recompile=True):
        for lengths in ([500, 30], [7, 8, 9, 400, 33], [190, 2]):
            gradients(model, micro_batch(lengths), fuse=None)


def losses_of_20_steps(ops, compile, fuse, max_tokens):
    """Mean loss of each step of 16 comparisons whose label stands in their first token."""
    model = build("9B width", ops=ops, compile=compile)
    sums = GradientSum(model, accumulation="fp32", is_replica=True, fuse=fuse)
    numbers = {"betas": (0.9, 0.99), "eps": 1e-6, "weight_decay": 0.01, "kahan_sum": True}
    optimizer = KahanOptimizer(model.named_parameters(), name="adamw", **numbers)
    rng, means = np.random.default_rng(1), []
    for step in range(20):
        lengths = (600 * rng.lognormal(0, 0.75, 16)).astype(int).clip(90, 4340)
        ids, classes = made_up(lengths, 256_000, seed=step), rng.integers(0, 3, 16)
        for sequence, label in zip(ids, classes, strict=True):
            sequence[-1] = 8 + int(label)
        labels = np.eye(3)[classes]
        losses = []
        for part in plan_micro_batches(lengths.tolist(), 1, max_tokens)[0]:
            packed = pack([ids[i] for i in part], labels=labels[part]).to("cuda")
            loss_S = soft_cross_entropy(model(packed), packed.labels_SC)
            (loss_S.sum() / 16).backward()
            losses.append(loss_S.detach())
        optimizer.step(sums, lr=2e-5)
        means.append(float(torch.cat(losses).mean()))
    del model, sums, optimizer
    torch.cuda.empty_cache()
    return np.array(means)


def test_losses_at_9b_width_agree_with_plain_ops_as_well_as_those_with_each_other():
    plain = np.stack([losses_of_20_steps("torch", "off", False, budget) for budget in (4400, 6000, 9000)])
    fast = losses_of_20_steps("flash", "on", True, 4400)
    spread = (plain.max(0) - plain.min(0)).max()
    assert plain[:, 0].min() - plain[:, -4:].mean() > 0.05  # something is learnt
    assert 0 < np.abs(fast - plain.mean(0)).max() <= 2 * spread, (fast, plain)
