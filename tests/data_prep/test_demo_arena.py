"""The synthetic arena: its form, its quirks, what can be learnt from it; and the two tiny checkpoints."""

import csv
import json
import math
from pathlib import Path

import numpy as np
import polars as pl
import pytest
import torch
from helpers import read_competition_file, run_script
from jinja2 import TemplateError
from safetensors import safe_open
from sklearn.linear_model import LogisticRegression
from transformers import AutoConfig, AutoModel, AutoTokenizer

from common.data.table import LABELS, labels_array
from common.files import file_hash
from common.models import load_model
from common.prompts import Prompter
from common.score.metrics import log_loss, prior_log_loss
from data_prep.competition import with_folds
from data_prep.demo_arena import BAD, GOOD, Args, main, make_checkpoints, texts_of, write_arena

SCRIPT = Path(__file__).resolve().parents[2] / "data_prep" / "demo_arena.py"
SMALL = {"num_train": 60, "num_pool": 20, "num_test": 10}
TEXT_COLUMNS = ("prompt", "response_a", "response_b")
UNICODE = "naïve 東京 🦙 \u0000 \ufffd 𝄞 مرحبا  \t\r\n"


@pytest.fixture(scope="module")
def arena(tmp_path_factory):
    """The arena of the demo at its default size; no checkpoints."""
    folder = tmp_path_factory.mktemp("arena")
    write_arena(Args(output=folder))
    return folder / "raw"


@pytest.fixture(scope="module")
def votes(arena):
    """The labelled comparisons with folds, as the stages read them."""
    return with_folds(read_competition_file(arena / "train.csv")[0], num_folds=5)


@pytest.fixture(scope="module")
def held_out(arena, votes):
    """(training rows, held-out rows, true probabilities of the held-out rows)."""
    is_held_out = pl.col("fold") == 0
    scored = votes.filter(is_held_out)
    truth = pl.read_parquet(arena / "truth.parquet")
    true = scored.select("id").join(truth, on="id", how="left", maintain_order="left")
    return votes.filter(~is_held_out), scored, true.select(LABELS).to_numpy()


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory, arena):
    folder = tmp_path_factory.mktemp("models")
    make_checkpoints(texts_of(arena / "pool.csv"), folder, 0)
    return folder


def test_files_have_the_competitions_form(arena):
    train, pool, test = ((arena / f"{name}.csv").read_bytes() for name in ("train", "pool", "test"))
    labelled = "id,model_a,model_b,prompt,response_a,response_b,winner_model_a,winner_model_b,winner_tie"
    assert train.decode("ascii").splitlines()[0] == labelled
    for unlabelled in (pool, test):
        assert unlabelled.decode("ascii").splitlines()[0] == "id,prompt,response_a,response_b"
    assert b"\\ud83e\\udd99" in train and b"\\/" in train and b"\r" not in train
    rows = read_rows(arena / "train.csv")
    assert len(rows) == Args().num_train
    for row in rows:
        assert sorted(row[name] for name in LABELS) == ["0", "0", "1"]
        assert len({len(json.loads(row[name])) for name in TEXT_COLUMNS}) == 1
    assert max(int(row["id"]) for row in rows) > 2**31


def test_ids_are_unique_and_truth_covers_every_file(arena):
    truth = pl.read_parquet(arena / "truth.parquet")
    assert truth["id"].is_unique().all()
    for name in ("train", "pool", "test"):
        ids = [row["id"] for row in read_rows(arena / f"{name}.csv")]
        assert truth.filter(pl.col("file") == name)["id"].to_list() == ids
    assert truth.select(pl.sum_horizontal(LABELS)).to_series().to_numpy() == pytest.approx(1)


def test_every_quirk_of_the_real_data_occurs(votes):
    rows = votes.select(TEXT_COLUMNS).rows()
    texts = [text for row in rows for turns in row for text in turns]
    num_turns = [len(prompt) for prompt, _, _ in rows]
    assert np.mean(np.array(num_turns) > 1) == pytest.approx(0.13, abs=0.03) and max(num_turns) >= 3
    assert any(None in prompt for prompt, _, _ in rows)
    assert any(None in first or None in second for _, first, second in rows)
    assert "" in texts
    assert 0.001 < np.mean([first == second for _, first, second in rows]) < 0.03
    everything = "\n".join(text for text in texts if text)
    for piece in ("<end_of_turn>", "<|eot_id|>", "🦙", "東京", "مرحبا", "nan"):
        assert piece in everything, piece
    shares = labels_array(votes).mean(axis=0)
    assert shares.min() > 0.1 and abs(shares[0] - shares[1]) < 0.05


def test_a_few_conversations_are_over_the_budget_of_the_demo(checkpoints, votes):
    prompter = Prompter(AutoTokenizer.from_pretrained(checkpoints / "tiny-gemma"), conversation_tokens=256)
    sample = votes.head(1000).select(TEXT_COLUMNS).rows()
    share = np.mean([prompter.render(item).truncated for item in prompter.tokenise(sample)])
    assert 0.002 < share < 0.1


