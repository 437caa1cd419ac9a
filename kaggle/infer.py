"""The notebook's entry: test.csv -> submission.csv, from the bundle alone, without network.

In    the bundle that this file lies in (manifest.json, code/, models/); test.csv
Out   submission.csv: every id of test.csv in its order, three probabilities that sum to 1
Run   python code/infer.py --test /kaggle/input/lmsys-chatbot-arena/test.csv --output submission.csv

On a CPU it computes in fp32, on any number of GPUs in fp16. A row that cannot be read gets the prior, a
model whose logits are not finite for a row is left out of that row's mean; both are counted and named.
"""

import argparse
import queue
import sys
import threading
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from pathlib import Path
from typing import NamedTuple

sys.dont_write_bytecode = True  # the bundle stays as it was hashed

import numpy as np
import polars as pl
import torch

from bundle_manifest import NUM_SHOWN, read_bundle
from common.batching import length_sorted_micro_batches, pack
from common.console import clear_errors, progress, say, show_table
from common.data.table import LABELS, ORDERS, TEXTS, write_table
from common.data.votes_csv import LONE_SURROGATE, BadRowError, check_header, parse_texts, read_rows
from common.files import read_json
from common.models import PreferenceModel, load_model
from common.prompts import Prompter
from common.score.metrics import mirror, rescale
from common.trained import open_prompter

DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32}
BF16_CAPABILITY = (8, 0)
ROWS_PER_CHUNK = 512

Comparison = tuple[list[str | None], list[str | None], list[str | None]]


class TestSet(NamedTuple):
    """test.csv as it stands: one entry a row."""

    ids: list[str]
    comparisons: list[Comparison | None]
    """Turns of prompt and both answers; None where the row cannot be read."""
    reasons: list[str | None]
    """Why a row cannot be read."""


def main(args: argparse.Namespace) -> None:
    devices = find_devices(args.devices)
    dtype = choose_dtype(args.dtype, devices)
    manifest = read_bundle(args.bundle)
    test = read_test(args.test)
    rows = [row for row, comparison in enumerate(test.comparisons) if comparison is not None]
    comparisons = [test.comparisons[row] for row in rows]
    where = f"{', '.join(map(str, devices))} in {str(dtype).removeprefix('torch.')}"
    say(f"{len(test.ids):,} rows, {len(rows):,} readable; computed on {where}")
    found, details = {}, {}
    for entry in manifest["models"] if rows else ():
        orders = ORDERS if (order := args.order or entry["order"]) == "both" else (order,)
        by_order, input_ids = predict_model(
            args.bundle, entry, comparisons, orders, devices, dtype, args.max_tokens_per_micro_batch
        )
        report_not_finite(entry["name"], by_order, [test.ids[row] for row in rows])
        found[entry["name"]] = mean_of_finite(list(by_order.values()), [1.0] * len(by_order))
        details[entry["name"]] = (by_order, input_ids)
    answers = np.tile(np.array(manifest["prior"]), (len(test.ids), 1))
    num_without_model = 0
    if rows:
        answers[rows], num_without_model = answer(list(found.values()), manifest)
    report(test, num_without_model)
    write_submission(args.output, test.ids, answers)
    if args.details is not None:
        write_details(args.details, test, rows, details)
    say(f"{args.output}: {len(test.ids):,} rows")


def read_test(path: Path) -> TestSet:
    """Reads test.csv; a row that is no comparison stays, with the reason.

    Raises:
        ValueError: The file is absent, empty, cut off within a quote, or lacks a column.
    """
    test = TestSet([], [], [])
    with closing(read_rows(path)) as rows:
        _, header = next(rows, (1, []))
        check_header(header, path)
        id_column = header.index("id")
        for line, cells in rows:
            if isinstance(cells, BadRowError):  # whose ids cannot be known, nor answered
                raise ValueError(f"{path} line {line}: {': '.join(cells.args)} Get it again")
            comparison, reason = None, None
            try:
                texts, _ = parse_texts(header, cells)
                comparison = tuple(texts[name] for name in TEXTS)
                turns = {len(part) for part in comparison}
                if len(turns) > 1:
                    comparison, reason = None, "unequal turn counts"
                elif turns == {0}:
                    comparison, reason = None, "no turns"
            except BadRowError as bad:
                reason = bad.args[0]
            key = cells[id_column] if id_column < len(cells) else ""
            test.ids.append(LONE_SURROGATE.sub("\N{REPLACEMENT CHARACTER}", key))  # no CSV holds half of one
            test.comparisons.append(comparison)
            test.reasons.append(reason)
    if not test.ids:
        raise ValueError(f"{path} has a header and no row; expected the comparisons to answer")
    return test


def find_devices(names: Sequence[str]) -> list[torch.device]:
    """The devices named, or every GPU, or the CPU.

    Raises:
        ValueError: A device is not there.
    """
    gpus = [f"cuda:{i}" for i in range(torch.cuda.device_count())]
    names = names or gpus or ["cpu"]
    for name in names:
        if name not in (*gpus, "cpu"):
            raise ValueError(f"--devices {name} is not here; found {', '.join((*gpus, 'cpu'))}")
    return [torch.device(name) for name in names]


