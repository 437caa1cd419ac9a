"""Tokenised once: what names a cache, what is read back, and what a damaged one does."""

import fcntl
import json
from types import SimpleNamespace

import numpy as np
import polars as pl
import pyarrow as pa
import pytest
from helpers import HELD, held_elsewhere, make_comparisons

from common import tokens
from common.batching import VarlenCollator
from common.data.table import ORDERS, labels_array
from common.prompts import FORMATS, Prompter
from common.tokens import count_tokens, orders_of, tokenise, variant_code

BOTH = {"formats": ("PAB",), "orders": ORDERS}


@pytest.fixture(scope="module")
def prompter(gemma_tokenizer):
    return Prompter(gemma_tokenizer, conversation_tokens=128)


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch):
    monkeypatch.setattr(tokens, "ROWS_PER_CHUNK", 7)  # no power of two


@pytest.fixture(scope="module")
def frame():
    """Thirty comparisons in no order."""
    return make_comparisons(30, seed=3).sample(fraction=1, shuffle=True, seed=1)


def same_sequences(a, b):
    samples = [[(list(s.input_ids), list(s.labels), s.row) for s in x] for x in (a, b)]
    return samples[0] == samples[1]


def everything(sequences):
    return sequences.__getitems__(range(len(sequences)))


def test_a_cache_of_many_rows_is_read_back(prompter, tmp_path):
    found = tokenise(make_comparisons(300), prompter, **BOTH, cache=tmp_path)
    assert found.row.tolist() == [row for row in range(300) for _ in ORDERS]


def test_a_cache_holds_what_the_prompter_renders(prompter, frame, tmp_path):
    found = tokenise(frame, prompter, formats=FORMATS, orders=ORDERS, cache=tmp_path)
    ordered = frame.sort("source", "id")
    assert found.frame.equals(ordered) and len(found) == 120
    texts = prompter.tokenise(ordered.select("prompt", "response_a", "response_b").rows())
    labels, at = labels_array(ordered), 0
    for row, comparison in enumerate(texts):
        for format in FORMATS:
            for order in ORDERS:
                rendered = prompter.render(comparison, format=format, swapped=order == "swapped")
                sample = found[at]
                assert list(sample.input_ids) == rendered.input_ids
                assert len(rendered.input_ids) == found.lengths[at]
                assert rendered.truncated == found.truncated[at]
                assert rendered.became_identical == found.became_identical[at]
                assert sample.row == row and found.variant[at] == variant_code(format, order)
                a, b, tie = labels[row]
                assert list(sample.labels) == ([b, a, tie] if order == "swapped" else [a, b, tie])
                at += 1
    assert found.truncated.any() and not found.truncated.all()


def test_a_batch_reads_samples_in_the_order_asked_and_may_be_empty(prompter, frame, tmp_path):
    sequences = tokenise(frame, prompter, **BOTH, cache=tmp_path)
    samples = sequences.__getitems__([41, 3, 3, 17])
    assert [sample.row for sample in samples] == [20, 1, 1, 8]
    packed = VarlenCollator()(samples)
    assert packed.cu_seqlens.diff().tolist() == sequences.lengths[[41, 3, 3, 17]].tolist()
    assert sequences.__getitems__([]) == []


def test_unlabelled_comparisons_weigh_nothing(prompter, tmp_path):
    sequences = tokenise(make_comparisons(4, labelled=False), prompter, **BOTH, cache=tmp_path)
    assert [list(sample.labels) for sample in everything(sequences)] == [[0, 0, 0]] * 8


def test_the_second_time_nothing_is_tokenised(prompter, frame, tmp_path, monkeypatch):
    first = tokenise(frame, prompter, **BOTH, cache=tmp_path)
    monkeypatch.setattr(tokens, "_write", lambda *arguments: pytest.fail("tokenised again"))
    assert same_sequences(everything(tokenise(frame, prompter, **BOTH, cache=tmp_path)), everything(first))


def test_row_order_is_irrelevant(prompter, frame, tmp_path):
    first = tokenise(frame, prompter, **BOTH, cache=tmp_path)
    second = tokenise(frame.reverse(), prompter, **BOTH, cache=tmp_path)
    assert len(list(tmp_path.iterdir())) == 1
    assert same_sequences(everything(first), everything(second)) and first.frame.equals(second.frame)


