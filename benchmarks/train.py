"""Optimiser steps of full-size models with random weights, beside transformers'.

Run   just bench train gemma-2-9b        just bench train llama-3-8b         (below 8 minutes each, one GPU)

Lengths are those of arena votes: median 600 tokens, at most 4,340. A step is forward, backward, gradient norm
and AdamW on 64,000 tokens. The learning rate is 0, so that every step and every variant sees the same weights
and a wrong variant shows in loss and gradient norm. "at 220k" counts one optimiser step for 220,000 tokens,
which 80 comparisons have; so does the share of the matmuls. On a card that is too small for the state of all
layers, the model gets fewer.

Ours: fp32 gradient sums, AdamW with Kahan sums in bf16 (12 bytes a parameter). Where activations do not fit,
layers are recomputed, a quarter of the depth at a time.
  ours, ours-4400         as chosen by itself: nothing recomputed, micro-batches of 5,600 and 4,400 tokens
  hook-sums               gradients added by hooks, not by the matmul that computes them
  no-compile              plain norms, rotary and gate
  flex                    FlexAttention
  recompute               every layer recomputed, 16,384 tokens
  plain                   the definitions of all ops, every layer recomputed, 16,384 tokens
Transformers': gradients summed in bf16, torch's fused AdamW with bf16 states (8 bytes a parameter).
  packed, packed-again    flash-attn and liger, 4,400 tokens; every layer recomputed, 16,384 tokens
  padded-flash            sorted by length over all steps, flash-attn, liger, recomputed, 16,384 tokens
  padded-sdpa             sorted, scaled_dot_product_attention without Gemma's softcap, recomputed, 16,384
Ceiling: `matmuls`, the layers' matmuls alone, forward and both gradients, at as many rows.

Columns: tokens of a micro-batch at the most; layers computed again; tokens/s of the steps as they are, median
and range; at 220k; GB at the peak; seconds of warm-up, compilation included; loss and norm of the first step.
"""

import argparse
import gc
import math
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from transformers import AutoModel, AutoModelForSequenceClassification, PreTrainedConfig

from common.batching import pack, plan_micro_batches
from common.console import clear_errors
from common.models.families import FAMILIES, Decoder
from common.models.preference import PreferenceModel
from common.train.optim import GradientSum, KahanOptimizer, soft_cross_entropy
from padding import padded_batches
from variants import Parser, Row, attempt, ops_or_absent, run, spread, timed

SHAPE = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
SHAPE += ("num_key_value_heads", "head_dim")
GEMMA_2_9B = dict(zip(SHAPE, (256_000, 3584, 14_336, 42, 16, 8, 256), strict=True))
LLAMA_3_8B = dict(zip(SHAPE, (128_256, 4096, 14_336, 32, 32, 8, 128), strict=True))
ROTARY = {"rope_type": "default", "rope_theta": 500_000.0}
MODELS = {
    "gemma-2-9b": ("gemma2", {**GEMMA_2_9B, "query_pre_attn_scalar": 256, "sliding_window": 4096}),
    "llama-3-8b": ("llama", {**LLAMA_3_8B, "rms_norm_eps": 1e-5, "rope_parameters": ROTARY}),
}
TOY = {"vocab_size": 256, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "head_dim": 8}
TOY_SHRINK = 40
"""Lengths and budgets of the toy are so many times smaller."""
STEP_TOKENS, REAL_STEP_TOKENS = 64_000, 220_000
NUM_SEQUENCES, LEAST_STEPS = 480, 2
STATE_BYTES, STATE_SHARE = 12, 0.75
"""Bytes a parameter of ours, and their greatest share of a card's memory: the rest is for activations."""
ADAMW = {"betas": (0.9, 0.99), "eps": 1e-6, "weight_decay": 0.01}


class Ours(NamedTuple):
    """A way to compute with our model."""

    max_tokens: int = 5_600
    backend: str = "auto"
    compile: str = "auto"
    fuse: bool | None = None
    recompute_all: bool = False