def choose_dtype(name: str, devices: Sequence[torch.device]) -> torch.dtype:
    """fp32 on a CPU, fp16 on GPUs ("auto"); bf16 only if asked for and every GPU computes in it.

    By compute capability: `torch.cuda.is_bf16_supported()` says yes on a T4, which emulates it.
    """
    gpus = [device for device in devices if device.type == "cuda"]
    if name == "auto":
        return torch.float16 if len(gpus) == len(devices) else torch.float32
    for device in gpus:
        if name == "bf16" and (found := torch.cuda.get_device_capability(device)) < BF16_CAPABILITY:
            raise ValueError(
                f"--dtype bf16: {device} has compute capability {found[0]}.{found[1]}, bf16 needs 8.0; "
                "take fp16"
            )
    return DTYPES[name]


def predict_model(
    bundle: Path,
    entry: dict,
    comparisons: Sequence[Comparison],
    orders: Sequence[str],
    devices: Sequence[torch.device],
    dtype: torch.dtype,
    max_tokens: int,
) -> tuple[dict[str, np.ndarray], dict[str, list[np.ndarray]]]:
    """One model's probabilities and token ids by order.

    Returns:
        order -> float64 [comparisons, classes], swapped ones swapped back, NaN where a logit is not finite;
        order -> int32 token ids of every comparison.
    """
    folder = bundle / entry["folder"]
    prompter = open_prompter(str(folder), read_json(folder / "preference.json"))
    if prompter.template_hash != entry["template_hash"]:
        raise ValueError(
            f"{folder}: template and tokenizer are {prompter.template_hash[:12]}, the manifest says "
            f"{entry['template_hash'][:12]}: build the bundle again"
        )
    input_ids = tokenise(prompter, comparisons, entry["format"], orders, entry["name"])
    logits = run_replicas(
        lambda device: load_model(folder, dtype=dtype, device=device),
        [sequence for order in orders for sequence in input_ids[order]],
        devices=devices,
        max_tokens=max_tokens,
        description=entry["name"],
    )
    logits[~np.isfinite(logits).all(axis=1)] = np.nan
    powers = np.exp(logits - logits.max(axis=1, keepdims=True))
    by_order = dict(
        zip(orders, np.split(powers / powers.sum(axis=1, keepdims=True), len(orders)), strict=True)
    )
    return {
        order: mirror(values) if order == "swapped" else values for order, values in by_order.items()
    }, input_ids


def tokenise(
    prompter: Prompter, comparisons: Sequence[Comparison], format: str, orders: Sequence[str], name: str
) -> dict[str, list[np.ndarray]]:
    """order -> int32 token ids of every comparison."""
    input_ids: dict[str, list[np.ndarray]] = {order: [] for order in orders}
    with progress(f"{name}: tokenising", len(comparisons), "comparisons") as advance:
        for start in range(0, len(comparisons), ROWS_PER_CHUNK):
            chunk = prompter.tokenise(comparisons[start : start + ROWS_PER_CHUNK])
            for order in orders:
                rendered = (prompter.render(c, format=format, swapped=order == "swapped") for c in chunk)
                input_ids[order] += [np.array(found.input_ids, dtype=np.int32) for found in rendered]
            advance(len(chunk))
    return input_ids


@torch.no_grad()
def run_replicas(
    load: Callable[[torch.device], PreferenceModel],
    sequences: Sequence[np.ndarray],
    *,
    devices: Sequence[torch.device],
    max_tokens: int,
    description: str,
) -> np.ndarray:
    """Logits of every sequence, by one full replica a device; each device takes the next micro-batch.

    Whoever splits a model over devices replaces this one function: same arguments, same result.

    Args:
        load: Device -> model in evaluation mode.
        sequences: Token ids, int.
        devices: One or more.
        max_tokens: Tokens of one micro-batch.

    Returns:
        float64 [sequences, classes], as the model saw them.

    Raises:
        ValueError: A device has too little memory.
    """
    micro_batches: queue.SimpleQueue[list[int]] = queue.SimpleQueue()
    for micro_batch in length_sorted_micro_batches([len(ids) for ids in sequences], max_tokens):
        micro_batches.put(micro_batch)
    logits = np.full((len(sequences), len(LABELS)), np.nan)
    lock = threading.Lock()

    def work(device: torch.device) -> None:
        try:
            model = load(device)
            while True:
                try:
                    indices = micro_batches.get_nowait()
                except queue.Empty:
                    return
                with torch.no_grad():  # a thread has a grad mode of its own
                    found_SC = model(pack([sequences[i] for i in indices]).to(device)).cpu().numpy()
                logits[indices] = found_SC
                with lock:
                    advance(1)
        except torch.OutOfMemoryError as error:
            raise ValueError(
                f"{description} does not fit {device} with micro-batches of {max_tokens:,} tokens; pass a "
                f"smaller --max-tokens-per-micro-batch ({error})"
            ) from error

    with (
        progress(f"{description}: predicting", micro_batches.qsize(), "micro-batches") as advance,
        ThreadPoolExecutor(len(devices)) as pool,
    ):
        for future in [pool.submit(work, device) for device in devices]:
            future.result()
    return logits


