"""Checkpoints that somebody else made: nothing leaves their folder, is executed, or ends in a riddle."""

import json
import os
import shutil
import signal
import sys
from pathlib import Path

import pytest
import torch
from helpers import make_checkpoint, make_preference
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, LlamaModel

from common.files import file_hash
from common.models import checkpoint as saving
from common.models import (
    checkpoint_hash,
    families,
    find_checkpoint,
    load_model,
    read_preference,
    save_checkpoint,
)
from common.models import weights as weight_files
from common.tokenizer import load_tokenizer

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"


@pytest.fixture(autouse=True)
def no_waiting():
    """A pipe that is opened would wait for ever."""

    def stop(*args):
        raise AssertionError("waited for 20 seconds")

    before = signal.signal(signal.SIGALRM, stop)
    signal.alarm(20)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)


@pytest.fixture
def folder(tmp_path):
    """A published checkpoint with its tokenizer, to be spoilt."""
    return make_checkpoint(tmp_path / "checkpoint", "llama")


@pytest.fixture(scope="session")
def made(tmp_path_factory):
    """A checkpoint of our own; not to be changed."""
    place = tmp_path_factory.mktemp("made")
    source = make_checkpoint(place / "published", "gemma")
    tokenizer = load_tokenizer(source)
    save_checkpoint(
        place / "own", model=load_model(source), tokenizer=tokenizer, preference=make_preference()
    )
    (place / "own/trained_on.parquet").write_bytes(b"PAR1")
    return place / "own"


@pytest.fixture
def own(made, tmp_path):
    """A copy of `made`, to be spoilt."""
    return shutil.copytree(made, tmp_path / "own")


def edit_json(path, **changes):
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def shard(folder, *files):
    """Lays the weights out in the files of these names, with an index."""
    tensors = load_file(folder / SINGLE)
    names = {name: files[i % len(files)] for i, name in enumerate(sorted(tensors))}
    for file in files:
        (folder / file).parent.mkdir(parents=True, exist_ok=True)
        save_file({name: tensors[name] for name in tensors if names[name] == file}, folder / file)
    (folder / INDEX).write_text(json.dumps({"weight_map": names}))
    (folder / SINGLE).unlink()


# A path stays inside its folder


SINGLE_FILES = (
    *("config.json", "preference.json", "tokenizer.json", "tokenizer_config.json", SINGLE),
    *("trained_on.parquet", "chat_template.jinja"),
)


@pytest.mark.parametrize("kind", ["pipe", "link"])
@pytest.mark.parametrize("name", SINGLE_FILES)
def test_a_file_that_is_a_pipe_or_leads_elsewhere(own, tmp_path, name, kind):
    content = (own / name).read_bytes()
    (own / name).unlink()
    if kind == "pipe":
        os.mkfifo(own / name)
    else:
        (tmp_path / "elsewhere").write_bytes(content)
        (own / name).symlink_to(tmp_path / "elsewhere")
    for use in (load_model, checkpoint_hash, find_checkpoint):
        with pytest.raises(ValueError, match=f"{name} (is no regular file|leads to .*elsewhere, outside of)"):
            use(own)


def test_weights_below_the_folder_are_read_and_counted_in_its_hash(folder, assert_same):
    whole = load_model(folder)
    shard(folder, "parts/one.safetensors", "parts/deeper/two.safetensors")
    assert_same(load_model(folder), whole)
    before = checkpoint_hash(folder)
    path = folder / "parts/deeper/two.safetensors"
    path.write_bytes(path.read_bytes()[:-1] + b"\1")
    assert checkpoint_hash(folder) != before


@pytest.mark.parametrize("name", ["../{}", "/{}", "sub//{}", ".\\{}", "link/{}", "link-to-file", "pipe"])
def test_an_index_that_leads_elsewhere(folder, tmp_path, name):
    shard(folder, "one.safetensors")
    shutil.copyfile(folder / "one.safetensors", tmp_path / "one.safetensors")
    (folder / "link").symlink_to(tmp_path)
    (folder / "link-to-file").symlink_to(tmp_path / "one.safetensors")
    os.mkfifo(folder / "pipe")
    name = name.format(f"{tmp_path}/one.safetensors"[1:] if name == "/{}" else "one.safetensors")
    edit_json(folder / INDEX, weight_map={"model.norm.weight": name})
    with pytest.raises(ValueError, match=r"is no plain name|outside of|is no regular file"):
        load_model(folder)
    if (folder / name).exists():
        with pytest.raises(ValueError, match=r"is no plain name|outside of|is no regular file"):
            checkpoint_hash(folder)