class Theirs(NamedTuple):
    """A way to compute with transformers."""

    max_tokens: int
    attention: str
    is_packed: bool
    recompute_all: bool


OURS = {
    "ours": Ours(),
    "ours-4400": Ours(max_tokens=4_400),
    "hook-sums": Ours(fuse=False),
    "no-compile": Ours(compile="off"),
    "flex": Ours(backend="attention=flex"),
    "recompute": Ours(max_tokens=16_384, recompute_all=True),
    "plain": Ours(16_384, backend="torch", compile="off", fuse=False, recompute_all=True),
}
THEIRS = {
    "packed": Theirs(4_400, "flash_attention_2", is_packed=True, recompute_all=False),
    "padded-flash": Theirs(16_384, "flash_attention_2", is_packed=False, recompute_all=True),
    "packed-again": Theirs(16_384, "flash_attention_2", is_packed=True, recompute_all=True),
    "padded-sdpa": Theirs(16_384, "sdpa", is_packed=False, recompute_all=True),
}


class Setting(NamedTuple):
    """What all variants share."""

    config: PreTrainedConfig
    decoder: Decoder
    dtype: torch.dtype
    device: str
    shrink: int
    seconds: float


class MicroBatch(NamedTuple):
    """What one forward and backward pass takes."""

    inputs: object
    labels_SC: torch.Tensor
    num_tokens: int
    """Without padding."""


class Step(NamedTuple):
    """Tokens and seconds of one optimiser step."""

    num_tokens: int
    gradients_s: float
    optimiser_s: float


def setting(args: argparse.Namespace) -> Setting:
    """Model, dtype and device of a command line."""
    kind, fields = MODELS[args.model]
    device, dtype = ("cpu", torch.float32) if args.toy else ("cuda", torch.bfloat16)
    fields = {**fields, **(TOY if args.toy else {}), "num_labels": 3, "use_cache": False, "pad_token_id": 0}
    if args.layers:
        fields["num_hidden_layers"] = args.layers
    elif not args.toy:
        memory = torch.cuda.get_device_properties(0).total_memory
        fields["num_hidden_layers"] = fitting_layers(fields, memory)
    config = FAMILIES[kind].config(**fields)
    decoder = FAMILIES[kind].read(config, dtype)
    return Setting(config, decoder, dtype, device, TOY_SHRINK if args.toy else 1, args.seconds)


def fitting_layers(sizes: dict, memory: int) -> int:
    """Layers whose state fits on a card of `memory` bytes beside their activations, at most all.

    Example: gemma-2-9b has 42 on 141 GB, 22 on 80 GiB.
    """
    room = STATE_SHARE * memory / STATE_BYTES - sizes["vocab_size"] * sizes["hidden_size"]
    per_layer = sum(count * math.prod(shape) for shape, count in matmul_shapes(sizes).items())
    return min(sizes["num_hidden_layers"], int(room / per_layer))


def matmul_shapes(sizes: dict) -> dict[tuple[int, int], int]:
    """(outputs, inputs) of a layer's matmuls -> how many there are."""
    D, F = sizes["hidden_size"], sizes["intermediate_size"]
    N, K = (sizes[name] * sizes["head_dim"] for name in ("num_attention_heads", "num_key_value_heads"))
    return Counter([(N, D), (K, D), (K, D), (D, N), (F, D), (F, D), (D, F)])


def draw_sequences(one: Setting) -> list[torch.Tensor]:
    """Random token ids, of lengths as arena votes have them."""
    draw = np.random.default_rng(0)
    lengths = (600 * draw.lognormal(0.0, 0.75, NUM_SEQUENCES)).astype(int).clip(90, 4340) // one.shrink
    return [torch.from_numpy(draw.integers(8, one.config.vocab_size, n)) for n in lengths]


