"""Saving, loading back bit for bit, and saves that did not finish."""

import json
import resource

import pytest
import torch
from helpers import make_preference
from safetensors.torch import save_file

from common.batching import pack
from common.models import load_model, save_checkpoint, weights


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("max_shard_bytes", [5_000_000_000, 10_000])
@pytest.mark.parametrize("family", ["gemma2", "llama"])
def test_saved_and_loaded_bit_for_bit(
    published, tokenizer, tmp_path, family, max_shard_bytes, dtype, assert_same
):
    model = load_model(published(family)[0], dtype=dtype, num_classes=5)
    preference = make_preference(classes=list("VWXYZ"), label_prior=[0.2] * 5, more="abc")
    save_checkpoint(
        tmp_path / "new" / "folder",
        model=model,
        tokenizer=tokenizer,
        preference=preference,
        max_shard_bytes=max_shard_bytes,
    )
    folder = tmp_path / "new" / "folder"
    assert (folder / "model.safetensors").exists() == (max_shard_bytes > 10**6)
    assert (folder / "tokenizer.json").exists() and (folder / "config.json").exists()
    assert not [path for path in folder.iterdir() if path.name.startswith(".")]
    again = load_model(folder, dtype=dtype)
    assert_same(again, model)
    assert again.surgery.dropped == again.surgery.initialised == ()
    assert again.preference | preference == again.preference
    assert again.num_classes == 5 and again.preference["head_hash"] == again.surgery.head_hash
    packed = pack([[1, 2, 3, 4, 5, 6], [4]], num_classes=5)
    assert again(packed).shape == (2, 5) and torch.equal(again(packed), model(packed))
    assert again.hf_config.dtype == dtype


def test_transformers_reads_a_saved_backbone(published, tokenizer, tmp_path):
    from transformers import AutoTokenizer, Gemma2Model

    folder, reference = published("gemma2")
    save_checkpoint(tmp_path, model=load_model(folder), tokenizer=tokenizer, preference=make_preference())
    model = Gemma2Model.from_pretrained(tmp_path)
    assert torch.equal(model.layers[0].mlp.up_proj.weight, reference.model.layers[0].mlp.up_proj.weight)
    assert AutoTokenizer.from_pretrained(tmp_path)("w3")["input_ids"] == [3]


def test_policy_comes_from_the_argument_then_preference_then_config(published, tokenizer, tmp_path):
    folder = published("gemma2")[0]
    model = load_model(folder, dtype=torch.bfloat16, sliding_window=None, softcap=8.0)
    # sqrt(24) is 4.898979 in float32, 4.90625 in bfloat16; what was trained with is served.
    assert model.decoder.embedding_scale == 4.90625
    save_checkpoint(tmp_path, model=model, tokenizer=tokenizer, preference=make_preference())
    saved = load_model(tmp_path, dtype=torch.float32)
    assert (saved.decoder.sliding_window, saved.decoder.softcap, saved.decoder.embedding_scale) == (
        None,
        8.0,
        4.90625,
    )
    asked = load_model(tmp_path, sliding_window=2, softcap=None)
    assert (asked.decoder.sliding_window, asked.decoder.softcap, asked.decoder.embedding_scale) == (
        2,
        None,
        4.90625,
    )
    fresh = load_model(folder)
    assert (fresh.decoder.sliding_window, fresh.decoder.softcap) == (4, 3.0)
    assert fresh.decoder.embedding_scale == torch.tensor(24.0).sqrt().item()
    packed = pack([[1, 2, 3, 4, 5, 6]])
    assert not torch.equal(saved(packed), load_model(tmp_path, sliding_window=2)(packed))
    for wrong in ({"sliding_window": 0}, {"softcap": -1.0}):
        with pytest.raises(ValueError, match=r"must be positive"):
            load_model(folder, **wrong)
    with pytest.raises(ValueError, match=r"sliding_window = 4 was asked for, but a llama"):
        load_model(published("llama")[0], sliding_window=4)


