"""Comparisons tokenised once, ahead of time, into memory-mapped Arrow: lengths are known before training."""

from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import datasets
import numpy as np
import polars as pl
import pyarrow as pa
from accelerate import Accelerator

from common.batching import Sample, VarlenCollator
from common.console import progress
from common.data.table import ORDERS, SCHEMA, TEXTS, Order, labels_array, table_hash
from common.files import read_json, text_hash, write_json
from common.locks import lock, replacing_folder
from common.prompts import FORMATS, NO_BUDGET, Format, Prompter

Swap = Literal["full", "random", "none"]
Orders = tuple[Order, ...] | Literal["random"]
ROWS_PER_CHUNK = 512

COLUMNS = pa.schema(
    {
        "row": pa.int64(),
        "variant": pa.int8(),
        "length": pa.int32(),
        "truncated": pa.bool_(),
        "became_identical": pa.bool_(),
        "input_ids": pa.large_list(pa.int32()),
    }
)


@dataclass(frozen=True, kw_only=True)
class Sequences:
    """Tokenised variants (formats and orders) of the comparisons of one frame.

    Indexing with one number or a list gives `Sample`s; -1 is the filler of an idle rank.
    """

    frame: pl.DataFrame
    """The comparisons, sorted by (source, id): `row` counts in this order."""
    dataset: datasets.Dataset
    lengths: np.ndarray
    """int32 [sequences], tokens."""
    row: np.ndarray
    """int64 [sequences], index into `frame`."""
    variant: np.ndarray
    """int8 [sequences], 2 x format + order."""
    truncated: np.ndarray
    became_identical: np.ndarray
    labels: np.ndarray
    """float32 [rows, classes] in the given order; zeros where a comparison is unlabelled."""

    def __len__(self) -> int:
        return len(self.lengths)

    def __getitem__(self, index: int) -> Sample:
        return self.__getitems__([index])[0]

    def __getitems__(self, indices: Sequence[int]) -> list[Sample]:
        """Samples in the order of `indices`; the labels of a swapped variant are swapped."""
        indices = [int(i) for i in indices]
        if not indices:
            return []
        ids = self.dataset[indices]["input_ids"]
        return [
            Sample(tokens, self.labels_of(i), int(self.row[i]))
            for i, tokens in zip(indices, ids, strict=True)
        ]

    def labels_of(self, index: int) -> np.ndarray:
        """float32 [classes], label weights of one sequence as the model sees its answers."""
        labels = self.labels[self.row[index]]
        return labels[[1, 0, 2]] if self.variant[index] % 2 else labels

    def name(self, row: int) -> str:
        """How a person finds a comparison again: source and id."""
        source, key = self.frame.select("source", "id").row(row)
        return f"{source}/{key}"

    def rows(self, start: int, stop: int) -> "Sequences":
        """The sequences of the comparisons `start` to `stop`, rows counted from 0 again."""
        first, last = (int(i) for i in np.searchsorted(self.row, (start, stop)))
        columns = ("lengths", "variant", "truncated", "became_identical")
        return Sequences(
            frame=self.frame[start:stop],
            dataset=self.dataset.select(range(first, last)),
            row=self.row[first:last] - start,
            labels=self.labels[start:stop],
            **{name: getattr(self, name)[first:last] for name in columns},
        )


def variant_code(format: Format, order: Order) -> int:
    """2 x format + order."""
    return 2 * FORMATS.index(format) + ORDERS.index(order)


def orders_of(swap: Swap) -> Orders:
    """The orders that a recipe's `swap` trains on."""
    return {"full": ORDERS, "none": ("given",), "random": "random"}[swap]


def tokenise(
    frame: pl.DataFrame,
    prompter: Prompter,
    *,
    formats: Sequence[Format],
    orders: Orders,
    cache: Path,
    seed: int = 0,
    accelerator: Accelerator | None = None,
) -> Sequences:
    """Every comparison in every format and order, read from the cache or tokenised into it.

    Args:
        frame: Comparisons (`common.data.table.SCHEMA`); row order does not matter.
        formats: Prompt formats; each gives a variant.
        orders: Orders in which the answers are shown, or "random": one of the two by a stable hash.
        seed: For "random".
        cache: Folder of caches, each in a subfolder named by the hash of data and prompt.
        accelerator: Its first process writes, the others wait and read; None: this process is alone.

    Returns:
        Sequences in the order (source, id), format, order.
    """
    frame = frame.sort("source", "id")
    settings = (repr(tuple(formats)), repr(orders), str(seed))
    key = text_hash(table_hash(frame), rendering_hash(prompter), *settings)
    folder = cache / key[:20]
    if (accelerator is None or accelerator.is_main_process) and not (folder / "info.json").is_file():
        for left in cache.glob(".*.tmp*"):  # of runs that were killed, and that may never start again
            with suppress(ValueError), lock(cache / left.name.split(".")[1]):
                pass
        with lock(folder, wait=True):  # another stage may be tokenising the same
            if not (folder / "info.json").is_file():
                with replacing_folder(folder) as temporary:
                    _write(temporary / "tokens.arrow", frame, prompter, formats, orders, seed)
                    write_json(temporary / "info.json", {"key": key, **prompter.describe()})
    if accelerator is not None:
        accelerator.wait_for_everyone()
    return _sequences(frame, *_read(folder, key, len(frame)))