def cut(lengths: Sequence[int], num_tokens: int) -> list[list[int]]:
    """Indices of consecutive sequences, up to `num_tokens` a group; what is left over is dropped.

    Example: lengths 5, 3, 7, 2 at 8 tokens -> [[0, 1], [2]].
    """
    groups: list[list[int]] = [[]]
    for i, length in enumerate(lengths):
        if sum(lengths[j] for j in groups[-1]) + length > num_tokens:
            groups.append([])
        groups[-1].append(i)
    return groups[:-1]


def labels(indices: Sequence[int], device: str) -> torch.Tensor:
    """One-hot labels_SC."""
    return F.one_hot(torch.tensor(indices) % 3, 3).float().to(device)


def packed_steps(one: Setting, max_tokens: int) -> list[list[MicroBatch]]:
    """Micro-batches of each step, without padding; the sequences of a step depend on no budget."""
    ids, found = draw_sequences(one), []
    for indices in cut([len(x) for x in ids], STEP_TOKENS // one.shrink):
        found.append([])
        for places in plan_micro_batches([len(ids[i]) for i in indices], 1, max_tokens // one.shrink)[0]:
            micro_batch = [indices[place] for place in places]
            inputs = pack([ids[i] for i in micro_batch]).to(one.device)
            found[-1].append(MicroBatch(inputs, labels(micro_batch, one.device), len(inputs.input_ids_T)))
    return found


def padded_steps(one: Setting, max_tokens: int) -> list[list[MicroBatch]]:
    """Padded batches, sorted over all sequences, then shuffled, as a length-grouping sampler makes them."""
    ids = draw_sequences(one)
    lengths = np.array([len(x) for x in ids])
    batches = padded_batches(lengths, np.argsort(lengths), max_tokens // one.shrink)
    batches = [batches[i] for i in np.random.default_rng(1).permutation(len(batches))]
    found = []
    for indices in cut([int(lengths[batch].sum()) for batch in batches], STEP_TOKENS // one.shrink):
        found.append([])
        for batch in (batches[i] for i in indices):
            input_ids = nn.utils.rnn.pad_sequence([ids[i] for i in batch], batch_first=True)
            mask = torch.arange(input_ids.shape[1]) < torch.from_numpy(lengths[batch])[:, None]
            inputs = {"input_ids": input_ids.to(one.device), "attention_mask": mask.long().to(one.device)}
            found[-1].append(MicroBatch(inputs, labels(batch, one.device), int(lengths[batch].sum())))
    return found


def our_row(one: Setting, way: Ours) -> Row:
    """Steps with our model: as few layers recomputed as memory asks for."""
    ops = ops_or_absent(
        way.backend,
        compile=way.compile,
        device=one.device,
        dtype=one.dtype,
        head_dim=one.decoder.head_dim,
        softcap=one.decoder.softcap,
        window=one.decoder.sliding_window,
    )
    with torch.device("meta"):
        model = PreferenceModel(one.decoder, num_classes=3, dropout=0.0, ops=ops)
    model = model.to(one.dtype).to_empty(device=one.device).train()
    torch.manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name:
                parameter.fill_(0.0 if one.decoder.unit_offset else 1.0)
            else:
                parameter.normal_(0.0, 0.02)
    gradients = GradientSum(model, accumulation="fp32", is_replica=True, fuse=way.fuse)
    optimizer = KahanOptimizer(model.named_parameters(), name="adamw", kahan_sum=True, **ADAMW)

    def update() -> torch.Tensor:
        norm = gradients.norm()
        optimizer.step(gradients, lr=0.0)
        return norm

    steps, depth = packed_steps(one, way.max_tokens), one.config.num_hidden_layers
    for recompute in [depth] if way.recompute_all else [depth * quarters // 4 for quarters in range(5)]:
        forward = partial(model, recompute=recompute)
        row = attempt(partial(measure_steps, forward, steps, update, one.device, one.seconds))
        if "out of memory" not in str(row.get("error")):
            break
        model.zero_grad()
        gc.collect()
        torch.cuda.empty_cache()
        update()  # empties the sums
    return {"recomputed": f"{recompute}/{depth}", "ops": str(ops), **row}


def their_row(one: Setting, way: Theirs) -> Row:
    """Steps with transformers' model, as a user would set it up."""
    allowed = way.attention
    if way.attention == "sdpa":  # it has no softcap, so that transformers refuses to make a Gemma with it
        allowed, one.config.attn_logit_softcapping = "eager", None
    else:
        import liger_kernel.transformers

        patch = getattr(liger_kernel.transformers, f"apply_liger_kernel_to_{one.config.model_type}")
        patch(cross_entropy=False, fused_linear_cross_entropy=False)
    torch.manual_seed(0)
    kind = AutoModel if way.is_packed else AutoModelForSequenceClassification
    with torch.device(one.device):
        model = kind.from_config(one.config, dtype=one.dtype, attn_implementation=allowed).train()
        score = nn.Linear(one.config.hidden_size, 3, dtype=one.dtype) if way.is_packed else None
    for module in model.modules():
        if hasattr(module, "config"):
            module.config._attn_implementation = way.attention
    if way.recompute_all:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    parameters = [*model.parameters(), *(score.parameters() if score else ())]
    optimizer = torch.optim.AdamW(parameters, lr=0.0, fused=True, **ADAMW)

    def forward(inputs):
        if score is None:
            return model(**inputs).logits
        cu_seqlens, longest = inputs.cu_seqlens, inputs.max_seqlen
        hidden_TD = model(
            input_ids=inputs.input_ids_T[None],
            position_ids=inputs.position_ids_T[None],
            cu_seq_lens_q=cu_seqlens,
            cu_seq_lens_k=cu_seqlens,
            max_length_q=longest,
            max_length_k=longest,
        ).last_hidden_state[0]
        return score(hidden_TD[cu_seqlens[1:].long() - 1])

    def update() -> torch.Tensor:
        norm = nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])
        optimizer.step()
        optimizer.zero_grad()
        return norm

    steps = (packed_steps if way.is_packed else padded_steps)(one, way.max_tokens)
    depth = one.config.num_hidden_layers
    row = measure_steps(forward, steps, update, one.device, one.seconds)
    return {"recomputed": f"{depth if way.recompute_all else 0}/{depth}", **row}


def measure_steps(
    forward: Callable[[object], torch.Tensor],
    steps: list[list[MicroBatch]],
    update: Callable[[], torch.Tensor],
    device: str,
    seconds: float,
) -> Row:
    """Times whole steps, at least two, until `seconds` are over.

    Args:
        forward: Inputs -> logits_SC.
        steps: Micro-batches of each step; the longest of the first step are the warm-up.
        update: Optimiser step -> norm of the gradients, which start again at zero.
        device: Of the model.
        seconds: After which no further step is begun.
    """
    sync = torch.cuda.synchronize if device == "cuda" else lambda: None

    def backward(batch: MicroBatch, num_sequences: int) -> torch.Tensor:
        loss = soft_cross_entropy(forward(batch.inputs), batch.labels_SC).sum() / num_sequences
        loss.backward()
        return loss.detach()

    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    began = time.perf_counter()
    for batch in sorted(steps[0], key=lambda batch: -batch.num_tokens)[:3]:
        backward(batch, 1)
    update()
    sync()
    warm_up_s, found, first = time.perf_counter() - began, [], {}
    began = time.perf_counter()
    for step in steps:
        if len(found) >= LEAST_STEPS and time.perf_counter() - began > seconds:
            break
        num_sequences = sum(len(batch.labels_SC) for batch in step)
        start = time.perf_counter()
        loss = sum(backward(batch, num_sequences) for batch in step)
        sync()
        middle = time.perf_counter()
        norm = update()
        sync()
        tokens = sum(batch.num_tokens for batch in step)
        found.append(Step(tokens, middle - start, time.perf_counter() - middle))
        first = first or {"loss": loss.item(), "gradient_norm": norm.item()}
    peak = 0.0 if device == "cpu" else torch.cuda.max_memory_allocated() / 1e9
    return {**rates(found), **first, "peak_gb": peak, "warm_up_s": warm_up_s}


def rates(steps: Sequence[Step]) -> Row:
    """Tokens/s of the steps as they are, and of steps of 220,000 tokens.

    Example: 64,000 tokens in 6 s and an optimiser step of 0.4 s -> 10,000, and 10,468 at 220,000.
    """
    per_token = spread([step.gradients_s / step.num_tokens for step in steps])["median"]
    optimiser_s = spread([step.optimiser_s for step in steps])["median"]
    return {
        "steps": len(steps),
        "optimiser_s": optimiser_s,
        "tokens_per_s": spread([step.num_tokens / (step.gradients_s + step.optimiser_s) for step in steps]),
        "tokens_per_s_220k": 1 / (per_token + optimiser_s / REAL_STEP_TOKENS),
    }


def matmul_row(one: Setting, num_rows: int) -> Row:
    """The matmuls of all layers alone, forward and both gradients, on `num_rows` rows."""
    total_ms, make = 0.0, partial(torch.randn, dtype=one.dtype, device=one.device)
    sizes, num_rows = one.config.to_dict(), num_rows // one.shrink
    for (outputs, inputs), count in matmul_shapes(sizes).items():
        x, weight, gradient = make(num_rows, inputs), make(outputs, inputs), make(num_rows, outputs)

        def three(x=x, weight=weight, gradient=gradient):
            F.linear(x, weight)
            gradient @ weight
            gradient.t() @ x

        total_ms += count * one.config.num_hidden_layers * timed(three, one.device)["median"]
    rate = 1e3 * num_rows / total_ms
    return {"tokens_per_s": spread([rate]), "tokens_per_s_220k": rate}


def measure(name: str, args: argparse.Namespace) -> Iterator[Row]:
    """The rows of one variant."""
    one = setting(args)
    if name == "matmuls":
        for budget in sorted({way.max_tokens for way in (*OURS.values(), *THEIRS.values())}):
            yield {"budget": budget, **matmul_row(one, budget)}
    else:
        way, row = (OURS[name], our_row) if name in OURS else (THEIRS[name], their_row)
        yield {"budget": way.max_tokens, **attempt(partial(row, one, way))}


def compare(row: Row, base: Row, rows: list[Row]) -> Row:
    """Ratio to ours, and the share of the matmuls alone at as many rows."""
    found = {"times_ours": row["tokens_per_s_220k"] / base["tokens_per_s_220k"]}
    for other in rows:
        if other["variant"] == "matmuls" and other["budget"] == row["budget"]:
            found["share"] = row["tokens_per_s_220k"] / other["tokens_per_s_220k"]
    return found


COLUMNS = {
    "budget": "{budget:,}",
    "again": "{recomputed}",
    "tokens/s": "{tokens_per_s[median]:,.0f}",
    "from": "{tokens_per_s[min]:,.0f}",
    "to": "{tokens_per_s[max]:,.0f}",
    "at 220k": "{tokens_per_s_220k:,.0f}",
    "x ours": "{times_ours:.2f}",
    "share": "{share:.0%}",
    "GB": "{peak_gb:.1f}",
    "warm": "{warm_up_s:.0f}",
    "loss": "{loss:.4f}",
    "norm": "{gradient_norm:.4g}",
}


if __name__ == "__main__":
    parser = Parser(__doc__.splitlines()[0], list(dict.fromkeys(["matmuls", "ours", *THEIRS, *OURS])))
    parser.add_argument("model", choices=MODELS, help="Which sizes. (required)")
    parser.flag("--layers", int, None, "Decoder layers; by default as many as the card holds. (optional)")
    parser.flag("--seconds", int, 16, "Seconds of timed steps, at least two steps. (default: %(default)s)")
    with clear_errors():
        run(parser.parse_args(), OURS, measure, COLUMNS, compare)
