"""Planted duplicates are found, all of them and nothing else; which side is listed; and the script itself."""

import csv
import json
import random
from collections import Counter, defaultdict
from functools import cache
from itertools import pairwise
from pathlib import Path

import numpy as np
import polars as pl
import pytest
from helpers import read_competition_file, run_script
from hypothesis import given, settings
from hypothesis import strategies as st

from common.data.near_duplicates import PAIRS_PER_CHUNK, jaccard, near_pairs, rows_per_band, shingles
from common.data.sources.find import find_tables
from common.data.sources.made import without_prompts
from common.data.table import SCHEMA, read_comparisons, swap, write_comparisons
from data_prep.competition import with_folds
from data_prep.leak_check import KINDS, LEAK_COLUMNS, Args, find_leaks, main, read_keys

ROOT = Path(__file__).resolve().parents[2]
REAL = ROOT.parent / "shared" / "data" / "arena_1000"
NUM_PLANTED = 60


def words(draw: random.Random, count: int) -> str:
    return " ".join(f"w{draw.randrange(20_000)}" for _ in range(count))


def table(rows: list[tuple], source: str) -> pl.DataFrame:
    """Rows of (id, prompt, response_a, response_b, fold)."""
    full = [
        (key, source, None, None, prompt, a, b, None, None, None, fold) for key, prompt, a, b, fold in rows
    ]
    return pl.DataFrame(full, schema=SCHEMA, orient="row")


def one(key: str, prompt: str | list, a: str = "yes", b: str = "no", fold: int | None = None) -> tuple:
    prompt = prompt if isinstance(prompt, list) else [prompt]
    return key, prompt, [a] * len(prompt), [b] * len(prompt), fold


def search(folder: Path, *frames: pl.DataFrame, test: Path | None = None, **options):
    paths = []
    for i, frame in enumerate(frames):
        paths.append(folder / f"{i}.parquet")
        write_comparisons(frame, paths[-1])
    rows, texts = read_keys(tuple(paths), test)
    return find_leaks(rows, texts, **{"near_threshold": 0.8, **options})


def numbers(counts: pl.DataFrame, source: str, other: str) -> dict[str, int]:
    (row,) = counts.filter(source=source, other_source=other).select(KINDS).to_dicts()
    return {kind: number for kind, number in row.items() if number}


def keys(leaks: pl.DataFrame, kind: str) -> set[tuple]:
    found = leaks.filter(kind=kind)
    return set(found.select("id", "other_id").iter_rows())


@pytest.fixture(scope="module")
def planted():
    """900 comparisons, and another source that holds 60 of each kind among 600 of its own."""
    draw = random.Random(0)
    base = table(
        [
            one(f"a{i}", [words(draw, 25), words(draw, 25)], words(draw, 5), words(draw, 5))
            for i in range(900)
        ],
        "base",
    )
    other = [table([one(f"own{i}", words(draw, 40)) for i in range(600)], "other")]
    chosen = base.sample(4 * NUM_PLANTED, seed=1, shuffle=True)
    parts = [chosen[i * NUM_PLANTED : (i + 1) * NUM_PLANTED] for i in range(4)]
    changes = {
        "exact": lambda frame: frame,
        "swapped": swap,
        "prompt": lambda frame: frame.with_columns(response_b=pl.col("response_b").list.eval(pl.lit("else"))),
        # 2 words of 50 changed: 45 or 46 shingles of 53 or 52 shared
        "near": lambda frame: frame.with_columns(
            prompt=pl.col("prompt").list.eval(pl.element().str.replace(r"w\d+$", "changed"))
        ),
    }
    for (kind, change), part in zip(changes.items(), parts, strict=True):
        named = change(part).with_columns(id=pl.format(f"{kind}-{{}}", "id"), source=pl.lit("other"))
        other.append(named.select(SCHEMA.names()))
    return base, pl.concat(other)


def test_planted_duplicates_are_found_and_nothing_else(tmp_path, planted):
    counts, leaks = search(tmp_path, *planted)
    assert numbers(counts, "base", "base") == numbers(counts, "other", "other") == {}
    found = numbers(counts, "base", "other")
    for kind in ("exact", "swapped", "prompt", "near"):
        truth = {(key, key.split("-")[1]) for key in planted[1]["id"] if key.startswith(kind)}
        listed = keys(leaks, kind)
        recall, precision = len(truth & listed) / len(truth), len(truth & listed) / len(listed)
        assert precision == 1
        assert recall == 1 if kind != "near" else recall >= 0.95
        assert found[kind] == len(listed)
    assert leaks.filter(pl.col("kind") != "near")["similarity"].unique().to_list() == [1.0]
    assert leaks.filter(kind="near")["similarity"].is_between(0.8, 0.95).all()


