"""What the comparison tables hold: rows and why not more, labels, turns, lengths, models, overlap.

In    comparison tables (all of artifacts/data/ by default) and the manifests beside them, where there are any
Out   tables in the terminal; artifacts/data/summary.json and summary-rows.png, -labels, -characters, -tokens
Run   python data_prep/summary.py --checkpoint gemma9b       (100,000 comparisons: minutes, with all cores)

Lengths are of whole comparisons: prompt and both answers, all turns. Tokens are those of one training
sequence (format PAB, chat markup included), whole and as cut to --conversation-tokens.
"""

import os
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path

import numpy as np
import polars as pl

from common.console import cli, say, show_table
from common.data.chats import stable_key
from common.data.sources.find import find_tables
from common.data.sources.made import JOINED
from common.data.table import LABELS, TEXTS, is_labelled, labels_array, read_comparisons
from common.files import read_json, write_json
from common.report.pictures import character_lengths, kept_rows, label_shares, lengths
from common.runs import manifest_path

DATA = Path("artifacts/data")
NUM_MODELS = 10
NUM_BINS = 48


@dataclass(frozen=True, kw_only=True)
class Args:
    """A summary of comparison tables, with pictures."""

    input: tuple[Path, ...] = ()
    """Comparison tables; default: all of artifacts/data/."""
    output: Path = DATA
    """Folder of summary.json and the pictures."""
    checkpoint: str | None = None
    """Checkpoint (folder, short name or hub id) whose tokenizer counts tokens; none: they are not counted."""
    conversation_tokens: int = 4096
    """Budget in tokens of the conversation, as in a recipe."""
    skip_bad_rows: bool = False
    """Leave bad rows of the tables out instead of stopping."""


def main(args: Args) -> None:
    prompters = None
    if args.checkpoint:
        # the tokenizer's own threads; set before its first batch, and only where nobody has decided
        os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
        from common.token_lengths import count_tokens, load_prompters  # torch and all: seconds to import

        prompters = load_prompters(args.checkpoint, args.conversation_tokens)
    tables, arrays, prompts = {}, {}, []
    for path in args.input or find_tables(DATA):
        frame, _ = read_comparisons(path, skip_bad_rows=args.skip_bad_rows)
        name = path.stem if path.stem not in tables else str(path)
        tables[name] = {"path": str(path), **summarise(frame), **read_counts(path, len(frame))}
        arrays[name] = {"characters": characters_of(frame)["comparison"]}
        if prompters:
            whole, cut = count_tokens(frame, *prompters)
            tables[name]["tokens"] = describe_tokens(whole, cut)
            arrays[name]["tokens"] = cut
        prompts.append(frame.select("source", prompt=stable_key(pl.col("prompt"))).unique())
    overlap = count_overlap(pl.concat(prompts).unique())
    found = {"tables": tables, "overlap": overlap}
    if args.checkpoint:
        found |= {"checkpoint": args.checkpoint, "conversation_tokens": args.conversation_tokens}
    show(tables, overlap, args.conversation_tokens)
    write_json(args.output / "summary.json", found)
    names = draw(args.output, tables, arrays, args.conversation_tokens)
    say(f"{args.output / 'summary.json'}, {', '.join(names)}")


def summarise(frame: pl.DataFrame) -> dict[str, object]:
    """Counts of one table that need no tokenizer; JSON values.

    Returns:
        `sources` (name -> rows), `prompts` (different ones), `labels` (`labelled` rows, and the `shares` of
        A, B, tie in their weight, or null), `turns` (as `describe`, and `counts`: turns -> rows),
        `characters` (`prompt`, `answers`, `comparison`, each as `describe`), `num_models`, and `models` (name
        -> appearances on either side, the `NUM_MODELS` most often met).
    """
    labelled = frame.filter(is_labelled())
    shares = labels_array(labelled).mean(axis=0, dtype=np.float64).tolist() if len(labelled) else None
    turns = frame["prompt"].list.len()
    models = Counter(pl.concat([frame["model_a"], frame["model_b"]]).drop_nulls().to_list())
    return {
        "sources": dict(frame["source"].value_counts().sort("source").iter_rows()),
        "prompts": frame.select(stable_key(pl.col("prompt")).n_unique()).item(),
        "labels": {"labelled": len(labelled), "shares": shares},
        "turns": {
            **describe(turns.to_numpy()),
            "counts": {str(n): count for n, count in sorted(Counter(turns.to_list()).items())},
        },
        "characters": {name: describe(values) for name, values in characters_of(frame).items()},
        "num_models": len(models),
        "models": dict(sorted(models.items(), key=lambda item: (-item[1], item[0]))[:NUM_MODELS]),
    }