def test_a_cache_is_named_by_data_prompt_and_variants(
    prompter, gemma_tokenizer, llama_tokenizer, frame, tmp_path
):
    def folders(frame=frame, prompter=prompter, **settings):
        tokenise(frame, prompter, **(BOTH | settings), cache=tmp_path)
        return len(list(tmp_path.iterdir()))

    assert folders() == 1
    assert folders(frame=frame[1:]) == 2
    assert folders(frame=frame.with_columns(winner_tie=pl.lit(1.0, pl.Float32))) == 3, (
        "labels are read from it"
    )
    assert folders(prompter=Prompter(gemma_tokenizer, conversation_tokens=129)) == 4
    assert folders(prompter=Prompter(gemma_tokenizer, conversation_tokens=128, instruction="Which?")) == 5
    assert folders(prompter=Prompter(llama_tokenizer, conversation_tokens=128)) == 6
    assert folders(formats=FORMATS) == 7
    assert folders(orders=("given",)) == 8
    assert folders(orders=orders_of("random")) == 9
    assert folders(orders=orders_of("random"), seed=1) == 10
    assert folders() == 10


def test_random_swap_is_stable(prompter, tmp_path):
    """One order a comparison, the same whatever else is in the table, another with another seed."""
    frame = make_comparisons(60, seed=4)

    def drawn(rows, seed):
        found = tokenise(
            rows, prompter, formats=("PAB",), orders=orders_of("random"), cache=tmp_path, seed=seed
        )
        assert len(found) == len(rows)
        return dict(zip(found.frame["id"], found.variant % 2, strict=True))

    whole = drawn(frame, 3)
    assert 15 < sum(whole.values()) < 45
    assert drawn(frame[10:30].reverse(), 3).items() <= whole.items()
    assert drawn(frame, 4) != whole


def test_random_swap_is_one_order_for_all_formats(prompter, frame, tmp_path):
    found = tokenise(frame, prompter, formats=FORMATS, orders="random", cache=tmp_path)
    order = found.variant.reshape(30, 2) % 2
    assert (order[:, 0] == order[:, 1]).all() and 0 < order[:, 0].sum() < 30


def test_rows_are_a_slice_of_their_own(prompter, frame, tmp_path):
    sequences = tokenise(frame, prompter, formats=FORMATS, orders=ORDERS, cache=tmp_path)
    part = sequences.rows(7, 12)
    assert len(part) == 20 and part.row.tolist() == np.repeat(range(5), 4).tolist()
    assert part.frame.equals(sequences.frame[7:12]) and part.name(0) == sequences.name(7)
    assert (part.variant == sequences.variant[28:48]).all()
    for mine, whole in zip(everything(part), everything(sequences)[28:48], strict=True):
        assert list(mine.input_ids) == list(whole.input_ids) and mine.row == whole.row - 7
        assert list(mine.labels) == list(whole.labels)
    assert len(sequences.rows(28, 99)) == 8, "the last slice ends with the data"
    again = part.rows(2, 4)
    assert list(again[0].input_ids) == list(sequences[36].input_ids)


def test_tokens_are_counted_whole_and_as_cut(prompter, gemma_tokenizer, frame):
    wide = Prompter(gemma_tokenizer, conversation_tokens=100_000)
    rows = frame.select("prompt", "response_a", "response_b").rows()
    expected = [
        [len(one.render(tokens).input_ids) for tokens in one.tokenise(rows)] for one in (wide, prompter)
    ]
    before, after = count_tokens(frame, prompter)
    assert [before.tolist(), after.tolist()] == expected
    assert (before >= after).all() and (before > after).any()


# Damage


def damage_first_batch_only(folder):
    """What is left when the file ends after a whole record batch: readable, but not all of it."""
    path = folder / "tokens.arrow"
    with pa.OSFile(str(path), "rb") as file, pa.ipc.open_stream(file) as reader:
        schema, first = reader.schema, reader.read_next_batch()
    with pa.OSFile(str(path), "wb") as file, pa.ipc.new_stream(file, schema) as writer:
        writer.write_batch(first)


