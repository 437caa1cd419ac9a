"""The notebook's entry: test.csv -> submission.csv, from the bundle alone, without network.

In    the bundle that this file lies in (manifest.json, code/, models/); test.csv
Out   submission.csv: every id of test.csv in its order, three probabilities that sum to 1
Run   python code/infer.py --test /kaggle/input/lmsys-chatbot-arena/test.csv --output submission.csv

On a CPU it computes in fp32, on any number of GPUs in fp16. A row that cannot be read gets the prior, where
these are no more than --max-unreadable-share; a model whose logits are not finite for a row is left out of
that row's mean; both are counted and named.
"""

import argparse
import queue
import sys
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from pathlib import Path
from typing import NoReturn

sys.dont_write_bytecode = True  # the bundle stays as it was hashed

import numpy as np
import polars as pl
import torch

from bundle_manifest import read_bundle
from common.batching import length_sorted_micro_batches, pack
from common.console import clear_errors, progress, say
from common.data.table import LABELS, NUM_SHOWN, ORDERS, TEXTS, write_table
from common.data.votes_csv import LONE_SURROGATE, BadRowError, check_header, parse_texts, read_rows
from common.models import PreferenceModel, load_model, read_preference, use_threads
from common.prompts import Prompter
from common.score.metrics import mirror, rescale
from common.trained import open_prompter

DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32}
BF16_CAPABILITY = (8, 0)
ROWS_PER_CHUNK = 512
MAX_UNREADABLE_SHARE = 0.05
"""A handful of rows that a writer broke; above it another separator or encoding has broken the file."""

Comparison = tuple[list[str | None], list[str | None], list[str | None]]


def main(args: argparse.Namespace) -> None:
    devices = find_devices(args.devices)
    dtype = choose_dtype(args.dtype, devices)
    manifest = read_bundle(args.bundle)
    ids, found = read_test(args.test)
    check_readable(args.test, ids, found, args.max_unreadable_share)
    rows = [row for row, comparison in enumerate(found) if not isinstance(comparison, str)]
    comparisons, readable_ids = [found[row] for row in rows], [ids[row] for row in rows]
    where = f"{', '.join(map(str, devices))} in {str(dtype).removeprefix('torch.')}, {use_threads()}"
    say(f"{len(ids):,} rows, {len(rows):,} readable; computed on {where}")
    means, details = [], {"row": rows, "id": readable_ids}
    for entry in manifest["models"] if rows else ():
        orders = ORDERS if (order := args.order or entry["order"]) == "both" else (order,)
        by_order, input_ids = predict_model(
            args.bundle, entry, comparisons, orders, devices, dtype, args.max_tokens_per_micro_batch
        )
        report_not_finite(entry["name"], by_order, readable_ids)
        means.append(mean_of_finite(list(by_order.values()), [1.0] * len(by_order)))
        for order, values in by_order.items():
            group = f"{entry['name']}/{order}"
            details |= {f"{group}/{label}": values[:, i] for i, label in enumerate(LABELS)}
            details[f"{group}/input_ids"] = pl.Series(input_ids[order], dtype=pl.List(pl.Int32))
    answers, num_without_model = np.tile(np.array(manifest["prior"]), (len(ids), 1)), 0
    if rows:
        answers[rows], num_without_model = answer(means, manifest)
    report([reason for reason in found if isinstance(reason, str)], len(ids), num_without_model)
    write_submission(args.output, ids, answers)
    if args.details is not None:
        write_table(pl.DataFrame(details, schema_overrides={"row": pl.Int64, "id": pl.String}), args.details)
    say(f"{args.output}: {len(ids):,} rows")


def read_test(path: Path) -> tuple[list[str], list[Comparison | str]]:
    """The ids of test.csv and, for each, its comparison or why there is none.

    Raises:
        ValueError: The file is absent, empty, cut off within a quote, or lacks a column.
    """
    ids, found = [], []
    with closing(read_rows(path)) as rows:
        _, header = next(rows, (1, []))
        check_header(header, path)
        id_column = header.index("id")
        for line, cells in rows:
            if isinstance(cells, BadRowError):  # whose ids cannot be known, nor answered
                raise ValueError(f"{path} line {line}: {': '.join(cells.args)} Get it again")
            key = cells[id_column] if id_column < len(cells) else ""
            ids.append(LONE_SURROGATE.sub("\N{REPLACEMENT CHARACTER}", key))  # no CSV holds half of one
            found.append(read_comparison(header, cells))
    if not ids:
        raise ValueError(f"{path} has a header and no row; expected the comparisons to answer")
    return ids, found


def read_comparison(header: Sequence[str], cells: Sequence[str]) -> Comparison | str:
    """Turns of prompt and both answers, or why the row holds none."""
    try:
        texts, _ = parse_texts(header, cells)
    except BadRowError as bad:
        return bad.args[0]
    turns = {len(texts[name]) for name in TEXTS}
    if len(turns) > 1:
        return "unequal turn counts"
    return "no turns" if turns == {0} else tuple(texts[name] for name in TEXTS)