def test_a_snapshot_of_the_hub_loads(folder, tmp_path, assert_same):
    snapshot = tmp_path / "hub/models--x--y/snapshots/0123"
    snapshot.mkdir(parents=True)
    (tmp_path / "hub/models--x--y/blobs").mkdir()
    for path in folder.iterdir():
        shutil.copyfile(path, tmp_path / "hub/models--x--y/blobs" / file_hash(path))
        (snapshot / path.name).symlink_to(f"../../blobs/{file_hash(path)}")
    assert_same(load_model(snapshot), load_model(folder))
    assert checkpoint_hash(snapshot) == checkpoint_hash(folder)


# Every file that is read is among those that are hashed


READ = (
    *("config.json", "preference.json", "trained_on.parquet", SINGLE, "tokenizer.json"),
    *("tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "chat_template.jinja"),
    *("additional_chat_templates/tool.jinja", "vocab.json", "merges.txt", "tokenizer.model"),
)


def test_the_hash_is_of_all_that_is_read_wherever_it_lies(own, tmp_path):
    before = checkpoint_hash(own)
    assert checkpoint_hash(shutil.copytree(own, tmp_path / "elsewhere/under another name")) == before
    (own / "metrics.jsonl").write_text("{}")
    (own / "run.json").write_text("{}")
    assert checkpoint_hash(own) == before
    for name in READ:
        (own / name).parent.mkdir(exist_ok=True)
        (own / name).write_bytes((own / name).read_bytes() + b" " if (own / name).is_file() else b"{}")
        assert checkpoint_hash(own) != before, name
        before = checkpoint_hash(own)


def test_what_python_opens_is_what_is_hashed(own, monkeypatch):
    """Beside these, compiled libraries open tokenizer.json and the weights."""
    (own / "additional_chat_templates").mkdir()
    (own / "additional_chat_templates/tool.jinja").write_text("{{ messages }}")
    (own / "added_tokens.json").write_text("{}")
    (own / "vocab.json").write_text("{}")
    opened, hashed = set(), set()
    watching = [opened]

    def watch(event, arguments):
        if event != "open" or not watching or not isinstance(arguments[0], str | os.PathLike):
            return
        if own in (path := Path(arguments[0])).parents:
            watching[0].add(path.relative_to(own).as_posix())

    sys.addaudithook(watch)  # for as long as the process lives: it looks at `watching` alone
    load_model(own)
    load_tokenizer(own)
    watching[0] = hashed
    checkpoint_hash(own)
    watching.clear()
    assert (
        {"config.json", "tokenizer_config.json", "additional_chat_templates/tool.jinja"} <= opened <= hashed
    )
    assert {SINGLE, "tokenizer.json"} <= hashed


# Absurd and broken files are one clear error


CONFIGS = (
    *(("num_attention_heads", value) for value in (0, -4, 5, "4", None, True, 2**40)),
    *(("num_key_value_heads", value) for value in (0, -2, 3, 4.0)),
    *(("num_hidden_layers", value) for value in (0, -1, 10**6, 10**15, "2", 2.5)),
    *(
        (name, v)
        for name in ("hidden_size", "intermediate_size", "vocab_size")
        for v in (0, -8, 2**60, "many")
    ),
    *(("head_dim", value) for value in (0, -2, 7, "8")),
    *(("rms_norm_eps", value) for value in (float("nan"), float("inf"), -1e-5, "small", [1])),
    *(("rope_parameters", {"rope_type": "default", "rope_theta": v}) for v in (float("nan"), 0, -1.0, "1e4")),
    *(("rope_parameters", value) for value in ([], "default")),
    *(("num_labels", 10**12), ("to_dict", 3), ("id2label", 3)),
)
GEMMA = (
    *(("attn_logit_softcapping", value) for value in (float("nan"), 0.0, -50.0, "50")),
    *(("query_pre_attn_scalar", value) for value in (0, -1, "x")),
    *(("sliding_window", value) for value in (0, -1, "16", 1.5)),
    *(
        ("layer_types", value)
        for value in (
            ["full_attention"],
            ["full_attention"] * 3,
            ["chunked_attention"] * 2,
            ["a", "b"],
            "ab",
            2,
        )
    ),
)


@pytest.mark.parametrize(
    ("family", "field", "value"),
    [("llama", *case) for case in CONFIGS] + [("gemma2", *case) for case in (*CONFIGS, *GEMMA)],
)
def test_an_absurd_config(published, tmp_path, family, field, value):
    shutil.copytree(published(family, 2)[0], tmp_path / "spoilt")
    edit_json(tmp_path / "spoilt/config.json", **{field: value})
    for materialise in (False, True):
        with pytest.raises(ValueError, match=r"config\.json"):
            load_model(tmp_path / "spoilt", materialise=materialise)


def test_what_only_a_later_transformers_refuses_by_itself():
    rules = families._rules({"head_dim": 7, "layer_types": [], "num_hidden_layers": 2})
    assert rules["head_dim"][0](8) and not rules["head_dim"][0](7)
    fits = rules["layer_types"][0]
    assert fits(["full_attention", "sliding_attention"]) and not fits(["full_attention"])
    assert not fits(["full_attention", "chunked_attention"])


def test_a_wide_head_is_not_drawn_before_the_files_have_shown_the_width(folder, monkeypatch):
    edit_json(folder / "config.json", hidden_size=2**24)
    monkeypatch.setattr(saving, "initial_head", lambda **sizes: pytest.fail("petabytes"))
    with pytest.raises(ValueError, match=r"has shape \[.*32\], config\.json expects \[.*16777216\]"):
        load_model(folder)


@pytest.mark.parametrize(
    "weight_map", [None, [], {}, "x", {"a": 1}, {"a": {"b": "c"}}, {"a": None}, {"a": ["b"]}]
)
def test_a_weight_map_of_wrong_types(folder, weight_map):
    shard(folder, "one.safetensors")
    edit_json(folder / INDEX, weight_map=weight_map)
    with pytest.raises(ValueError, match=r"index\.json has no weight_map of tensor names to file names, but"):
        load_model(folder)


def header(text, *, length=None, data=b"\0" * 64):
    return (len(text) if length is None else length).to_bytes(8, "little") + text + data


@pytest.mark.parametrize(
    "content",
    [
        *(header(b"[1]"), header(b"\xff\xfe{}"), header(b"[" * 100_000), header(b"{}", length=2**60)),
        *(
            header(json.dumps({"a": {"dtype": dtype, "shape": shape, "data_offsets": offsets}}).encode())
            for dtype, shape, offsets in (
                *(("F32", [-1], [0, 4]), ("F32", [2**62, 2**62], [0, 4]), ("F32", [1], [8, 4])),
                *(("X", [1], [0, 4]), ("F32", "1", [0, 4]), ("F32", [1], [0, 10**12])),
            )
        ),
    ],
)
def test_a_broken_header(folder, content):
    (folder / SINGLE).write_bytes(content)
    with pytest.raises(
        ValueError, match=r"model\.safetensors cannot be read: .*fetch or copy its files again"
    ):
        load_model(folder)


MISTYPED = {
    "num_classes": ("3", 0, None, 3.0, True, 10**9),
    "head_hash": ("abc", None, 7),
    "sliding_window": ("16", 0, -1, 1.5),
    "softcap": ("50", float("nan"), 0, -1),
    "embedding_scale": (None, float("inf"), "5"),
    "stage": (None, 3, ""),
    "model": (None, 3, ["a"]),
    "classes": (None, "ABC", ["a", "b"], [1, 2, 3], {"a": 1}),
    "formats": (None, [], "PAB", [1]),
    "prompt": (None, "x", []),
    "prompt.template_hash": (None, "abc", 5),
    "prompt.prompt_hash": (None, "abc", 5),
    "prompt.instruction": (None, "", 5, ["x"]),
    "prompt.conversation_tokens": (None, "200", 0, -5, 2.5),
    "label_prior": (None, [0.5, 0.5], ["a", "b", "c"], [float("nan")] * 3, 0.3),
    "lineage": (None, "x", []),
    "lineage.train": (None, 5),
    "lineage.held_out": (5, ["x"]),
}
ABSENT = "absent"


@pytest.mark.parametrize(("field", "values"), MISTYPED.items())
def test_a_preference_that_is_not_whole(own, field, values):
    path = own / "preference.json"
    original = path.read_text()
    for value in (ABSENT, *values):
        preference = json.loads(original)
        *outer, name = field.split(".")
        place = preference[outer[0]] if outer else preference
        if value is ABSENT:
            del place[name]
        else:
            place[name] = value
        path.write_text(json.dumps(preference))
        with pytest.raises(
            ValueError, match=rf"preference\.json: {field}.* is .*, expected .*; take the folder"
        ):
            read_preference(own)
        with pytest.raises(ValueError, match=rf"preference\.json: {field}"):
            load_model(own)


def test_further_fields_are_welcome(own):
    preference = json.loads((own / "preference.json").read_text())
    edit_json(own / "preference.json", later=1, prompt=preference["prompt"] | {"date": "26 Jul 2024"})
    assert read_preference(own)["prompt"]["date"] == "26 Jul 2024"


# The suggested way out fits the case, and works


def add_tensor(folder, name):
    save_file(load_file(folder / SINGLE) | {name: torch.ones(2)}, folder / SINGLE, metadata={"format": "pt"})


def resave(folder):
    """What the message says to do."""
    AutoModelForCausalLM.from_pretrained(folder).save_pretrained(folder.parent / "new")
    return folder.parent / "new"


@pytest.mark.parametrize(
    "name", ["v_head.summary.weight", "value_head.weight", "head.weight", "classifier.bias"]
)
def test_a_reward_models_own_head(folder, name, assert_same):
    before = load_model(folder)
    add_tensor(folder, name)
    with pytest.raises(ValueError, match=rf"{name}.* a reward head: .*AutoModelForCausalLM"):
        load_model(folder)
    assert_same(load_model(resave(folder)), before)


def test_a_backbone_saved_bare(folder, assert_same):
    before = load_model(folder)
    LlamaModel.from_pretrained(folder).save_pretrained(folder)
    with pytest.raises(ValueError, match=r"without the prefix model\.: .*AutoModelForCausalLM"):
        load_model(folder)
    assert_same(load_model(resave(folder)), before)


def test_pickled_weights(folder, assert_same):
    before = load_model(folder)
    torch.save(load_file(folder / SINGLE), folder / "pytorch_model.bin")
    (folder / SINGLE).unlink()
    with pytest.raises(
        ValueError, match=r"model\.safetensors cannot be read: .*pickled.*AutoModelForCausalLM"
    ):
        load_model(folder)
    assert_same(load_model(resave(folder)), before)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight", "merge_and_unload"),
        ("model.layers.0.self_attn.q_proj.qweight", "take the unquantised one"),
        ("model.layers.0.self_attn.q_proj.weight_scale_inv", "take the unquantised one"),
        ("model.layers.0.self_attn.q_proj.weight.quant_state.bitsandbytes__nf4", "take the unquantised one"),
        ("model.layers.0.self_attn.q_proj.bias", "take a checkpoint that has none"),
        ("model.layers.0.self_attn.q_norm.weight", "take another checkpoint"),
        ("head.dense.weight", "preference.json is missing: .* by its stage's command"),
    ],
)
def test_tensors_that_this_model_does_not_have(folder, name, message):
    add_tensor(folder, name)
    with pytest.raises(ValueError, match=rf"unexpected tensor {name}.*{message}") as caught:
        load_model(folder)
    assert "save the checkpoint again" not in str(caught.value)


