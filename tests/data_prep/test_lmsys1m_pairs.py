"""Pairs out of single conversations: exact beside a slow version, the same in every order, bad inputs."""

import gzip
import json
import random
import sys
from collections import Counter, defaultdict
from pathlib import Path
from tempfile import TemporaryDirectory

import polars as pl
import pytest
import xxhash
from helpers import few_or_many, make_comparisons
from hypothesis import given, settings
from hypothesis import strategies as st

from common.data.chats import MESSAGES, NOT_ALTERNATING
from common.data.sources import Raw
from common.data.sources.made import EXCLUDED, JOINED, prompt_keys
from common.data.table import REJECTED_SCHEMA, SCHEMA, content_hashes, read_comparisons, write_comparisons
from common.files import read_json
from common.runs import manifest_path
from data_prep import lmsys1m_pairs
from data_prep.lmsys1m_pairs import INPUT_SCHEMA, Args, choose_pairs, gather, main, read_light

SCRIPT = "data_prep/lmsys1m_pairs.py"
SEED = 42
REASONS = [
    NOT_ALTERNATING,
    "repeated conversation",
    "model already in the group",
    "left without a partner",
    EXCLUDED,
    JOINED,
]
PYTHON_TYPES = {"conversation_id": pl.String, "model": pl.String, "conversation": MESSAGES}


def chat(*contents: str | None) -> list[dict]:
    """user, assistant, user, ..."""
    return [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(contents)]


