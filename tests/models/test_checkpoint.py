"""Loading published checkpoints, and every way in which a folder can be wrong."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from common.batching import pack
from common.models import load_model
from common.models.head import head_hash, initial_head
from common.models.preference import Surgery

HEAD = ("head.dense.weight", "head.dense.bias", "head.out.weight", "head.out.bias")
NORM = "model.layers.1.input_layernorm.weight"


def edit_json(path, **changes):
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def shard_like_armorm(folder):
    """float32 shards with an index, and what ArmoRM's files hold besides the backbone."""
    tensors = load_file(folder / "model.safetensors")
    tensors |= {
        "regression_layer.weight": torch.randn(19, 24),
        "reward_transform_matrix": torch.randn(19, 19),
        "gating.layers.0.weight": torch.randn(8, 24),
        "gating.temperature": torch.ones(1),
        "model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(5),
    }
    tensors.pop("lm_head.weight", None)
    names = sorted(tensors)
    files = {name: f"model-0000{1 + (i % 2)}-of-00002.safetensors" for i, name in enumerate(names)}
    for file in set(files.values()):
        save_file({n: tensors[n] for n in names if files[n] == file}, folder / file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": files}))
    (folder / "model.safetensors").unlink()
    return files


def test_published_single_file(published):
    folder, reference = published("llama")
    model = load_model(folder)
    state = reference.state_dict()
    for name, value in model.state_dict().items():
        assert name in HEAD or torch.equal(value, state[name])
    assert model.surgery.dropped == ("lm_head.weight",) and model.surgery.initialised == HEAD
    assert set(model.surgery.taken) == set(state) - {"lm_head.weight"}
    assert "1 dropped (lm_head.weight); 4 newly initialised (head.dense.weight," in str(model.surgery)
    assert model.surgery.head_hash[:12] in str(model.surgery)
    assert model.preference is None and model.hf_config.model_type == "llama" and not model.training
    assert (model.decoder.softcap, model.decoder.sliding_window, model.decoder.embedding_scale) == (
        None,
        None,
        1.0,
    )


def test_sharded_float32_with_armorm_extras(folder_of, assert_same):
    folder = folder_of("llama", vocab_size=41)  # another size than the tokenizer's, as ArmoRM's 128,257
    single = load_model(folder, dtype=torch.bfloat16)
    shard_like_armorm(folder)
    model = load_model(folder, dtype=torch.bfloat16)
    assert_same(model, single)
    assert model.surgery.dropped == (
        "gating.layers.0.weight",
        "gating.temperature",
        "model.layers.0.self_attn.rotary_emb.inv_freq",
        "regression_layer.weight",
        "reward_transform_matrix",
    )


def test_what_accelerate_asks_for(published):
    for family in ("gemma2", "llama"):
        model = load_model(published(family)[0])
        assert {type(layer).__name__ for layer in model.model.layers} == set(model._no_split_modules)
        assert model.get_input_embeddings() is model.model.embed_tokens
        base = getattr(model, model.base_model_prefix)
        assert [name for name, child in base.named_children() if "Norm" in type(child).__name__] == ["norm"]
        assert not list(model.buffers())


def test_meta_device_reads_nothing_but_the_config(published, tmp_path):
    folder = published("gemma2")[0]
    (tmp_path / "config.json").write_bytes((folder / "config.json").read_bytes())
    model = load_model(tmp_path, dtype=torch.bfloat16, materialise=False)
    whole = load_model(folder, dtype=torch.bfloat16)
    assert all(parameter.is_meta for parameter in model.parameters())
    describe = [
        [(name, value.shape, value.dtype) for name, value in m.state_dict().items()] for m in (model, whole)
    ]
    assert describe[0] == describe[1]
    assert model.decoder.embedding_scale == whole.decoder.embedding_scale and model.surgery == Surgery()
    model.load_state_dict(whole.state_dict(), assign=True)
    packed = pack([[1, 2, 3], [4]])
    assert torch.equal(model(packed), whole(packed))


def test_the_head_does_not_depend_on_dtype_and_has_its_hash(published):
    folder = published("gemma2")[0]
    exact, rough = load_model(folder), load_model(folder, dtype=torch.bfloat16)
    assert exact.surgery.head_hash == rough.surgery.head_hash
    assert torch.equal(exact.head.dense.weight.bfloat16(), rough.head.dense.weight)
    assert load_model(folder, head_seed=4).surgery.head_hash != exact.surgery.head_hash
    assert load_model(folder, num_classes=7)(pack([[1, 2]], num_classes=7)).shape == (1, 7)


def test_what_nobody_asks_for(published):
    """Defaults that the weights, or what is trained from them, depend on."""
    model = load_model(published("llama")[0])
    drawn = initial_head(hidden_size=24, num_classes=3, seed=3)
    assert model.surgery.head_hash == head_hash(drawn) and model.head.dropout == 0.1
    assert not any(module.training for module in model.modules())


def drop_norm(tensors):
    del tensors[NORM]


def add_tensor(tensors):
    tensors["model.layers.0.self_attn.q_norm.weight"] = torch.ones(10)


def shorten_norm(tensors):
    tensors[NORM] = torch.ones(23)


def quantise(tensors):
    tensors[NORM] = torch.ones(24, dtype=torch.int8)


def overflow(tensors):
    tensors[NORM][3] = 1e6


def spoil(tensors):
    tensors[NORM][3] = float("nan")


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (drop_norm, rf"model.safetensors: tensor {NORM} of shape \[24\] is missing \(1 of 2\d expected"),
        (
            add_tensor,
            r"model.safetensors: unexpected tensor model.layers.0.self_attn.q_norm.weight of shape \[10\]",
        ),
        (shorten_norm, rf"tensor {NORM} has shape \[23\], config.json expects \[24\]"),
        (quantise, rf"tensor {NORM} is torch.int8, expected a floating dtype"),
        (overflow, rf"tensor {NORM} \(torch.float32\) holds NaN or infinity as torch.float16"),
        (spoil, rf"tensor {NORM} \(torch.float32\) holds NaN or infinity as torch.float16"),
    ],
)
@pytest.mark.parametrize("family", ["gemma2", "llama"])
def test_wrong_tensors(folder_of, family, edit, message, edit_weights):
    folder = folder_of(family)
    load_model(folder, dtype=torch.float16)
    edit_weights(folder, edit)
    with pytest.raises(ValueError, match=message):
        load_model(folder, dtype=torch.float16)


