"""The benchmarks of a GPU, at toy sizes on a CPU: their arithmetic, complete rows, failures as rows."""

import json
import sys
from types import SimpleNamespace

import pytest
import torch

import attention
import ops
import train
import variants
from common.ops.trial import relative_error

TOY = {"toy": True, "layers": None, "seconds": 0, "timeout": 60, "total_seconds": 60, "json": None}


def args(**changes):
    return SimpleNamespace(**TOY | {"model": "gemma-2-9b"} | changes)


def complete(script, rows, *, ours, without=()):
    """Every column of every row has a number."""
    for row in rows:
        row |= script.compare(row, ours, rows)
        cells = {title: variants._cell(form, row) for title, form in script.COLUMNS.items()}
        assert all(cells[title] for title in cells if title not in without), (row, cells)


@pytest.mark.parametrize("model", list(train.MODELS))
def test_steps_of_all_ways_are_of_the_same_tokens_and_ours_agree(model):
    rows = {}
    for name in ("ours", "plain", "padded-sdpa", "matmuls"):
        found = list(train.measure(name, args(model=model)))
        rows[name] = {"variant": name, **found[-1]}
    assert rows["matmuls"]["budget"] == rows["plain"]["budget"] == 16_384
    complete(train, [rows["plain"], rows["padded-sdpa"], rows["matmuls"]], ours=rows["ours"], without=SPARSE)
    for what in ("loss", "gradient_norm"):
        assert rows["ours"][what] == pytest.approx(rows["plain"][what], rel=1e-5)
    assert rows["ours"]["loss"] == pytest.approx(1.0986, abs=0.02), "random weights know nothing"
    assert rows["ours"]["recomputed"] == "0/2" and rows["plain"]["recomputed"] == "2/2"
    assert rows["plain"]["share"] == rows["plain"]["tokens_per_s_220k"] / rows["matmuls"]["tokens_per_s_220k"]


SPARSE = ("again", "GB", "warm", "loss", "norm")
"""Columns that do not exist for matmuls alone."""


def test_a_micro_batch_that_is_left_out_shows_in_loss_and_norm(monkeypatch):
    whole = next(train.measure("ours", args()))
    steps = train.packed_steps
    monkeypatch.setattr(train, "packed_steps", lambda *a: [step[1:] for step in steps(*a)])
    cut = next(train.measure("ours", args()))
    for what in ("loss", "gradient_norm"):
        assert cut[what] != pytest.approx(whole[what], rel=1e-5)


def test_memory_that_does_not_suffice_has_layers_recomputed_by_quarters(monkeypatch):
    tried = []

    def measure_steps(forward, *rest):
        tried.append(forward.keywords["recompute"])
        if len(tried) < 3:
            raise torch.cuda.OutOfMemoryError("CUDA out of memory")
        return {}

    monkeypatch.setattr(train, "measure_steps", measure_steps)
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda: 0)
    row = next(train.measure("ours", args(layers=8)))
    assert tried == [0, 2, 4] and row["recomputed"] == "4/8" and "error" not in row


def test_steps_hold_each_sequence_once_and_the_tokens_that_they_say():
    one = train.setting(args())
    ids = train.draw_sequences(one)
    for steps in (train.packed_steps(one, 5600), train.padded_steps(one, 16_384)):
        real = [
            sum(int(x["attention_mask"].sum()) if isinstance(x, dict) else len(x.input_ids_T) for x in inputs)
            for inputs in ([batch.inputs for batch in step] for step in steps)
        ]
        assert real == [sum(batch.num_tokens for batch in step) for step in steps]
        assert max(real) <= 1600 and sum(real) <= sum(len(x) for x in ids)
        assert len(steps) >= 4
    first = train.cut([len(x) for x in ids], 1600)[0]
    wanted = sorted(x for i in first for x in ids[i].tolist())
    packed = [batch.inputs.input_ids_T for batch in train.packed_steps(one, 5600)[0]]
    assert sorted(torch.cat(packed).tolist()) == wanted
    padded = train.padded_steps(one, 16_384)[0][0].inputs
    assert torch.equal(padded["input_ids"] != 0, padded["attention_mask"] == 1)


def test_arithmetic_of_steps():
    steps = [train.Step(64_000, 6.0, 0.4), train.Step(64_000, 5.0, 0.4), train.Step(64_000, 8.0, 0.4)]
    found = train.rates(steps)
    wanted = {"median": 10_000, "min": 64_000 / 8.4, "max": 64_000 / 5.4}
    assert found["tokens_per_s"] == pytest.approx(wanted)
    assert found["tokens_per_s_220k"] == pytest.approx(220_000 / (220_000 * 6 / 64_000 + 0.4))
    assert train.cut([5, 3, 7, 2], 8) == [[0, 1], [2]]
    sizes = train.MODELS["gemma-2-9b"][1]
    assert sum(n * a * b for (a, b), n in train.matmul_shapes(sizes).items()) == 198_180_864
    assert [train.fitting_layers(sizes, int(memory)) for memory in (150e9, 80 * 2**30)] == [42, 22]


def test_arithmetic_of_attention():
    assert attention.visible_pairs([3, 2], None) == 9 and attention.visible_pairs([3, 2], 2) == 8
    lengths = attention.arena_lengths(16_384)
    assert sum(lengths) == 16_384 and 10 < len(lengths) < 40 and min(lengths) > 0