def characters_of(frame: pl.DataFrame) -> dict[str, np.ndarray]:
    """Characters of the prompt, of both answers, and of the whole comparison, each int64 [comparisons]."""
    prompt, a, b = (
        frame.select(pl.col(name).list.eval(pl.element().str.len_chars()).list.sum().cast(pl.Int64))
        .to_series()
        .to_numpy()
        for name in TEXTS
    )
    return {"prompt": prompt, "answers": a + b, "comparison": prompt + a + b}


def describe(values: np.ndarray) -> dict[str, float]:
    """Mean, median, the value that 5 % exceed, and the largest one."""
    return {
        "mean": float(values.mean()),
        "median": float(np.median(values)),
        "p95": float(np.quantile(values, 0.95)),
        "max": int(values.max()),
    }


def read_counts(path: Path, num_rows: int) -> dict[str, object]:
    """Rows `read`, `rejected` and `dropped` (by reason) as in the table's manifest, or null; and `kept`.

    Raises:
        ValueError: The manifest speaks of another number of rows than the table has.
    """
    manifest = manifest_path(path)
    if not manifest.is_file():
        return {"read": None, "rejected": None, "dropped": None, "kept": num_rows}
    counts = read_json(manifest).get("counts", {})
    if counts.get("kept") != num_rows:
        raise ValueError(
            f"{manifest} says {counts.get('kept')} comparisons, {path} has {num_rows}; make the table again, "
            "or delete the manifest if the table was changed on purpose"
        )
    return {name: counts[name] for name in ("read", "rejected", "dropped", "kept")}


def describe_tokens(whole: np.ndarray, cut: np.ndarray) -> dict[str, object]:
    """Tokens a comparison before the cut, and which shares of comparisons and of tokens the budget takes."""
    return {
        **describe(whole),
        "total": int(whole.sum()),
        "comparisons_cut": float((cut < whole).mean()),
        "tokens_cut": float(1 - cut.sum() / whole.sum()),
    }


def count_overlap(prompts: pl.DataFrame) -> list[dict[str, object]]:
    """Different prompts that two sources have in common: all pairs of sources, zeros too.

    Args:
        prompts: `source`, `prompt` (a key), no row twice.
    """
    pairs = prompts.join(prompts, on="prompt", suffix="_other").filter(
        pl.col("source") < pl.col("source_other")
    )
    counts = {(one, other): n for one, other, n in pairs.group_by("source", "source_other").len().iter_rows()}
    sources = prompts["source"].unique().sort().to_list()
    return [
        {"source": one, "other_source": other, "prompts": counts.get((one, other), 0)}
        for one, other in combinations(sources, 2)
    ]