def mean_of_finite(values: Sequence[np.ndarray], weights: Sequence[float]) -> np.ndarray:
    """Weighted mean of those values that are numbers, float64 [rows, classes]; NaN where none is."""
    stacked = np.stack(values)
    is_finite = np.isfinite(stacked).all(axis=2)
    weight = np.asarray(weights)[:, None] * is_finite
    total = weight.sum(axis=0)
    mean = (np.where(is_finite[..., None], stacked, 0.0) * weight[..., None]).sum(axis=0)
    return mean / np.where(total > 0, total, np.nan)[:, None]


def answer(models: Sequence[np.ndarray], manifest: dict) -> tuple[np.ndarray, int]:
    """The ensemble, rescaled where the manifest says so; the prior, counted, where no model has a number."""
    mean = mean_of_finite(models, [entry["weight"] for entry in manifest["models"]])
    is_answered = np.isfinite(mean).all(axis=1)
    if manifest["scaling"] is not None and is_answered.any():
        mean[is_answered] = rescale(mean[is_answered], **manifest["scaling"])
    mean[~is_answered] = manifest["prior"]
    return mean, int((~is_answered).sum())


def report_not_finite(name: str, by_order: dict[str, np.ndarray], ids: Sequence[str]) -> None:
    """Names the rows that a model has no number for."""
    for order, values in by_order.items():
        bad = np.flatnonzero(~np.isfinite(values).all(axis=1))
        if len(bad):
            shown = ", ".join(repr(ids[i]) for i in bad[:NUM_SHOWN])
            say(
                f"{name}, {order} order: logits are not finite for {len(bad):,} rows, ids {shown}"
                f"{', ...' if len(bad) > NUM_SHOWN else ''}: these rows do without it"
            )


def report(test: TestSet, num_without_model: int) -> None:
    """Prints what was answered how."""
    reasons = Counter(reason for reason in test.reasons if reason is not None)
    rows = [("by the models", len(test.ids) - reasons.total() - num_without_model)]
    rows += [(f"with the prior: {reason}", count) for reason, count in sorted(reasons.items())]
    rows += [("with the prior: no model has finite logits", num_without_model)] if num_without_model else []
    show_table("rows answered", ("how", "rows"), [(how, f"{count:,}") for how, count in rows])


def write_submission(path: Path, ids: Sequence[str], answers: np.ndarray) -> None:
    """Writes id and three probabilities that sum to 1, atomically."""
    answers = answers / answers.sum(axis=1, keepdims=True)
    assert np.isfinite(answers).all()
    columns = {name: answers[:, i] for i, name in enumerate(LABELS)}
    write_table(pl.DataFrame({"id": pl.Series(ids, dtype=pl.String), **columns}), path)


def write_details(
    path: Path,
    test: TestSet,
    rows: Sequence[int],
    details: dict[str, tuple[dict[str, np.ndarray], dict[str, list[np.ndarray]]]],
) -> None:
    """Writes, for the readable rows, every model's probabilities and token ids by order (Parquet)."""
    columns = {"row": pl.Series(rows, dtype=pl.Int64), "id": [test.ids[row] for row in rows]}
    for name, (by_order, input_ids) in details.items():
        for order, values in by_order.items():
            columns |= {f"{name}/{order}/{label}": values[:, i] for i, label in enumerate(LABELS)}
            columns[f"{name}/{order}/input_ids"] = pl.Series(input_ids[order], dtype=pl.List(pl.Int32))
    write_table(pl.DataFrame(columns), path)


def parse_arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--test", type=Path, required=True, help="CSV: id, prompt, response_a, response_b")
    parser.add_argument("--output", type=Path, default=Path("submission.csv"), help="CSV to write")
    parser.add_argument("--bundle", type=Path, default=Path(__file__).resolve().parent.parent)
    parser.add_argument(
        "--devices", nargs="+", default=[], help="such as cuda:0 cuda:1; default: all GPUs or cpu"
    )
    parser.add_argument(
        "--dtype", choices=("auto", *DTYPES), default="auto", help="auto: fp16 on GPUs, fp32 on cpu"
    )
    parser.add_argument(
        "--order", choices=(*ORDERS, "both"), help="of every model, in place of the manifest's"
    )
    parser.add_argument(
        "--max-tokens-per-micro-batch", type=int, default=16_384, help="tokens a device at a time"
    )
    parser.add_argument("--details", type=Path, help="Parquet for every model's probabilities and token ids")
    args = parser.parse_args()
    if args.max_tokens_per_micro_batch < 1:
        parser.error(
            f"--max-tokens-per-micro-batch is {args.max_tokens_per_micro_batch}, expected at least 1"
        )
    return args


if __name__ == "__main__":
    with clear_errors():
        main(parse_arguments())