def test_an_interrupted_save_is_no_checkpoint(published, tokenizer, tmp_path, monkeypatch, assert_same):
    model = load_model(published("llama")[0])
    (tmp_path / "metrics.jsonl").write_text("{}")
    for old_shards in (5_000_000_000, 10_000):  # the same tensors written over a whole file, then over shards
        save_checkpoint(
            tmp_path,
            model=model,
            tokenizer=tokenizer,
            preference=make_preference(),
            max_shard_bytes=old_shards,
        )
        for stop_at in (1, 2):
            calls = []

            def fail(*args, calls=calls, stop_at=stop_at, **kwargs):
                calls.append(1)
                if len(calls) == stop_at:
                    raise KeyboardInterrupt
                return save_file(*args, **kwargs)

            monkeypatch.setattr(weights, "save_file", fail)
            with pytest.raises(KeyboardInterrupt):
                save_checkpoint(
                    tmp_path,
                    model=model,
                    tokenizer=tokenizer,
                    preference=make_preference(),
                    max_shard_bytes=6_000,
                )
            monkeypatch.undo()
            with pytest.raises(ValueError, match=r"preference.json is missing: .* was not saved"):
                load_model(tmp_path)
        save_checkpoint(tmp_path, model=model, tokenizer=tokenizer, preference=make_preference())
        assert_same(load_model(tmp_path), model)
        assert [path.name for path in tmp_path.glob("model*")] == ["model.safetensors"]
    assert (tmp_path / "metrics.jsonl").read_text() == "{}"


def test_a_head_of_another_save_is_refused(published, tokenizer, tmp_path, edit_weights):
    model = load_model(published("llama")[0])
    save_checkpoint(tmp_path, model=model, tokenizer=tokenizer, preference=make_preference())
    edit_weights(tmp_path, lambda tensors: tensors["head.out.bias"].add_(1))
    with pytest.raises(ValueError, match=r"head's weights hash to .*, preference.json says"):
        load_model(tmp_path)
    edit_weights(tmp_path, lambda tensors: tensors.pop("head.out.bias"))
    with pytest.raises(ValueError, match=r"tensor head.out.bias of shape \[3\] is missing"):
        load_model(tmp_path)
    preference = json.loads((tmp_path / "preference.json").read_text())
    del preference["softcap"]
    (tmp_path / "preference.json").write_text(json.dumps(preference))
    with pytest.raises(ValueError, match=r"preference.json: softcap is absent"):
        load_model(tmp_path)


def test_what_cannot_be_saved_touches_nothing(published, tokenizer, tmp_path, assert_same):
    model = load_model(published("llama")[0])
    save_checkpoint(tmp_path / "run", model=model, tokenizer=tokenizer, preference=make_preference())
    for wrong in ({"classes": ["A", "B"]}, {"loss": float("nan")}):
        with pytest.raises(ValueError, match=r"classes is .* a list of 3 entries|not JSON compliant"):
            save_checkpoint(
                tmp_path / "run", model=model, tokenizer=tokenizer, preference=make_preference(**wrong)
            )
    assert_same(load_model(tmp_path / "run"), model)
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match=r"cannot write"):
        save_checkpoint(
            tmp_path / "file" / "run", model=model, tokenizer=tokenizer, preference=make_preference()
        )


def test_a_full_disk_is_one_message(published, tokenizer, tmp_path):
    model = load_model(published("llama")[0])
    size = (published("llama")[0] / "model.safetensors").stat().st_size
    limits = resource.getrlimit(
        resource.RLIMIT_FSIZE
    )  # Python ignores SIGXFSZ: writing raises as on a full disk
    resource.setrlimit(resource.RLIMIT_FSIZE, (size // 2, limits[1]))
    try:
        with pytest.raises(ValueError, match=r"cannot write .*model.safetensors"):
            save_checkpoint(tmp_path, model=model, tokenizer=tokenizer, preference=make_preference())
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert not list(tmp_path.glob("*model*")) and not list(tmp_path.glob(".*"))
    with pytest.raises(ValueError, match=r"model.safetensors cannot be read"):
        load_model(tmp_path)


def test_a_gathered_state_dict_replaces_the_models_own(published, tokenizer, tmp_path, assert_same):
    folder = published("gemma2")[0]
    trained = load_model(folder, head_seed=9)
    empty = load_model(folder, materialise=False)
    save_checkpoint(
        tmp_path,
        model=empty,
        state_dict=trained.state_dict(),
        tokenizer=tokenizer,
        preference=make_preference(),
    )
    assert_same(load_model(tmp_path), trained)