def rendering_hash(prompter: Prompter) -> str:
    """The prompt, and what this code makes of a fixed table with it: variants, their labels, the batch."""
    texts = [[str(i)] for i in range(8)]
    rows = [(str(i), "probe", None, None, *texts[i : i + 3], 0.5, 0.375, 0.125, None) for i in range(6)]
    frame = pl.DataFrame(rows, schema=SCHEMA, orient="row")
    records = [
        record
        for orders in (ORDERS, orders_of("random"))
        for record in _variants(frame, 0, prompter, FORMATS, orders, seed=0)
    ]
    dataset = datasets.Dataset(pa.Table.from_pylist(records, schema=COLUMNS)).with_format("numpy")
    sequences = _sequences(frame, dataset, {name: np.array(dataset[name]) for name in COLUMNS.names[:-1]})
    batch = VarlenCollator()(sequences.__getitems__(range(len(sequences))))
    packed = [x if isinstance(x, int) else x.tolist() for x in (*batch, sequences.variant)]
    return text_hash(prompter.prompt_hash, repr(packed))


def _sequences(frame: pl.DataFrame, dataset: datasets.Dataset, columns: dict[str, np.ndarray]) -> Sequences:
    return Sequences(
        frame=frame,
        dataset=dataset.select_columns("input_ids"),
        lengths=columns["length"],
        row=columns["row"],
        variant=columns["variant"],
        truncated=columns["truncated"],
        became_identical=columns["became_identical"],
        labels=np.nan_to_num(labels_array(frame), nan=0.0),
    )


def _read(folder: Path, key: str, num_rows: int) -> tuple[datasets.Dataset, dict[str, np.ndarray]]:
    """The cached dataset, and its columns but the tokens; ValueError where the files are damaged."""
    way_out = "delete that folder and start again: it will be tokenised anew"
    if not folder.is_dir():
        raise ValueError(
            f"{folder} is not there, though the first process has made it: every machine must see the same "
            "artifacts folder"
        )
    if read_json(folder / "info.json").get("key") != key:
        raise ValueError(f"{folder} is not the token cache that its name says; {way_out}")
    try:
        dataset = datasets.Dataset.from_file(str(folder / "tokens.arrow")).with_format("numpy")
        columns = {name: dataset.data[name].to_numpy() for name in COLUMNS.names if name != "input_ids"}
    except (OSError, KeyError, pa.ArrowException) as error:
        raise ValueError(f"{folder / 'tokens.arrow'} cannot be read: {error}; {way_out}") from error
    if (found := len(np.unique(columns["row"]))) != num_rows:
        raise ValueError(f"{folder} holds {found} of {num_rows} comparisons; {way_out}")
    return dataset, columns


def _write(
    path: Path, frame: pl.DataFrame, prompter: Prompter, formats: Sequence[Format], orders: Orders, seed: int
) -> None:
    with (
        pa.OSFile(str(path), "wb") as file,
        pa.ipc.new_stream(file, COLUMNS) as writer,
        progress("tokenising", len(frame), "comparisons") as advance,
    ):
        for start in range(0, len(frame), ROWS_PER_CHUNK):
            chunk = frame[start : start + ROWS_PER_CHUNK]
            records = list(_variants(chunk, start, prompter, formats, orders, seed))
            writer.write_batch(pa.RecordBatch.from_pylist(records, schema=COLUMNS))
            advance(len(chunk))


def _variants(
    chunk: pl.DataFrame,
    start: int,
    prompter: Prompter,
    formats: Sequence[Format],
    orders: Orders,
    seed: int,
) -> Iterator[dict[str, object]]:
    texts = chunk.select(TEXTS).rows()
    keys = chunk.select("source", "id").rows()
    for i, (comparison, key) in enumerate(zip(prompter.tokenise(texts), keys, strict=True)):
        for format in formats:
            for order in (_random_order(seed, *key),) if orders == "random" else orders:
                rendered = prompter.render(comparison, format=format, swapped=order == "swapped")
                yield {
                    "row": start + i,
                    "variant": variant_code(format, order),
                    "length": len(rendered.input_ids),
                    **rendered._asdict(),
                }


def _random_order(seed: int, source: str, key: str) -> Order:
    """One of the two orders, by a hash that neither row order nor process changes."""
    return ORDERS[int(text_hash(str(seed), source, key)[0], 16) % 2]


def count_tokens(frame: pl.DataFrame, prompter: Prompter) -> tuple[np.ndarray, np.ndarray]:
    """Tokens of each comparison as a PAB sequence, whole and as the prompter's budget cuts it.

    Returns:
        Two arrays, int64 [comparisons].
    """
    whole = Prompter(prompter.tokenizer, conversation_tokens=NO_BUDGET)
    counts = []
    with progress("tokenising", len(frame), "comparisons") as advance:
        for chunk in frame.select(TEXTS).iter_slices(ROWS_PER_CHUNK):
            for tokenised in whole.tokenise(chunk.rows()):
                counts.append([len(one.render(tokenised).input_ids) for one in (whole, prompter)])
            advance(len(chunk))
    before, after = np.array(counts, dtype=np.int64).T
    return before, after