def test_a_higher_threshold_finds_no_near_ones(tmp_path, planted):
    counts, _ = search(tmp_path, *planted, near_threshold=0.95)
    assert numbers(counts, "base", "other") == {"exact": 60, "swapped": 60, "prompt": 60}


def test_the_order_of_rows_changes_nothing(tmp_path, planted):
    before = search(tmp_path, *planted)
    after = search(tmp_path, *(frame.sample(fraction=1, shuffle=True, seed=2) for frame in planted))
    for one_frame, other in zip(before, after, strict=True):
        assert one_frame.equals(other)


def kinds_of(one_row: dict, other: dict, threshold: float) -> list[str]:
    """The kinds of one pair, in the order of `KINDS`, by looking at it."""
    if one_row["prompt"] != other["prompt"]:
        sets = [shingle_set(tuple(row["prompt"])) for row in (one_row, other)]
        union = len(sets[0] | sets[1])
        return ["near"] if all(sets) and len(sets[0] & sets[1]) >= threshold * union else []
    answers, others = ([row["response_a"], row["response_b"]] for row in (one_row, other))
    kind = "exact" if answers == others else "swapped" if answers == others[::-1] else "prompt"
    crosses = "test.csv" not in (one_row["source"], other["source"]) and one_row["fold"] != other["fold"]
    return ["fold", kind] if crosses else [kind]


@cache
def shingle_set(prompt: tuple[str | None, ...]) -> set:
    words = " ".join(turn for turn in prompt if turn).lower().split()
    return set(pairwise(words)) if len(words) > 1 else set(words)


def slow_leaks(rows: list[dict], threshold: float, between_sources: bool) -> tuple[dict, list[tuple]]:
    """(source, other source) -> pairs by kind; and what is listed: every pair looked at, one by one."""
    counts: dict[tuple, Counter] = defaultdict(Counter)
    listed = []
    for i, row in enumerate(rows):
        partners = defaultdict(list)
        for other in rows[:i]:
            for kind in kinds_of(row, other, threshold):
                if other["source"] == row["source"] and between_sources and kind != "fold":
                    continue
                counts[tuple(sorted((other["source"], row["source"])))][kind] += 1
                partners[kind].append((other["source"], other["id"]))
        if partners and row["source"] != "test.csv":
            kinds = sorted(partners, key=KINDS.index)
            listed.append((row["source"], row["id"], kinds[0], kinds, *partners[kinds[0]][0]))
    return counts, sorted(listed)


PROMPTS = st.one_of(
    st.lists(st.sampled_from([None, "", "a", "b"]), min_size=1, max_size=2),
    st.lists(st.sampled_from("abcd"), min_size=2, max_size=6).map(lambda words: [" ".join(words)]),
)
ROWS = st.tuples(PROMPTS, st.sampled_from("xyz"), st.sampled_from("xyz"), st.sampled_from([None, 0, 1]))


@settings(max_examples=40, deadline=None)
@given(
    tables=st.lists(st.lists(ROWS, min_size=1, max_size=60), min_size=1, max_size=3),
    test=st.lists(PROMPTS, max_size=3),
    threshold=st.sampled_from([0.2, 0.25]),
    between_sources=st.booleans(),
)
def test_as_a_look_at_every_pair(tmp_path_factory, tables, test, threshold, between_sources):
    """At thresholds as low as these a band is one hash, and no pair in a million millions is missed."""
    folder = tmp_path_factory.mktemp("leaks")
    names = "tsu"  # not in the order of the alphabet: the order of the files decides
    frames = [
        table([one(f"{i:02}", *row) for i, row in enumerate(rows)], source)
        for source, rows in zip(names, tables, strict=False)
    ]
    path = None
    if test:
        prompts = {str(i): json.dumps(prompt) for i, prompt in enumerate(test) if len(prompt) == 1}
        path = write_test(folder / "test.csv", prompts) if prompts else None
    found, leaks = search(
        folder, *frames, test=path, near_threshold=threshold, between_sources=between_sources
    )
    rows = [row for frame in frames for row in frame.to_dicts()]
    rows.sort(key=lambda row: row["fold"] is None)  # those with a fold are kept before those without
    if path:
        asked = read_competition_file(path, source="test.csv")[0].to_dicts()
        rows = asked + rows
    counts, listed = slow_leaks(rows, threshold, between_sources)
    for source, other, *numbers in found.iter_rows():
        pair = counts[tuple(sorted((source, other)))]
        assert dict(zip(KINDS, numbers, strict=True)) == {kind: pair[kind] for kind in KINDS}
    assert leaks.drop("similarity").rows() == listed