def test_padded_attention_is_attention():
    """So that what is timed as the alternative computes the same; without softcap it can."""
    heads = attention.HEADS["8B"]._replace(window=5)
    row = attention.row("sdpa", heads, [7, 3, 12], "cpu")
    assert row["output_error"] < 1e-5 and row["gradient_error"] < 1e-5
    flops = 4 * 32 * 128 * attention.visible_pairs([7, 3, 12], 5)
    assert row["forward_tflops"] * row["forward_ms"]["median"] == pytest.approx(flops / 1e9)
    assert row["both_tflops"] * row["both_ms"]["median"] == pytest.approx(3.5 * flops / 1e9)
    row = attention.row("sdpa", heads._replace(softcap=50.0), [7, 3, 12], "cpu")
    assert row["output_error"] > 1e-3 and row["gradient_error"] > 1e-3, "the scores reach the softcap"


def test_rows_of_attention_and_ops_are_complete(monkeypatch):
    rows = {}
    monkeypatch.setattr(attention, "HEADS", {"9B": attention.HEADS["9B"]})
    monkeypatch.setattr(variants, "SECONDS", 0)
    for name in ("torch", "sdpa"):
        rows[name] = [{"variant": name, **row} for row in attention.measure(name, args())]
        assert [row["case"] for row in rows[name]] == ["9B arena", "9B 8,192"]
        complete(attention, rows[name], ours=rows["torch"][0], without=("x torch",))
    for name in ("torch", "sums"):
        rows[name] = [{"variant": name, **row} for row in ops.measure(name, args())]
        complete(ops, rows[name], ours=rows["torch"][0], without=("fwd ms", "error"))
        assert max(row["gradient_error"] for row in rows[name]) < 1e-6
    for row, passes in zip(rows["torch"], (5, 5, 4, 8, 8), strict=False):
        size = 44 * {"norm": 32, "rota": 2 * 16, "gate": 64}[row["case"][:4]] * 4 / 1e6
        assert row["both_gb_s"] * row["both_ms"]["median"] == pytest.approx(passes * size)
    assert len(rows["torch"]) == 7 and len(rows["sums"]) == 2
    assert ops.gb_per_s(3e6, {"median": 1.0}) == 3


def test_a_variant_that_fails_is_a_row_and_the_rest_goes_on(tmp_path, monkeypatch, capsys):
    script = tmp_path / "bench.py"
    script.write_text(
        """\
import sys
name = sys.argv[-1]
print("something else")
number = {"good": 2, "broken": 4, "wrong": "NaN"}[name]
print('{"case": "a", "number": %s, "machine": {"device": "a card"}}' % number)
if name == "broken":
    raise RuntimeError("an illegal access")
"""
    )
    monkeypatch.setattr(sys, "argv", [str(script), "--toy"])
    parser = variants.Parser("Tests.", ["broken", "good", "wrong"])
    columns = {"case": "{case}", "number": "{number:.1f}", "ratio": "{ratio:.1f}"}

    def compare(row, base, rows):
        return {"ratio": row["number"] / base["number"]}

    def run(*words, ours=("good",)):
        found = parser.parse_args(["--toy", "--json", str(tmp_path / "rows.json"), *words])
        variants.run(found, ours, None, columns, compare)
        return json.loads((tmp_path / "rows.json").read_text())

    found = run()
    good = {"case": "a", "number": 2, "is_ours": True, "variant": "good", "ratio": 1.0}
    assert found["machine"] == {"device": "a card"} and found["rows"][2] == good
    assert found["rows"][0]["ratio"] == 2.0, "to the first of ours, wherever it stands"
    assert [row.get("error") for row in found["rows"]] == [
        None,
        "status 1: RuntimeError: an illegal access",
        None,
        "some numbers are not finite",
    ]
    assert "bench --toy on a card" in capsys.readouterr().out
    assert run("--variants", "good", "--total-seconds", "0")["rows"][0]["error"] == "no time was left"
    for ours in (["broken"], ["wrong"]):
        with pytest.raises(SystemExit, match="1"):
            run(ours=ours)
    with pytest.raises(SystemExit):
        run("--variants", "good", "--timeout", "0")
    assert "no result within 0 s" in capsys.readouterr().out
    with pytest.raises(ValueError, match="--variants has best; known are broken, good, wrong"):
        run("--variants", "best")


def test_alone_a_variant_prints_its_rows_and_the_reason_of_its_end(capsys):
    def measure(name, args):
        yield {"case": "a"}
        raise {"absent": ImportError("not here"), "broken": ValueError("two\nlines")}[name]

    rows = {}
    for name in ("absent", "broken"):
        variants.run(args(alone=name), [], measure, {}, None)
        rows[name] = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
        assert rows[name][0]["case"] == "a" and rows[name][0]["machine"]["device"] == "cpu"
    assert rows["absent"][1]["error"] == "not here" and rows["absent"][1]["is_excused"]
    assert rows["broken"][1]["error"] == "ValueError: two lines" and "is_excused" not in rows["broken"][1]


def test_a_backend_that_is_not_here_is_absent(monkeypatch):
    def choose(backend, **asked):
        raise ValueError(f"no backend {backend!r} here")

    monkeypatch.setattr(variants, "choose", choose)
    row = variants.attempt(lambda: variants.ops_or_absent("fast", head_dim=8))
    assert row == {"error": "no backend 'fast' here", "is_excused": True}


def test_numbers_of_measurements(monkeypatch):
    monkeypatch.setattr(variants, "SECONDS", 0)
    assert variants.spread([3.0, 1.0, 2.0]) == {"median": 2.0, "min": 1.0, "max": 3.0}
    assert relative_error(torch.tensor([3.0, 5.0]), torch.tensor([3.0, 4.0])) == pytest.approx(0.2)
    calls = []
    found = variants.timed(lambda: calls.append(0), "cpu")
    assert len(calls) == 3 + 5 and found["min"] <= found["median"] <= found["max"]