def test_there_is_much_to_learn(held_out):
    train, scored, true = held_out
    labels = labels_array(scored)
    assert len(scored) >= 1000
    assert prior_log_loss(labels_array(train), labels) - log_loss(true, labels) > 0.3
    # With the wrong rows' probabilities nothing is known: the floor does belong to these votes.
    assert log_loss(true[::-1], labels) > prior_log_loss(labels_array(train), labels)


def test_lengths_know_little_and_words_much(held_out):
    train, scored, true = held_out
    labels = labels_array(scored)
    prior, floor = prior_log_loss(labels_array(train), labels), log_loss(true, labels)

    def closed(features) -> float:
        model = LogisticRegression(max_iter=1000).fit(features(train), labels_array(train).argmax(1))
        return (prior - log_loss(model.predict_proba(features(scored)), labels)) / (prior - floor)

    assert closed(log_lengths) < 0.2
    assert closed(word_counts) > 0.5


def test_the_same_arguments_draw_the_same_arena(tmp_path):
    first, again, other = (tmp_path / name for name in ("first", "again", "other"))
    for folder, seed in ((first, 1), (again, 1), (other, 2)):
        write_arena(Args(output=folder, seed=seed, **SMALL))
    for name in ("train.csv", "pool.csv", "test.csv"):
        assert (first / "raw" / name).read_bytes() == (again / "raw" / name).read_bytes()
        assert (first / "raw" / name).read_bytes() != (other / "raw" / name).read_bytes()
    frames = [pl.read_parquet(folder / "raw" / "truth.parquet") for folder in (first, again, other)]
    assert frames[0].equals(frames[1]) and not frames[0].equals(frames[2])


def test_it_is_up_to_date_the_second_time_and_other_arguments_are_refused(tmp_path, capsys):
    args = Args(output=tmp_path / "a", **SMALL)
    main(args)
    before = hashes(tmp_path / "a")
    assert {"raw/train.csv", "raw/truth.parquet", "raw/run.json"} <= before.keys()
    main(args)
    assert "up to date" in capsys.readouterr().out
    with pytest.raises(ValueError, match=r"recipe\.seed is 0; here it is 7"):
        main(Args(output=tmp_path / "a", seed=7, **SMALL))
    assert hashes(tmp_path / "a") == before

    # The script in another process, with another hash seed, makes the same bytes.
    flags = [f"--{name.replace('_', '-')}={value}" for name, value in SMALL.items()]
    made = run_script(SCRIPT, "--output", tmp_path / "b", *flags, environment={"PYTHONHASHSEED": "1"})
    assert made.returncode == 0, made.stderr
    there = hashes(tmp_path / "b")
    assert there.keys() == before.keys()
    assert {there[name] == before[name] for name in weights_and_csv(before)} == {True}