def test_fold_crossings(tmp_path):
    votes = table(
        [
            one("1", "p", fold=0),
            one("2", "p", "z", fold=0),
            one("3", "q", fold=0),
            one("4", "q", "z", fold=1),
        ],
        "votes",
    )
    pool = table([one("5", "p", "pool"), one("6", "new")], "pool")
    counts, leaks = search(tmp_path, pool, votes)
    assert numbers(counts, "votes", "votes") == {"prompt": 2, "fold": 1}
    assert numbers(counts, "pool", "votes") == {"prompt": 2, "fold": 2}
    # rows with a fold stay, though the pool's table comes first
    assert keys(leaks, "fold") == {("5", "1"), ("4", "3")}
    assert leaks.filter(id="5")["kinds"].to_list() == [["fold", "prompt"]]
    assert leaks.filter(id="2")["kind"].to_list() == ["prompt"]


def test_equal_folds_of_two_sources_do_not_cross(tmp_path):
    first = table([one("1", "p", fold=0)], "first")
    counts, _ = search(tmp_path, first, table([one("2", "p", fold=0)], "second"))
    assert numbers(counts, "first", "second") == {"exact": 1}
    counts, _ = search(tmp_path, first, table([one("2", "p", fold=1)], "second"))
    assert numbers(counts, "first", "second") == {"exact": 1, "fold": 1}


def test_between_sources_the_partner_is_in_another_one(tmp_path):
    first = table([one("1", "p", "a1")], "first")
    second = table([one("2", "p", "a2"), one("3", "p", "a3"), one("4", "q"), one("5", "q")], "second")
    _, leaks = search(tmp_path, first, second)
    assert keys(leaks, "prompt") == {("2", "1"), ("3", "1")}
    assert keys(leaks, "exact") == {("5", "4")}
    first_of_its_own = table([one("0", "p", "a1"), one("1", "p", "a1")], "second")
    _, leaks = search(tmp_path, table([one("9", "p", "a2")], "first"), first_of_its_own)
    assert keys(leaks, "exact") == {("1", "0")} and keys(leaks, "prompt") == {("0", "9")}
    counts, leaks = search(tmp_path, first, second, between_sources=True)
    assert leaks["id"].to_list() == ["2", "3"]
    assert numbers(counts, "second", "second") == {}


def test_nulls_turn_cuts_and_identical_answers(tmp_path):
    frame = table(
        [
            one("1", ["a b", "c"]),
            one("2", ["a", "b c"]),
            one("3", [None]),
            one("4", [""]),
            one("5", [None], "other"),
            one("6", "same", "x", "x"),
            one("7", "same", "x", "x"),
        ],
        "s",
    )
    counts, leaks = search(tmp_path, frame)
    # ["a b", "c"] and ["a", "b c"] read alike; a null turn is not an empty one, and neither is near anything
    assert numbers(counts, "s", "s") == {"near": 1, "prompt": 1, "exact": 1}
    assert leaks["id"].to_list() == ["2", "5", "7"]


def test_shingles_of_short_and_spaceless_texts():
    sets = shingles(
        pl.Series(["Hi", "hi!", "?!", "!?", "", "  ", "北京大学", "\uff21 b", "a B a b"])
    ).to_list()
    assert sets[0] == sets[1]
    assert sets[2] != sets[3]
    assert [len(one_set) for one_set in sets] == [1, 1, 1, 1, 0, 0, 3, 1, 2]


def test_one_word_in_twenty_is_what_the_docstring_says():
    text = [f"w{i}" for i in range(20)]
    sets = shingles(pl.Series([" ".join(text), " ".join([*text[:9], "x", *text[10:]])]))
    assert jaccard(sets, np.array([0]), np.array([1]))[0] == pytest.approx(17 / 21)


def test_bands_find_what_lies_at_the_threshold():
    assert [rows_per_band(threshold) for threshold in (0.8, 0.5, 0.2, 1.0)] == [6, 3, 1, 64]
    draw = random.Random(5)
    pairs = [[draw.sample(range(2**32), 110)] for _ in range(300)]
    sets = pl.Series(
        [sorted(ids[side : side + 100]) for (ids,) in pairs for side in (0, 10)], dtype=pl.List(pl.UInt32)
    )
    found = [
        pair for left, right, _ in near_pairs(sets, threshold=0.8) for pair in zip(left, right, strict=True)
    ]
    assert len(found) == len(set(found)), "a pair is given once"
    assert set(found) <= {(2 * i, 2 * i + 1) for i in range(300)}
    assert len(found) >= 0.99 * 300


def test_a_large_bucket_is_cut_into_chunks():
    count = 900
    sets = pl.Series([[1, 2, 3]] * count, dtype=pl.List(pl.UInt32))
    chunks = list(near_pairs(sets, threshold=0.8))
    assert sum(len(left) for left, _, _ in chunks) == count * (count - 1) // 2 > PAIRS_PER_CHUNK
    assert len(chunks) > 1
    assert max(len(left) for left, _, _ in chunks) <= PAIRS_PER_CHUNK + count