@pytest.mark.parametrize("dtype", [torch.int8, torch.uint8, torch.float8_e4m3fn])
def test_quantised_tensors(folder, edit_weights, dtype):
    edit_weights(folder, lambda t: t.update({"model.norm.weight": t["model.norm.weight"].to(dtype)}))
    with pytest.raises(ValueError, match=r"model.norm.weight is torch.*take the unquantised one"):
        load_model(folder)
    edit_json(folder / "config.json", quantization_config={"quant_method": "gptq"})
    with pytest.raises(ValueError, match=r"has a quantization_config; .*take the unquantised one"):
        load_model(folder)


@pytest.mark.parametrize("config_too", [True, False])
@pytest.mark.parametrize(
    ("files", "message"),
    [
        (("model-Q4_K_M.gguf",), "GGUF files are not read: take the safetensors checkpoint"),
        (("adapter_config.json", "adapter_model.safetensors"), "merge_and_unload"),
        (("pytorch_model-00001-of-00002.bin", "pytorch_model.bin.index.json"), "AutoModelForCausalLM"),
        ((), "fetch or copy its files again"),
    ],
)
def test_folders_of_another_kind(folder, files, message, config_too):
    (folder / SINGLE).unlink()
    if not config_too:
        (folder / "config.json").unlink()
    for name in files:
        (folder / name).write_text("{}")
    with pytest.raises(ValueError, match=rf"cannot be read: it is missing; .*{message}"):
        load_model(folder)


