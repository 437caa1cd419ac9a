"""The one training loop: forward, backward, step, with a state to resume from."""

import time
from collections.abc import Sequence

import numpy as np
import torch
import torch.distributed as dist
from accelerate import Accelerator
from torch import nn
from torch.utils.data import DataLoader

from common.batching import VarlenCollator, plan_micro_batches
from common.console import progress, say
from common.models.head import PreferenceHead
from common.runs import Run
from common.tokens import Sequences
from common.train.launch import is_fsdp
from common.train.memory import clear_out_of_memory, find_budget, ways_out
from common.train.optim import GradientSum, KahanOptimizer, learning_rate, soft_cross_entropy
from common.train.recipe import Recipe, Training


def plan_steps(num_rows: int, recipe: Recipe) -> np.ndarray:
    """Which comparisons each optimiser step takes: shuffled every epoch, the last incomplete step dropped.

    Returns:
        int64 [num_steps, comparisons_per_step], indices of comparisons.

    Raises:
        ValueError: Fewer comparisons than one step takes.
    """
    per_step = recipe.comparisons_per_step
    steps_per_epoch = num_rows // per_step
    if steps_per_epoch == 0:
        raise ValueError(
            f"{num_rows} comparisons do not fill one optimiser step of {per_step}; "
            "lower --comparisons-per-step"
        )
    epochs = [
        np.random.default_rng((recipe.seed, epoch)).permutation(num_rows)[: steps_per_epoch * per_step]
        for epoch in range(recipe.epochs)
    ]
    return np.concatenate(epochs).reshape(-1, per_step)


def num_never_taken(num_rows: int, recipe: Recipe) -> int:
    """Comparisons that no step takes: in every epoch they fell into the last incomplete one."""
    return num_rows - len(np.unique(plan_steps(num_rows, recipe)))


def sequences_of(rows: np.ndarray, sequences: Sequences) -> np.ndarray:
    """Indices of all variants of the comparisons `rows`: they are trained on in the same step."""
    starts = np.searchsorted(sequences.row, rows, side="left")
    ends = np.searchsorted(sequences.row, rows, side="right")
    return np.concatenate([np.arange(start, end) for start, end in zip(starts, ends, strict=True)])


def draw_kept(head: PreferenceHead, indices: Sequence[int], *, step: int, seed: int) -> torch.Tensor:
    """What the head's dropouts keep of some sequences, drawn for each from (seed, step, its index) alone.

    So it is the same in whichever micro-batch and on whichever rank a sequence stands.

    Returns:
        bool [S, E] on the CPU; one row for a filler where `indices` is empty.
    """
    kept = []
    for index in indices or [0]:
        generator = torch.Generator().manual_seed(_seed(seed, step, index))
        kept.append(torch.rand(sum(head.widths), generator=generator) >= head.dropout)
    return torch.stack(kept)