def write_test(path: Path, prompts: dict[str, str]) -> Path:
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(("id", "prompt", "response_a", "response_b"))
        writer.writerows((key, prompt, '["x"]', '["y"]') for key, prompt in prompts.items())
    return path


def test_rows_of_test_csv_are_never_listed_and_bad_ones_are_counted(tmp_path, capsys):
    test = write_test(tmp_path / "test.csv", {"1": '["p"]', "2": "broken", "3": '["p", "q"]'})
    counts, leaks = search(tmp_path, table([one("0", "p", fold=0)], "votes"), test=test)
    assert numbers(counts, "test.csv", "votes") == {"prompt": 1}
    assert leaks.row(0) == ("votes", "0", "prompt", ["prompt"], "test.csv", "1", 1.0)
    assert f"{test}: 2 bad rows are left out" in capsys.readouterr().out


def test_the_script_writes_a_table_for_exclude_and_fails_on_demand(tmp_path, capsys, planted):
    base, other = tmp_path / "base.parquet", tmp_path / "other.parquet"
    write_comparisons(planted[0], base)
    write_comparisons(planted[1], other)
    flags = {"input": (base, other), "output": tmp_path / "leaks.parquet"}
    main(Args(**flags, fail_on=("fold",)))
    assert "base and other" in capsys.readouterr().out
    leaks, _ = read_comparisons(flags["output"])
    assert leaks.columns == [*SCHEMA, *LEAK_COLUMNS]
    left, _ = without_prompts(planted[1], (flags["output"],))
    assert left["id"].str.starts_with("own").all()
    write_comparisons(left, other)
    main(Args(**flags, fail_on=KINDS))
    assert "no pair of any kind" in capsys.readouterr().out
    assert not flags["output"].exists(), "no list of earlier leaks stays"
    write_comparisons(planted[1], other)
    with pytest.raises(ValueError, match="--fail-on exact fold: pairs were found, 60 of kind exact; see "):
        main(Args(**flags, fail_on=("exact", "fold")))
    assert flags["output"].exists()


def test_the_defaults_leave_out_what_is_no_source(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    folder = Path("artifacts/data")
    with pytest.raises(ValueError, match="holds no comparison table; make one with just prep"):
        main(Args())
    write_comparisons(table([one("1", "p"), one("2", "p")], "s"), folder / "s.parquet")
    pl.DataFrame({"reason": ["x"]}).write_parquet(folder / "s.rejected.parquet")
    for _ in range(2):
        main(Args())
    read_comparisons(folder / "leaks.parquet")
    assert find_tables(folder) == (folder / "s.parquet",)


def test_mistakes_are_refused(tmp_path):
    path = tmp_path / "s.parquet"
    write_comparisons(table([one("1", "p")], "s"), path)
    copy = tmp_path / "copy.parquet"
    copy.write_bytes(path.read_bytes())
    with pytest.raises(ValueError, match="two tables hold source s id 1"):
        main(Args(input=(path, copy), output=tmp_path / "leaks.parquet"))
    with pytest.raises(ValueError, match="is both --input and --output"):
        main(Args(input=(path,), output=path))
    with pytest.raises(ValueError, match="was not written by this script"):
        main(Args(input=(path,), output=copy))
    with pytest.raises(ValueError, match=r"--near-threshold is 0\.1"):
        Args(near_threshold=0.1)


def test_the_command_line_ends_with_status_1_and_one_line(tmp_path):
    path = tmp_path / "s.parquet"
    write_comparisons(table([one("1", "p"), one("2", "p")], "s"), path)
    flags = ("--input", path, "--output", tmp_path / "leaks.parquet", "--fail-on", "exact", "swapped")
    failed = run_script("data_prep/leak_check.py", *flags)
    assert failed.returncode == 1
    assert failed.stderr.startswith("error: --fail-on exact swapped: pairs were found, 1 of kind exact")
    assert len(failed.stderr.splitlines()) == 1


@pytest.mark.skipif(not REAL.is_dir(), reason=f"the real rows are not in {REAL}")
def test_the_thousand_real_votes(tmp_path):
    frame = with_folds(read_competition_file(REAL / "train.csv")[0], num_folds=5)
    counts, leaks = search(tmp_path, frame, test=REAL / "test.csv")
    assert counts["fold"].sum() == 0, "folds keep a prompt together"
    prompts = [json.dumps(prompt) for prompt in frame["prompt"].to_list()]
    repeats = sum(n * (n - 1) // 2 for n in pl.Series(prompts).value_counts()["count"])
    same = counts.filter(source="arena55k", other_source="arena55k").select("exact", "swapped", "prompt")
    assert sum(same.row(0)) == repeats
    assert set(leaks["id"]) <= set(frame["id"])