# Nothing of it is executed


def test_auto_map_imports_nothing(folder, tmp_path, tokenizer):
    marker = tmp_path / "was executed"
    (folder / "evil.py").write_text(f"open({str(marker)!r}, 'w')\nclass Config: pass\n")
    auto_map = dict.fromkeys(("AutoConfig", "AutoModel", "AutoModelForSequenceClassification"), "evil.Config")
    edit_json(folder / "config.json", auto_map=auto_map, configuration_files=["config.4.0.0.json"])
    edit_json(folder / "config.json", architectures=["Evil"])
    (folder / "config.4.0.0.json").write_text("not even JSON")  # transformers would go on to read it
    model = load_model(folder)
    save_checkpoint(tmp_path / "saved", model=model, tokenizer=tokenizer, preference=make_preference())
    assert not marker.exists() and "evil" not in sys.modules
    assert "auto_map" not in (tmp_path / "saved/config.json").read_text()


# A failed write blames the output, a failed read the input


def full(*args, **kwargs):
    raise OSError(28, "No space left on device")


@pytest.mark.parametrize(
    ("where", "name", "failure"),
    [
        (weight_files, "save_file", full),
        (weight_files, "save_file", lambda *a, **k: weight_files.safe_open("/nowhere/x", framework="pt")),
        (saving.shutil, "copyfile", full),
        (saving.tempfile, "mkdtemp", full),
    ],
)
def test_a_failed_write_names_the_output(made, tmp_path, tokenizer, monkeypatch, where, name, failure):
    model = load_model(made)
    monkeypatch.setattr(where, name, failure)
    with pytest.raises(ValueError, match=rf"cannot write .*{tmp_path}/out") as caught:
        save_checkpoint(tmp_path / "out", model=model, tokenizer=tokenizer, preference=make_preference())
    assert str(made) not in str(caught.value)


def test_a_tokenizer_that_cannot_be_written_names_the_output(made, tmp_path, monkeypatch):
    tokenizer = load_tokenizer(made)

    def fail(folder):  # as the compiled library does
        raise Exception("No space left on device (os error 28)")

    monkeypatch.setattr(tokenizer, "save_pretrained", fail)
    with pytest.raises(ValueError, match=rf"cannot write the checkpoint {tmp_path}/out: No space left"):
        save_checkpoint(
            tmp_path / "out", model=load_model(made), tokenizer=tokenizer, preference=make_preference()
        )


@pytest.mark.parametrize("name", ["config.json", "preference.json", SINGLE])
def test_a_failed_read_names_the_input(own, name, monkeypatch):
    (own / name).write_bytes(b"\xff broken")
    with pytest.raises(ValueError, match=rf"{own}/{name} cannot be read"):
        load_model(own)