def fit(
    model: nn.Module,
    sequences: Sequences,
    *,
    recipe: Recipe,
    training: Training,
    run: Run,
    accelerator: Accelerator,
) -> None:
    """Trains `model` in place, from the newest saved state of `run` if there is one.

    The loss of a step is the soft cross entropy summed over its sequences / their number over all ranks, and
    dropout is drawn a sequence at a time, so the result does not depend on how the step is cut.

    Args:
        model: Placed by `common.train.launch.place`.

    Raises:
        ValueError: A loss or gradient is not finite; the comparisons are named, no weight is changed. Or the
            memory does not suffice; states that were saved stay.
    """
    rank, world_size, device = accelerator.process_index, accelerator.num_processes, accelerator.device
    sharded = is_fsdp(accelerator)
    with clear_out_of_memory(f"for gradient sums and optimiser states. {ways_out()}", device=device):
        gradients = GradientSum(model, accumulation=recipe.accumulation, is_replica=not sharded)
        optimizer = KahanOptimizer(
            model.named_parameters(),
            name=recipe.optimizer,
            betas=(recipe.beta1, recipe.beta2),
            eps=recipe.eps,
            weight_decay=recipe.weight_decay,
            kahan_sum=recipe.kahan_sum,
        )
    state = {f"model.{name}": p.detach() for name, p in model.named_parameters()}
    state |= {f"optimizer.{name}": tensor for name, tensor in optimizer.tensors().items()}
    first = max(run.saved_steps(), default=0)
    if first:
        run.load_state(first, state)
        say(f"continuing after step {first}")
    if accelerator.is_main_process:
        run.keep_metrics_until(first)

    model.train()
    budget = find_budget(
        model, training, longest=int(sequences.lengths.max()), device=device, is_sharded=sharded
    )
    steps = [sequences_of(rows, sequences) for rows in plan_steps(len(sequences.frame), recipe)]
    plans = [_plan(step, sequences, rank, world_size, budget.tokens) for step in steps[first:]]
    batches = iter(
        DataLoader(
            sequences,
            batch_sampler=[micro_batch for plan in plans for micro_batch in plan],
            collate_fn=VarlenCollator(),
            num_workers=1 if device.type == "cuda" else 0,
            pin_memory=device.type == "cuda",
        )
    )

    def where() -> str:
        lengths, num_layers = sequences.lengths[micro_batch].tolist(), len(model.model.layers)
        saved = max(run.saved_steps(), default=0)
        return (
            f"in step {step + 1} on process {rank}, in a micro-batch of {sum(lengths):,} tokens (the longest "
            f"sequence {max(lengths, default=1):,}, the budget {budget.tokens:,}) with {recompute} of "
            f"{num_layers} layers recomputed. {ways_out(lengths, recompute, num_layers)}. "
            + (f"The state after step {saved} is kept" if saved else "No state was saved yet")
        )

    bar = progress("training", len(steps), "steps", start=first)
    with clear_out_of_memory(where, device=device), bar as advance:
        for step, (indices, plan) in enumerate(zip(steps[first:], plans, strict=True), start=first):
            began = time.perf_counter()
            # FSDP averages gradients over ranks; sums are wanted.
            scale = (world_size if sharded else 1) / len(indices)
            losses, rows = [], []
            torch.manual_seed(_seed(recipe.seed, step, len(sequences) + rank))  # stochastic rounding draws
            for micro_batch in plan:
                recompute = budget.recompute(int(sequences.lengths[micro_batch].sum()))
                packed = next(batches).to(device)
                kept_SE = draw_kept(model.head, micro_batch, step=step, seed=recipe.seed)
                if device.type == "cuda":
                    kept_SE = kept_SE.pin_memory().to(device, non_blocking=True)
                logits_SC = model(packed, kept_SE=kept_SE, recompute=recompute)
                loss_S = soft_cross_entropy(logits_SC, packed.labels_SC)
                (loss_S.sum() * scale).backward()
                losses.append(loss_S.detach())
                rows.append(packed.row_S)
            gradients.reduce()
            norm = gradients.norm()
            loss = _mean_loss(torch.cat(losses), torch.cat(rows), norm, len(indices), sequences, step)
            if recipe.max_grad_norm is not None:
                gradients.scale((recipe.max_grad_norm / (norm + 1e-6)).clamp(max=1.0))
            lr = learning_rate(step, len(steps), recipe.lr)
            optimizer.step(gradients, lr=lr)

            seconds = time.perf_counter() - began
            tokens = int(sequences.lengths[indices].sum())
            record = {"step": step + 1, "loss": loss, "lr": lr, "grad_norm": float(norm)}
            record |= {"tokens": tokens, "tokens_per_second": round(tokens / seconds, 1)}
            if accelerator.is_main_process:
                run.log(record)
            accelerator.log({k: v for k, v in record.items() if k != "step"}, step=step + 1)
            advance(1, f"loss {loss:.4f}, {tokens / seconds:,.0f} tokens/s")
            if (step + 1) % training.state_interval_steps == 0 or step + 1 == len(steps):
                run.save_state(
                    step + 1,
                    state,
                    keep=training.keep_states,
                    is_writer=accelerator.is_main_process,
                    barrier=accelerator.wait_for_everyone,
                )


def _plan(
    indices: np.ndarray, sequences: Sequences, rank: int, world_size: int, max_tokens: int
) -> list[list[int]]:
    """This rank's micro-batches of one step, as indices into `sequences`."""
    lengths = sequences.lengths[indices].tolist()
    plan = plan_micro_batches(lengths, world_size, max_tokens)[rank]
    return [indices[micro_batch].tolist() for micro_batch in plan]


def _seed(*parts: int) -> int:
    """One seed of several numbers that say where it is used: a resumed run draws the same."""
    return int(np.random.SeedSequence(parts).generate_state(1, np.uint64)[0])


def _mean_loss(
    loss_S: torch.Tensor,
    row_S: torch.Tensor,
    norm: torch.Tensor,
    num_sequences: int,
    sequences: Sequences,
    step: int,
) -> float:
    """Mean loss of the step over all ranks; if it is not finite, all stop before the weights change."""
    total = torch.stack([loss_S.nansum(), (~loss_S.isfinite()).sum().float(), (~norm.isfinite()).float()])
    if dist.is_initialized():
        dist.all_reduce(total)
    loss, num_bad, bad_norm = total.tolist()
    if num_bad or bad_norm:
        own = sorted({int(row) for row in row_S[~loss_S.isfinite()]})
        everyone: Sequence[list[int]] = [own]
        if dist.is_initialized():
            everyone = [None] * dist.get_world_size()
            dist.all_gather_object(everyone, own)
        rows = sorted({row for of_rank in everyone for row in of_rank if row >= 0})
        names = [sequences.name(row) for row in rows]
        raise ValueError(
            f"step {step + 1}: the {'loss' if num_bad else 'gradient'} is not finite"
            + (f" for {', '.join(names[:10])} ({len(names)} comparisons)" if names else "")
            + "; the weights were not changed. Look at those rows, or lower --lr"
        )
    return loss / num_sequences