@pytest.mark.parametrize("kept", [0, 4, 100, -1])
def test_truncated_file(folder_of, kept):
    folder = folder_of("llama")
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:kept])
    with pytest.raises(ValueError, match=r"model.safetensors cannot be read.*truncated"):
        load_model(folder)


def test_wrong_shards(folder_of, edit_weights):
    folder = folder_of("llama")
    files = shard_like_armorm(folder)
    second = folder / "model-00002-of-00002.safetensors"
    here, there = folder / files[NORM], folder / next(f for f in files.values() if f != files[NORM])
    kept = second.read_bytes()
    second.unlink()
    with pytest.raises(ValueError, match=r"model-00002-of-00002.safetensors cannot be read.*missing"):
        load_model(folder)
    second.write_bytes(kept)

    moved = load_file(here)[NORM]
    edit_weights(folder, lambda tensors: tensors.update({NORM: moved}), there.name)
    with pytest.raises(ValueError, match=f"tensor {NORM} is stored in another file too"):
        load_model(folder)
    edit_weights(folder, drop_norm, there.name)
    edit_weights(folder, drop_norm, here.name)
    with pytest.raises(ValueError, match=rf"{here.name}: tensor {NORM} of shape \[24\] is missing"):
        load_model(folder)

    edit_json(folder / "model.safetensors.index.json", weight_map=[])
    with pytest.raises(ValueError, match=r"index.json has no weight_map"):
        load_model(folder)


def test_unsupported_configs(folder_of):
    folder = folder_of("llama")
    config = folder / "config.json"
    original = config.read_text()
    for changes, message in (
        ({"model_type": "mistral"}, "model_type 'mistral'; supported are gemma2, llama"),
        ({"attention_bias": True}, "attention_bias = True, only False is supported"),
        ({"hidden_act": "gelu"}, "hidden_act = 'gelu', only 'silu' is supported"),
        (
            {"rope_parameters": {"rope_type": "linear", "rope_theta": 1e4, "factor": 2.0}},
            "rope type 'linear'",
        ),
        ({"hidden_size": "many"}, "not a valid llama config"),
    ):
        config.write_text(original)
        edit_json(config, **changes)
        with pytest.raises(ValueError, match=message):
            load_model(folder)
    config.write_text(original[:40])
    with pytest.raises(ValueError, match=r"config.json cannot be read as JSON"):
        load_model(folder)
    config.unlink()
    with pytest.raises(ValueError, match=r"config.json cannot be read"):
        load_model(folder)


def test_unknown_backend_fails_at_load(published):
    with pytest.raises(ValueError, match=r"no op has a backend .cutlass. \(--ops\); there are auto, flash"):
        load_model(published("llama")[0], ops="cutlass")