@pytest.mark.parametrize(
    ("damage", "expected"),
    [
        (
            lambda f: (f / "tokens.arrow").write_bytes((f / "tokens.arrow").read_bytes()[:5000]),
            "tokens.arrow",
        ),
        (lambda f: (f / "tokens.arrow").write_bytes(b""), "tokens.arrow"),
        (lambda f: (f / "tokens.arrow").write_bytes(b"\0" * 5000), "tokens.arrow"),
        (lambda f: (f / "tokens.arrow").unlink(), "tokens.arrow"),
        (damage_first_batch_only, "holds 7 of 30 comparisons"),
        (lambda f: (f / "info.json").write_text(json.dumps({"key": "another"})), "not the token cache"),
        (lambda f: (f / "info.json").write_text('{"key": '), "info.json"),
    ],
)
def test_a_damaged_cache_is_refused_and_can_be_deleted(prompter, frame, tmp_path, damage, expected):
    first = everything(tokenise(frame, prompter, **BOTH, cache=tmp_path / "cache"))
    [folder] = (tmp_path / "cache").iterdir()
    damage(folder)
    with pytest.raises(ValueError, match=expected) as error:
        tokenise(frame, prompter, **BOTH, cache=tmp_path / "cache")
    assert str(folder) in str(error.value)
    folder.rename(tmp_path / "away")
    assert same_sequences(everything(tokenise(frame, prompter, **BOTH, cache=tmp_path / "cache")), first)


def test_a_killed_writer_leaves_nothing_that_counts(prompter, frame, tmp_path, monkeypatch):
    def dies(*arguments):
        raise KeyboardInterrupt

    monkeypatch.setattr(tokens, "write_json", dies)
    with pytest.raises(KeyboardInterrupt):
        tokenise(frame, prompter, **BOTH, cache=tmp_path)
    assert list(tmp_path.iterdir()) == []
    monkeypatch.undo()
    assert len(tokenise(frame, prompter, **BOTH, cache=tmp_path)) == 60


def test_a_killed_writer_of_the_same_number_is_no_obstacle(prompter, frame, tmp_path, monkeypatch):
    """In a container the process that starts again often has the number of the one that was killed."""
    tokenise(frame, prompter, **BOTH, cache=tmp_path)
    [folder] = tmp_path.iterdir()
    monkeypatch.setattr("os.getpid", lambda: 7)
    folder.rename(tmp_path / f".{folder.name}.tmp-7")
    assert len(tokenise(frame, prompter, **BOTH, cache=tmp_path)) == 60
    assert [path.name for path in tmp_path.iterdir()] == [folder.name]


def test_leftovers_of_runs_that_never_start_again_are_swept(prompter, frame, tmp_path):
    for name in ("a" * 20, "b" * 20):
        (tmp_path / f".{name}.tmp").mkdir()
    with held_elsewhere(tmp_path / ("b" * 20)):
        tokenise(frame, prompter, **BOTH, cache=tmp_path)
        left = {path.name for path in tmp_path.iterdir() if path.name[0] == "."}
    assert left == {f".{'b' * 20}.tmp", f".{'b' * 20}.lock"}, "that one is being written"


def test_a_second_stage_waits_and_reads_what_the_first_has_tokenised(
    prompter, frame, tmp_path, monkeypatch, capsys
):
    tokenise(frame, prompter, **BOTH, cache=tmp_path)
    [folder] = tmp_path.iterdir()
    folder.rename(tmp_path / "later")
    flock = fcntl.flock
    with held_elsewhere(folder) as file:

        def wait(fd, how):
            if not how & fcntl.LOCK_NB:  # the other stage comes to its end now
                (tmp_path / "later").rename(folder)
                flock(file, fcntl.LOCK_UN)
            flock(fd, how)

        monkeypatch.setattr(fcntl, "flock", wait)
        monkeypatch.setattr(tokens, "_write", lambda *_: 1 / 0)
        assert len(tokenise(frame, prompter, **BOTH, cache=tmp_path)) == 60
    assert f"waiting for {folder}, which {HELD.split(' .')[0]}" in capsys.readouterr().err


def test_readers_wait_for_the_writer(prompter, frame, tmp_path):
    def wait():
        tokenise(frame, prompter, **BOTH, cache=tmp_path)  # the writer, meanwhile

    reader = SimpleNamespace(is_main_process=False, wait_for_everyone=wait)
    found = tokenise(frame, prompter, **BOTH, cache=tmp_path, accelerator=reader)
    assert len(found) == 60
    with pytest.raises(ValueError, match="every machine must see the same artifacts"):
        tokenise(frame, prompter, **BOTH, cache=tmp_path / "elsewhere", accelerator=reader)