def show(tables: Mapping[str, Mapping], overlap: list[dict[str, object]], conversation_tokens: int) -> None:
    """Prints everything, a line a table."""
    rows = [
        (name, *(_number(value) for value in (f["read"], f["kept"], f["prompts"], f["num_models"])))
        for name, f in tables.items()
    ]
    show_table("comparison tables", ("table", "rows read", "kept", "prompts", "models"), rows)
    reasons = [
        (name, f"{what}: {reason}", f"{-count:,}")
        for name, found in tables.items()
        for part, what in (("rejected", "bad"), ("dropped", "dropped"))
        for reason, count in (found[part] or {}).items()
        if count
    ]
    if reasons:
        show_table("rows not kept", ("table", "why", "rows"), reasons)
    rows = [
        (name, _number(found["labels"]["labelled"]), *_percentages(found["labels"]["shares"]))
        for name, found in tables.items()
    ]
    show_table("votes", ("table", "labelled", "A %", "B %", "tie %"), rows)
    lengths = [
        (name, what, f"{n['mean']:,.2f}" if what == "turns" else f"{n['mean']:,.0f}", *_quantiles(n))
        for name, found in tables.items()
        for what, n in _lengths(found).items()
    ]
    show_table("lengths of a comparison", ("table", "of what", "mean", "median", "95 %", "most"), lengths)
    if cut := {name: found["tokens"] for name, found in tables.items() if "tokens" in found}:
        rows = [(name, f"{n['comparisons_cut']:.2%}", f"{n['tokens_cut']:.2%}") for name, n in cut.items()]
        title = (
            f"cut by a budget of {conversation_tokens:,} tokens a conversation (tokens: of a PAB sequence)"
        )
        show_table(title, ("table", "comparisons", "tokens"), rows)
    models = [(name, *_most_often(found["models"])) for name, found in tables.items() if found["models"]]
    if models:
        show_table("models most often met", ("table", "1st", "2nd", "3rd"), models)
    if overlap:
        rows = [(f"{one['source']} and {one['other_source']}", f"{one['prompts']:,}") for one in overlap]
        show_table("prompts in common", ("sources", "prompts"), rows)


def _number(value: int | None) -> str | None:
    return None if value is None else f"{value:,}"


def _percentages(shares: list[float] | None) -> list[str | None]:
    return [f"{100 * share:.1f}" for share in shares] if shares else [None] * len(LABELS)


def _lengths(found: Mapping) -> dict[str, Mapping]:
    characters = {f"characters, {part}": numbers for part, numbers in found["characters"].items()}
    return {
        "turns": found["turns"],
        **characters,
        **({"tokens": found["tokens"]} if "tokens" in found else {}),
    }


def _quantiles(numbers: Mapping[str, float]) -> tuple[str, str, str]:
    return f"{numbers['median']:,.0f}", f"{numbers['p95']:,.0f}", f"{numbers['max']:,}"


def _most_often(models: Mapping[str, int]) -> list[str | None]:
    named = [f"{name} ({count:,})" for name, count in list(models.items())[:3]]
    return [*named, None, None, None][:3]


def draw(
    folder: Path, tables: Mapping[str, Mapping], arrays: Mapping[str, Mapping], conversation_tokens: int
) -> list[str]:
    """Draws what there is to draw; returns the pictures' names."""
    kept_rows(folder / "summary-rows.png", {name: _rows_of(found) for name, found in tables.items()})
    character_lengths(
        folder / "summary-characters.png", {name: found["characters"] for name, found in arrays.items()}
    )
    names = ["summary-rows.png", "summary-characters.png"]
    if labels := {n: f["labels"]["shares"] for n, f in tables.items() if f["labels"]["labelled"]}:
        label_shares(folder / "summary-labels.png", labels)
        names.append("summary-labels.png")
    if tokens := {name: found["tokens"] for name, found in arrays.items() if "tokens" in found}:
        panels = {}
        for name, values in tokens.items():
            counts, edges = np.histogram(values, bins=NUM_BINS, range=(0, values.max() + 1))
            note = f"{tables[name]['tokens']['comparisons_cut']:.1%} cut"
            panels[name] = {"edges": edges, "counts": counts, "budget": conversation_tokens, "note": note}
        lengths(folder / "summary-tokens.png", panels)
        names.append("summary-tokens.png")
    return names


def _rows_of(found: Mapping) -> dict[str, int]:
    """Raw rows by what became of them; one that is the second half of a comparison was kept."""
    dropped = dict(found["dropped"] or {})
    joined = dropped.pop(JOINED, 0)
    return {
        "kept": found["kept"] + joined,
        "dropped": sum(dropped.values()),
        "rejected": sum((found["rejected"] or {}).values()),
    }


if __name__ == "__main__":
    cli(main)