def test_what_was_interrupted_is_made_again(tmp_path, monkeypatch, capsys):
    args = Args(output=tmp_path, **SMALL)
    with monkeypatch.context() as patch:
        patch.setattr("data_prep.demo_arena.make_checkpoints", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            main(args)
    main(args)
    assert "complete" in capsys.readouterr().out and (tmp_path / "models/tiny-llama/config.json").is_file()


@pytest.mark.parametrize("name", ["num_train", "num_pool", "num_test"])
def test_nothing_to_draw_is_an_error(name):
    with pytest.raises(ValueError, match=f"--{name.replace('_', '-')} is 0"):
        Args(**{name: 0})


def test_real_votes_get_checkpoints_alone(tmp_path, arena):
    main(Args(output=tmp_path, train_csv=arena / "test.csv"))
    assert not (tmp_path / "raw" / "train.csv").exists()
    assert len(AutoTokenizer.from_pretrained(tmp_path / "models" / "tiny-llama")) > 300


def test_tiny_gemma_is_a_gemma2(checkpoints):
    config = AutoConfig.from_pretrained(checkpoints / "tiny-gemma")
    assert (config.model_type, config.num_hidden_layers) == ("gemma2", 2)
    assert config.num_key_value_heads < config.num_attention_heads
    assert config.attn_logit_softcapping == 50.0 and config.query_pre_attn_scalar == config.head_dim
    assert config.sliding_window < 256 and "sliding_attention" in config.layer_types
    assert (checkpoints / "tiny-gemma" / "model.safetensors").is_file()


def test_tiny_llama_is_stored_like_armorm(checkpoints):
    folder = checkpoints / "tiny-llama"
    config = AutoConfig.from_pretrained(folder)
    assert config.model_type == "llama" and config.num_key_value_heads < config.num_attention_heads
    index = json.loads((folder / "model.safetensors.index.json").read_text())["weight_map"]
    assert len(set(index.values())) == len(list(folder.glob("*.safetensors"))) == 2
    assert {"regression_layer.weight", "reward_transform_matrix"} <= index.keys()
    assert any(name.startswith("gating.") for name in index) and "lm_head.weight" not in index
    for path in folder.glob("*.safetensors"):
        with safe_open(path, "pt") as tensors:
            assert {tensors.get_slice(name).get_dtype() for name in index if index[name] == path.name} == {
                "F32"
            }


@pytest.mark.parametrize("name", ["tiny-gemma", "tiny-llama"])
def test_checkpoints_load_and_agree_with_transformers(checkpoints, name):
    tokenizer = AutoTokenizer.from_pretrained(checkpoints / name)
    theirs = AutoModel.from_pretrained(
        checkpoints / name, dtype=torch.float32, attn_implementation="eager"
    ).eval()
    assert len(tokenizer) == theirs.config.vocab_size
    ours = load_model(checkpoints / name)
    dropped = {"regression_layer.weight", "reward_transform_matrix"} if name == "tiny-llama" else set()
    assert dropped <= set(ours.surgery.dropped) and bool(dropped) == bool(ours.surgery.dropped)
    # Longer than the window, so that it bites.
    ids = torch.randint(len(tokenizer), (1, 200), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected_D = theirs(input_ids=ids).last_hidden_state[0, -1]
        boundaries = torch.tensor([0, 200], dtype=torch.int32)
        [hidden_D] = ours.model(ids[0], torch.arange(200), boundaries, 200)
    assert math.isfinite(expected_D.norm())
    torch.testing.assert_close(hidden_D, expected_D, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("name", "control"), [("tiny-gemma", "<end_of_turn>"), ("tiny-llama", "<|eot_id|>")])
def test_tokenizers(checkpoints, name, control):
    tokenizer = AutoTokenizer.from_pretrained(checkpoints / name)
    assert len(tokenizer) <= 1100
    ids = tokenizer(UNICODE, add_special_tokens=False).input_ids
    assert tokenizer.decode(ids, clean_up_tokenization_spaces=False) == UNICODE
    control_id = tokenizer.convert_tokens_to_ids(control)
    assert tokenizer(control, add_special_tokens=False).input_ids == [control_id]
    split = tokenizer(control, add_special_tokens=False, split_special_tokens=True).input_ids
    assert control_id not in split and tokenizer.decode(split) == control
    for word in (GOOD[0], BAD[0]):
        assert len(tokenizer(f" {word}", add_special_tokens=False).input_ids) == 1


def test_chat_templates(checkpoints):
    gemma, llama = (
        AutoTokenizer.from_pretrained(checkpoints / f"tiny-{name}") for name in ("gemma", "llama")
    )
    user, system = {"role": "user", "content": "hi"}, {"role": "system", "content": "be brief"}
    render = {"tokenize": False, "add_generation_prompt": True}
    assert gemma.apply_chat_template([user], **render) == (
        "<bos><start_of_turn>user\nhi<end_of_turn>\n<start_of_turn>model\n"
    )
    with pytest.raises(TemplateError, match="System role not supported"):
        gemma.apply_chat_template([system, user], **render)
    assert llama.apply_chat_template([system, user], **render) == (
        "<|begin_of_text|><|start_header_id|>system<|end_header_id|>\n\nbe brief<|eot_id|>"
        "<|start_header_id|>user<|end_header_id|>\n\nhi<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\n"
    )


def read_rows(path: Path) -> list[dict[str, str]]:
    with path.open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def hashes(folder: Path) -> dict[str, str]:
    """Relative path -> sha256 of every file below `folder`."""
    return {str(p.relative_to(folder)): file_hash(p) for p in sorted(folder.rglob("*")) if p.is_file()}


def weights_and_csv(names) -> set[str]:
    """The files whose bytes must not differ between two runs (Parquet bytes depend on the thread count)."""
    return {
        name for name in names if name.endswith((".csv", ".safetensors", "tokenizer.json", "config.json"))
    }


def answers(frame: pl.DataFrame) -> list[tuple[str, str]]:
    """Both answers of each comparison, turns joined."""
    pairs = frame.select("response_a", "response_b").rows()
    return [tuple(" ".join(text or "" for text in turns) for turns in pair) for pair in pairs]


def log_lengths(frame: pl.DataFrame) -> np.ndarray:
    """[num_comparisons, 2]: log of the characters of each answer."""
    return np.log([[len(first) + 1, len(second) + 1] for first, second in answers(frame)])


def word_counts(frame: pl.DataFrame) -> np.ndarray:
    """[num_comparisons, words]: how often answer A has each quality word more than B."""
    words = [*GOOD, *BAD]
    split = [(first.split(), second.split()) for first, second in answers(frame)]
    return np.array([[a.count(word) - b.count(word) for word in words] for a, b in split], dtype=float)