def as_raw(rows: list[tuple], num_files: int = 1) -> Raw:
    """Rows (id, model, chat) as `open_raw` gives them."""
    frame = pl.DataFrame(rows, schema=PYTHON_TYPES, orient="row")
    files = [frame[i * len(frame) // num_files : (i + 1) * len(frame) // num_files] for i in range(num_files)]
    placed = [
        file.with_columns(pl.lit(f"{i}.parquet").alias("file"), pl.int_range(pl.len()).alias("row")).lazy()
        for i, file in enumerate(files)
    ]
    return Raw(
        frame=pl.concat(placed),
        rejected=pl.DataFrame(schema=REJECTED_SCHEMA),
        names=tuple(f"{i}.parquet" for i in range(num_files)),
        row_unit="row",
        notes={},
    )


def pairs_of(
    rows: list[tuple],
    excluded: list[list] = (),
    *,
    seed: int = SEED,
    skip_bad_rows: bool = False,
    num_files: int = 1,
) -> tuple[pl.DataFrame, dict[str, int], pl.DataFrame]:
    """(comparisons, dropped, rejected) without any file."""
    raw = as_raw(rows, num_files)
    light, report = read_light(raw, skip_bad_rows=skip_bad_rows)
    with TemporaryDirectory() as scratch:
        others = Path(scratch) / "others.parquet"
        pl.DataFrame({"prompt": excluded}, schema={"prompt": SCHEMA["prompt"]}).write_parquet(others)
        chosen, dropped = choose_pairs(light, prompt_keys([others]), seed=seed)
        return gather(raw.frame, chosen, Path(scratch)), dropped, report.rejected


def write(path: Path, rows: list[tuple]) -> Path:
    pl.DataFrame(rows, schema=PYTHON_TYPES, orient="row").write_parquet(path)
    return path


# The slow obvious version: plain Python, one conversation at a time. Only the hash is shared, computed here.


def hashed(seed: int, *texts: str) -> bytes:
    text = f"{seed};" + "".join(f"{len(one.encode())}:{one}" for one in texts)
    return xxhash.xxh3_128_digest(text.encode())


def is_alternating(messages: list[dict]) -> bool:
    roles = [message["role"] if message else None for message in messages]
    return bool(roles) and roles == ["user", "assistant"] * (len(roles) // 2)


def slow_bad(rows: list[tuple]) -> set[int]:
    bad = {i for i, (key, model, messages) in enumerate(rows) if not key or not model or messages is None}
    contents = defaultdict(list)
    for i, (key, model, messages) in enumerate(rows):
        if i not in bad and (model, messages) not in contents[key]:
            contents[key].append((model, messages))
    return bad | {i for i, row in enumerate(rows) if i not in bad and len(contents[row[0]]) > 1}


def slow_pairs(rows: list[tuple], excluded: list[list], seed: int) -> tuple[list[dict], list[int]]:
    bad = slow_bad(rows)
    good = [row for i, row in enumerate(rows) if i not in bad]
    regular = [row for row in good if is_alternating(row[2])]
    regular.sort(key=lambda row: hashed(seed, row[0]))
    different, seen = [], []
    for key, model, messages in regular:
        prompt = [message["content"] for message in messages if message["role"] == "user"]
        reply = [message["content"] for message in messages if message["role"] == "assistant"]
        if (prompt, reply) not in seen:
            seen.append((prompt, reply))
            different.append((key, model, prompt, reply))
    groups: list[tuple[list, dict]] = []
    for key, model, prompt, reply in different:
        models = next((models for other, models in groups if other == prompt), None)
        if models is None:
            models = {}
            groups.append((prompt, models))
        models.setdefault(model, (key, reply))
    found, num_of_models, num_left, num_excluded = [], 0, 0, 0
    for prompt, models in groups:
        order = sorted(models, key=lambda model: hashed(seed, models[model][0], model))
        num_of_models += len(order)
        num_left += len(order) % 2
        for a, b in zip(order[0::2], order[1::2], strict=False):
            if prompt in excluded:
                num_excluded += 2
                continue
            (key_a, reply_a), (key_b, reply_b) = models[a], models[b]
            name = key_a.replace("%", "%25").replace("-", "%2D") + "-" + key_b
            found.append(
                dict.fromkeys(SCHEMA, None)
                | {"id": name, "source": "lmsys1m", "model_a": a, "model_b": b}
                | {"prompt": prompt, "response_a": reply_a, "response_b": reply_b}
            )
    counts = [
        len(good) - len(regular),
        len(regular) - len(different),
        len(different) - num_of_models,
        num_left,
        num_excluded,
        len(found),
    ]
    return sorted(found, key=lambda row: row["id"].encode()), counts


TURN = st.sampled_from(["a", "b", "ab", "", "1:a", None])
PROMPT = st.sampled_from(
    [["a"], ["b"], ["a", "b"], ["ab"], [None], [""], ["a", None], *([t] for t in "cdefgh")]
)
MESSAGE = st.one_of(
    st.none(),
    st.fixed_dictionaries({"role": st.sampled_from(["user", "assistant", "system", None]), "content": TURN}),
)

ODD = st.builds(lambda role, text: [{"role": role, "content": text}], st.sampled_from(["user", "x"]), TURN)


@st.composite
def some_chat(draw) -> list[dict] | None:
    """Mostly one of few prompts with one of few answers, so that everything repeats."""
    kind = draw(st.integers(0, 19))
    if kind == 0:
        return draw(st.one_of(st.none(), st.lists(MESSAGE, max_size=3)))
    if kind == 1:  # repeats with little difference, in roles or contents alone
        return draw(ODD)
    prompt = draw(PROMPT)
    return chat(*(turn for pair in zip(prompt, (draw(TURN) for _ in prompt), strict=True) for turn in pair))


@st.composite
def some_rows(draw) -> list[tuple]:
    models = st.sampled_from(["m1", "m2", "m3", "m4", "m5"])
    rows = [
        (f"{'-%x'[i % 3]}{i}", draw(models), messages)
        for i, messages in enumerate(draw(few_or_many(some_chat())))
    ]
    for i in draw(st.lists(st.integers(0, len(rows) - 1), max_size=3)):  # the same id again
        key, model, messages = rows[i]
        kind = draw(st.integers(0, 4))
        rows.append((key, draw(models) if kind == 1 else model, draw(some_chat()) if kind == 2 else messages))
    for i in range(draw(st.integers(0, 2))):  # the same id for two that differ in roles or contents alone
        rows += [(f"odd{i}", "m1", draw(ODD)) for _ in range(2)]
    if draw(st.integers(0, 9)) == 0:
        rows.append(
            (draw(st.sampled_from([None, "", "k"])), draw(st.sampled_from([None, "", "m1"])), chat("a", "b"))
        )
    return draw(st.permutations(rows))


def check_exact(rows: list[tuple], excluded: list[list], seed: int) -> None:
    bad = slow_bad(rows)
    if len(bad) == len(rows):
        with pytest.raises(ValueError, match="No row is good"):
            pairs_of(rows, excluded, seed=seed, skip_bad_rows=True)
        return
    frame, dropped, rejected = pairs_of(rows, excluded, seed=seed, skip_bad_rows=True)
    expected, counts = slow_pairs(rows, excluded, seed)
    assert frame.schema == SCHEMA
    assert frame.to_dicts() == expected
    assert list(dropped) == REASONS
    assert list(dropped.values()) == counts
    assert rejected["row"].to_list() == sorted(bad)
    assert frame["id"].is_unique().all()
    assert len(rows) - len(bad) - sum(counts) == len(frame)


@settings(max_examples=140, deadline=None)
@given(rows=some_rows(), excluded=st.lists(PROMPT, max_size=2), seed=st.integers(0, 3))
def test_exactly_as_the_slow_version(rows, excluded, seed):
    check_exact(rows, excluded, seed)


@pytest.mark.parametrize(
    ("name", "wrong"),
    [
        (
            "user_turns",
            lambda chat: pl.col(chat).list.eval(pl.element().struct.field("content")).list.head(1),
        ),
        ("seeded_order", lambda seed, *columns: pl.int_range(pl.len()).cast(pl.String).cast(pl.Binary)),
        ("alternates", lambda chat: pl.col(chat).list.len() > 0),
        ("prompt_keys", lambda paths: pl.Series([], dtype=pl.Binary)),
    ],
)
def test_a_wrong_part_would_be_noticed(name, wrong, monkeypatch):
    """First turns alone, row order, no check of roles, no exclusion: the exactness test tells."""
    draw = random.Random(0)
    rows = [
        (
            f"k{i}",
            f"m{draw.randint(1, 5)}",
            chat(draw.choice("ab"), "x", draw.choice("cd"), str(draw.randint(1, 8))),
        )
        for i in range(60)
    ]
    rows += [("odd", "m1", [{"role": "system", "content": "a"}, {"role": "assistant", "content": "b"}])]
    check_exact(rows, [["a", "c"]], SEED)
    monkeypatch.setattr(lmsys1m_pairs.chats if name != "prompt_keys" else sys.modules[__name__], name, wrong)
    with pytest.raises(AssertionError):
        check_exact(rows, [["a", "c"]], SEED)


def test_identical_answers_cannot_meet():
    """The first rule implies it: of conversations with equal turns on both sides one is left."""
    rows = [(f"k{i}", f"m{i}", chat("Hi", "Hello")) for i in range(4)]
    frame, dropped, _ = pairs_of(rows)
    assert frame.is_empty()
    assert dropped["repeated conversation"] == 3
    frame, _, _ = pairs_of([*rows, ("k4", "m4", chat("Hi", "Hey"))])
    assert len(frame) == 1
    assert sorted(frame.select("response_a", "response_b").row(0)) == [["Hello"], ["Hey"]]


def test_an_odd_model_is_left_out_and_each_is_used_once():
    rows = [(f"k{i}", f"m{i % 5}", chat("Hi", f"answer {i}")) for i in range(50)]
    frame, dropped, _ = pairs_of(rows)
    assert len(frame) == 2
    models = frame["model_a"].to_list() + frame["model_b"].to_list()
    assert len(set(models)) == 4
    assert list(dropped.values()) == [0, 0, 45, 1, 0, 2]
    assert frame.select(pl.col("winner_model_a", "winner_tie", "fold").null_count().sum()).row(0) == (2, 2, 2)


def test_who_is_a_does_not_depend_on_how_often_a_model_occurs():
    """A model with nine conversations a prompt is A as often as one with a single one."""
    rows = [
        (f"{p}-{i}", "often" if i else "once", chat(f"prompt {p}", f"answer {i}"))
        for p in range(1000)
        for i in range(10)
    ]
    counts = Counter(pairs_of(rows)[0]["model_a"])
    assert counts.total() == 1000
    assert 420 < counts["often"] < 580  # five standard deviations; taking the choice's order gives 900


def test_ids_with_hyphens_name_one_pair():
    rows = [(key, f"m{i}", chat(f"p{i // 2}", f"r{i}")) for i, key in enumerate(["x-y", "z", "x", "y-z"])]
    for seed in range(16):  # in some seeds both pairs would be x-y-z
        assert pairs_of(rows, seed=seed)[0]["id"].n_unique() == 2
    hexadecimal = pairs_of([("0a", "m1", chat("p", "1")), ("0b", "m2", chat("p", "2"))])[0]
    assert hexadecimal["id"].item() in ("0a-0b", "0b-0a")


def many_rows(count: int = 4000) -> list[tuple]:
    draw = random.Random(1)
    rows = [
        (
            f"id{i}",
            f"m{draw.randint(0, 6)}",
            chat(f"é {draw.randint(0, count // 6)}", draw.choice(["x", None, str(i)])),
        )
        for i in range(count)
    ]
    return [*rows, ("odd", "m1", chat("a")), rows[0]]


def test_the_same_in_any_row_order_and_any_cut_into_files():
    rows = many_rows()
    expected, dropped, _ = pairs_of(rows)
    assert len(expected) > 500
    for i in range(4):
        random.Random(i).shuffle(rows)
        frame, again, _ = pairs_of(rows, num_files=i + 1)
        assert frame.equals(expected)
        assert again == dropped
    assert not pairs_of(rows, seed=7)[0].equals(expected)


def test_the_same_in_memory_and_streamed(monkeypatch):
    rows = many_rows(500)
    expected = pairs_of(rows)[0]
    collect = pl.LazyFrame.collect
    monkeypatch.setattr(
        pl.LazyFrame, "collect", lambda self, engine="auto": collect(self, engine="in-memory")
    )
    assert pairs_of(rows)[0].equals(expected)


def run_main(tmp_path: Path, *inputs: Path, **changes) -> Path:
    output = tmp_path / "out" / "pairs.parquet"
    main(Args(input=tuple(str(path) for path in inputs), output=output, **changes))
    return output


def test_a_run_writes_a_table_and_a_manifest_and_is_then_up_to_date(tmp_path, capsys):
    rows = many_rows(600)
    source = write(tmp_path / "in.parquet", rows)
    excluded = make_comparisons(3)
    prompt = pairs_of(rows)[0]["prompt"][0].to_list()
    excluded = excluded.with_columns(
        prompt=pl.Series([prompt, *excluded["prompt"][1:].to_list()], dtype=SCHEMA["prompt"]),
        response_a=pl.Series([["a"], *excluded["response_a"][1:].to_list()], dtype=SCHEMA["prompt"]),
        response_b=pl.Series([["b"], *excluded["response_b"][1:].to_list()], dtype=SCHEMA["prompt"]),
    )
    other = tmp_path / "other.parquet"
    write_comparisons(excluded, other)
    output = run_main(tmp_path, source, exclude=(other,))
    frame, _ = read_comparisons(output)
    assert frame.equals(pairs_of(rows, [prompt])[0])
    assert prompt not in frame["prompt"].to_list()
    assert not (content_hashes(frame).is_duplicated()).any()
    counts = read_json(manifest_path(output))["counts"]
    assert list(counts["dropped"]) == REASONS
    assert counts["read"] - sum(counts["dropped"].values()) == counts["kept"] == len(frame)
    assert counts["dropped"][EXCLUDED] > 0

    before = output.stat().st_mtime_ns
    capsys.readouterr()
    run_main(tmp_path, source, exclude=(other,))
    assert "up to date" in capsys.readouterr().out
    assert output.stat().st_mtime_ns == before
    with pytest.raises(ValueError, match="--overwrite"):
        run_main(tmp_path, source)
    run_main(tmp_path, source, overwrite=True)
    assert output.stat().st_mtime_ns != before
    with pytest.raises(ValueError, match="seed"):
        run_main(tmp_path, source, seed=1)


BAD = [
    (None, "m1", chat("p", "1")),
    ("k1", None, chat("p", "2")),
    ("k2", "m1", None),
    ("k3", "m1", chat("p", "3")),
    ("k3", "m1", chat("p", "4")),
    ("k4", "m1", chat("p", "5")),
    ("k4", "m2", chat("p", "5")),
]
GOOD = [("g1", "m1", chat("q", "1")), ("g2", "m2", chat("q", "2"))]


def test_bad_rows_stop_the_run_or_are_left_out_and_listed(tmp_path):
    source = write(tmp_path / "in.parquet", [*BAD, *GOOD])
    with pytest.raises(ValueError, match="7 of 9 rows") as caught:
        run_main(tmp_path, source)
    for text in (
        "in.parquet row 0, id missing",
        "row 1, id k1",
        "absent: model",
        "2 different",
        "--skip-bad-rows",
    ):
        assert text in str(caught.value)
    assert not (tmp_path / "out").exists()
    output = run_main(tmp_path, source, skip_bad_rows=True)
    assert len(read_comparisons(output)[0]) == 1
    rejected = pl.read_parquet(output.with_suffix(".rejected.parquet"))
    assert rejected.schema == REJECTED_SCHEMA
    assert rejected["row"].to_list() == list(range(7))
    assert rejected["reason"].to_list() == ["something is absent"] * 3 + ["repeated id"] * 4
    assert read_json(manifest_path(output))["counts"]["rejected"] == {
        "repeated id": 4,
        "something is absent": 3,
    }


def test_json_lines(tmp_path):
    source = tmp_path / "in.jsonl.gz"
    rows = [dict(zip(INPUT_SCHEMA, row, strict=True)) | {"turn": 1} for row in many_rows(300)]
    with gzip.open(source, "wt", encoding="utf-8") as file:
        file.writelines(json.dumps(row) + "\n" for row in rows)
    assert read_comparisons(run_main(tmp_path, source))[0].equals(pairs_of(many_rows(300))[0])
    with gzip.open(source, "at", encoding="utf-8") as file:
        file.write('{"conversation_id": "cut off')
    with pytest.raises(ValueError, match=r"in.jsonl.gz line 303, id missing: malformed JSON"):
        run_main(tmp_path, source, overwrite=True)


def break_in_the_middle(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[40 : len(data) // 2] = b"\xff" * (len(data) // 2 - 40)
    path.write_bytes(data)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda path: path.write_bytes(path.read_bytes()[:-20]), "cannot be read"),
        (break_in_the_middle, "cannot be read"),
        (lambda path: path.write_bytes(b""), "empty"),
        (lambda path: path.unlink(), "does not exist"),
        (lambda path: write(path, []), "no conversation in it"),
        (lambda path: pl.read_parquet(path).drop("model").write_parquet(path), "lacks the column model"),
        (
            lambda path: pl.read_parquet(path).with_columns(conversation=pl.lit("x")).write_parquet(path),
            "malformed JSON: conversation",
        ),
        (lambda path: write(path, GOOD[:1]), "no pair among 1 conversations"),
    ],
)
def test_a_bad_input_is_named_and_the_old_output_stays(tmp_path, damage, message):
    source = write(tmp_path / "in.parquet", many_rows(1000))
    output = run_main(tmp_path, source)
    before = output.read_bytes(), manifest_path(output).read_bytes()
    damage(source)
    with pytest.raises(ValueError, match=message) as caught:
        run_main(tmp_path, source, overwrite=True)
    assert "in.parquet" in str(caught.value)
    assert (output.read_bytes(), manifest_path(output).read_bytes()) == before


def test_other_mistakes(tmp_path):
    source = write(tmp_path / "in.parquet", GOOD)
    with pytest.raises(ValueError, match=r"--exclude .*absent\.parquet is not a file"):
        run_main(tmp_path, source, exclude=(tmp_path / "absent.parquet",))
    with pytest.raises(ValueError, match="the column prompt is not there, expected"):
        run_main(tmp_path, source, exclude=(source,))
    with pytest.raises(ValueError, match=r"ends in .parquet"):
        Args(output=Path("x.csv"))
    (tmp_path / "out").write_text("a file, no folder")
    with pytest.raises(ValueError, match="cannot write"):
        run_main(tmp_path, source)


def half_written(self: pl.DataFrame, path: Path, **_) -> None:
    Path(path).write_bytes(b"PAR1")
    raise KeyboardInterrupt


def interrupted(*_, **__) -> None:
    raise KeyboardInterrupt


@pytest.mark.parametrize("moment", ["choosing", "gathering", "writing"])
def test_an_interrupted_run_leaves_the_old_files(tmp_path, monkeypatch, moment):
    source = write(tmp_path / "in.parquet", GOOD)
    output = run_main(tmp_path, source)
    before = {path: path.read_bytes() for path in output.parent.iterdir()}
    if moment == "writing":
        monkeypatch.setattr(pl.DataFrame, "write_parquet", half_written)
    else:
        name = {"choosing": "choose_pairs", "gathering": "gather"}[moment]
        monkeypatch.setattr(lmsys1m_pairs, name, interrupted)
    with pytest.raises(KeyboardInterrupt):
        run_main(tmp_path, source, seed=1, overwrite=True)
    assert {path: path.read_bytes() for path in output.parent.iterdir()} == before
    monkeypatch.undo()
    run_main(tmp_path, source)  # still up to date