def check_readable(path: Path, ids: Sequence[str], found: Sequence[object], max_share: float) -> None:
    """ValueError where a larger share of the rows than `max_share` cannot be read."""
    bad = [(key, reason) for key, reason in zip(ids, found, strict=True) if isinstance(reason, str)]
    if len(bad) > max_share * len(ids):
        counts = ", ".join(
            f"{count:,} {reason}" for reason, count in Counter(r for _, r in bad).most_common()
        )
        shown = ", ".join(repr(key) for key, _ in bad[:NUM_SHOWN])
        raise ValueError(
            f"{path}: {len(bad):,} of {len(ids):,} rows cannot be read, more than --max-unreadable-share "
            f"{max_share:g} allows: {counts}; first ids {shown}. "
            "Mend the file, or say --max-unreadable-share 1 to answer every such row with the prior"
        )


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
    prompter = open_prompter(str(folder), read_preference(folder))
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
    probabilities = np.split(powers / powers.sum(axis=1, keepdims=True), len(orders))
    by_order = dict(zip(orders, probabilities, strict=True))
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
    micro_batches = length_sorted_micro_batches([len(ids) for ids in sequences], max_tokens)
    logits = np.full((len(sequences), len(LABELS)), np.nan)
    idle: queue.SimpleQueue[tuple[torch.device, PreferenceModel]] = queue.SimpleQueue()

    def predict(indices: list[int]) -> None:
        device, model = idle.get()
        try:
            with torch.no_grad():  # a thread has a grad mode of its own
                logits[indices] = model(pack([sequences[i] for i in indices]).to(device)).cpu().numpy()
        finally:
            idle.put((device, model))

    with (
        progress(f"{description}: predicting", len(micro_batches), "micro-batches") as advance,
        ThreadPoolExecutor(len(devices)) as pool,
    ):
        try:
            for replica in zip(devices, pool.map(load, devices), strict=True):
                idle.put(replica)
            for _ in pool.map(predict, micro_batches):
                advance(1)
        except torch.OutOfMemoryError as error:
            raise ValueError(
                f"{description} does not fit {', '.join(map(str, devices))} with micro-batches of "
                f"{max_tokens:,} tokens; pass a smaller --max-tokens-per-micro-batch ({error})"
            ) from error
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


def report(reasons: Sequence[str], num_rows: int, num_without_model: int) -> None:
    """Prints what was answered how."""
    priors = sorted(Counter(reasons).items())
    priors += [("no model has finite logits", num_without_model)] if num_without_model else []
    told = ", ".join(f"{count:,} {reason}" for reason, count in priors)
    by_models = num_rows - len(reasons) - num_without_model
    say(f"{by_models:,} rows answered by the models" + (f"; with the prior: {told}" if told else ""))


def write_submission(path: Path, ids: Sequence[str], answers: np.ndarray) -> None:
    """Writes id and three probabilities that sum to 1, atomically."""
    answers = answers / answers.sum(axis=1, keepdims=True)
    assert np.isfinite(answers).all()
    columns = {name: answers[:, i] for i, name in enumerate(LABELS)}
    write_table(pl.DataFrame({"id": pl.Series(ids, dtype=pl.String), **columns}), path)


class Parser(argparse.ArgumentParser):
    """Argparse, whose complaint is an error as any other's: one line and status 1."""

    def error(self, message: str) -> NoReturn:
        raise ValueError(f"{message}; {self.prog} --help lists the flags")


def parse_arguments() -> argparse.Namespace:
    """The command line, with argparse: the notebook has no tyro.

    Raises:
        ValueError: It cannot be understood.
    """
    parser = Parser(description=__doc__.splitlines()[0], allow_abbrev=False)
    add = parser.add_argument
    here = Path(__file__).resolve().parent.parent
    text = "CSV to answer: id, prompt, response_a, response_b. (required)"
    add("--test", metavar="PATH", type=Path, required=True, help=text)
    text = "CSV to write. (default: %(default)s)"
    add("--output", metavar="PATH", type=Path, default=Path("submission.csv"), help=text)
    text = "Folder of the bundle; by default the one that this file lies in. (optional)"
    add("--bundle", metavar="PATH", type=Path, default=here, help=text)
    text = "Devices, such as cuda:0 cuda:1; by default all GPUs, or else cpu. (optional)"
    add("--devices", metavar="NAME", nargs="+", default=[], help=text)
    text = "Dtype of the computation; auto: fp16 on GPUs, fp32 on a CPU. (default: %(default)s)"
    add("--dtype", choices=("auto", *DTYPES), default="auto", help=text)
    text = "Order of the answers, for every model; by default the manifest's of each. (optional)"
    add("--order", choices=(*ORDERS, "both"), help=text)
    text = "Tokens per device per micro-batch. (default: %(default)s)"
    add("--max-tokens-per-micro-batch", metavar="INT", type=int, default=16_384, help=text)
    text = "Share of rows, 0 to 1, that may be unreadable and get the prior. (default: %(default)s)"
    add("--max-unreadable-share", metavar="FLOAT", type=float, default=MAX_UNREADABLE_SHARE, help=text)
    text = "Parquet to write with every model's probabilities and token ids. (optional)"
    add("--details", metavar="PATH", type=Path, help=text)
    args = parser.parse_args()
    if args.max_tokens_per_micro_batch < 1:
        parser.error(f"--max-tokens-per-micro-batch {args.max_tokens_per_micro_batch}: expected at least 1")
    if not 0 <= args.max_unreadable_share <= 1:
        parser.error(f"--max-unreadable-share {args.max_unreadable_share}: expected 0 to 1")
    return args


if __name__ == "__main__":
    with clear_errors():
        main(parse_arguments())
