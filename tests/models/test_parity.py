"""Both families against transformers in float32: logits and every gradient; and that each feature bites."""

import copy
import dataclasses
import json
import shutil

import pytest
import torch

from common.batching import pack
from common.models import load_model

FAMILIES = ("gemma2", "llama")
WEIGHTS = torch.tensor([1.0, -2.0, 0.5])  # of the classes in the scalar whose gradients are compared


def transformers_logits(published, head, sequences):
    """Sequence by sequence: the last token's state of the published backbone, through the same head."""
    states = [published.model(torch.tensor([ids])).last_hidden_state[0, -1] for ids in sequences]
    return head(torch.stack(states))


def gradients_of(logits_SC, parameters):
    row_weights = torch.arange(1, len(logits_SC) + 1)[:, None]
    return torch.autograd.grad((logits_SC * WEIGHTS * row_weights).sum(), list(parameters))


@pytest.mark.parametrize("num_layers", [2, 3])  # Gemma's last layer without and with a window
@pytest.mark.parametrize("family", FAMILIES)
def test_logits_and_every_gradient(published, sequences, family, num_layers):
    folder, reference = published(family, num_layers)
    model = load_model(folder)
    logits = model(pack(sequences))
    expected = transformers_logits(reference, model.head, sequences)
    assert logits.dtype == torch.float32 and logits.shape == (len(sequences), 3)
    torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-4)

    names, parameters = zip(*model.model.named_parameters(), strict=True)
    reference_parameters = dict(reference.model.named_parameters())
    assert set(names) == set(reference_parameters)
    gradients = gradients_of(logits, [*parameters, *model.head.parameters()])
    expected_gradients = gradients_of(
        expected, [*(reference_parameters[name] for name in names), *model.head.parameters()]
    )
    for gradient, expected_gradient in zip(gradients, expected_gradients, strict=True):
        scale = expected_gradient.abs().max()
        assert scale > 1e-3
        assert (gradient - expected_gradient).abs().max() <= 1e-4 * scale


@pytest.mark.parametrize(
    "wrong",
    [
        {"softcap": None},
        {"softcap": 4.0},
        {"sliding_window": None},
        {"sliding_window": 3},
        {"sliding_window": 5},
    ],
)
def test_softcap_and_window_bite(published, sequences, wrong):
    folder, reference = published("gemma2")
    model = load_model(folder, **wrong)
    expected = transformers_logits(reference, model.head, sequences)
    assert (model(pack(sequences)) - expected).abs().max() > 1e-2


def test_softcap_and_window_off_equal_transformers_without_them(published, sequences):
    folder, reference = published("gemma2")
    reference = copy.deepcopy(reference)
    reference.config.sliding_window = 10**6
    for layer in reference.model.layers:
        layer.self_attn.attn_logit_softcapping = None
        layer.self_attn.sliding_window = 10**6 if layer.self_attn.sliding_window else None
    model = load_model(folder, softcap=None, sliding_window=None)
    assert (model.decoder.softcap, model.decoder.sliding_window) == (None, None)
    expected = transformers_logits(reference, model.head, sequences)
    torch.testing.assert_close(model(pack(sequences)), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("family", "field", "value"),
    [
        ("gemma2", "query_pre_attn_scalar", 10),
        ("gemma2", "rope_parameters", {"rope_type": "default", "rope_theta": 10_000.0}),
        ("gemma2", "rms_norm_eps", 1.0),
        ("gemma2", "layer_types", ["full_attention", "sliding_attention", "full_attention"]),
        ("llama", "rope_parameters", {"rope_type": "default", "rope_theta": 10_000.0}),
        ("llama", "rms_norm_eps", 1.0),
    ],
)
def test_config_fields_bite(published, sequences, tmp_path, family, field, value):
    folder, reference = published(family)
    shutil.copytree(folder, tmp_path / "copy")
    config = json.loads((folder / "config.json").read_text())
    assert config[field] != value
    (tmp_path / "copy" / "config.json").write_text(json.dumps(config | {field: value}))
    model = load_model(tmp_path / "copy")
    expected = transformers_logits(reference, model.head, sequences)
    assert (model(pack(sequences)) - expected).abs().max() > 1e-2


@pytest.mark.parametrize("family", FAMILIES)
def test_packed_equals_one_by_one_and_a_wrong_boundary_does_not(published, sequences, family):
    model = load_model(published(family)[0])
    packed = pack(sequences)
    one_by_one = torch.cat([model(pack([ids])) for ids in sequences])
    torch.testing.assert_close(model(packed), one_by_one, rtol=1e-5, atol=1e-5)
    reversed_order = model(pack(sequences[::-1])).flip(0)
    torch.testing.assert_close(reversed_order, one_by_one, rtol=1e-5, atol=1e-5)

    wrong = packed.cu_seqlens.clone()
    wrong[3] += 1  # the fourth sequence's first token now ends the third
    logits = model(packed._replace(cu_seqlens=wrong))
    assert (logits - one_by_one)[2:4].abs().amax(1).min() > 1e-2
    torch.testing.assert_close(logits[[0, 1, 4]], one_by_one[[0, 1, 4]], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("num_layers", [1, 2, 3])
@pytest.mark.parametrize("family", FAMILIES)
def test_pruned_last_layer_equals_the_whole_one(published, sequences, family, num_layers):
    model = load_model(published(family, num_layers)[0])
    packed = pack(sequences)
    whole = copy.deepcopy(model)
    last = whole.model.layers[-1]
    last.last_token_only = last.self_attn.last_token_only = False
    rows = {}
    hook = model.model.layers[-1].mlp.register_forward_hook(lambda *args: rows.update(mlp=len(args[2])))
    logits = model(packed)
    hook.remove()
    hidden_TD = whole.model(*packed[:4])
    assert len(hidden_TD) == sum(map(len, sequences)) and rows["mlp"] == len(sequences)
    last_states = hidden_TD[packed.cu_seqlens[1:].long() - 1]
    torch.testing.assert_close(logits, whole.head(last_states), rtol=1e-5, atol=1e-5)


def test_attention_is_told_the_longest_queries_and_keys(published, sequences):
    """Kernels lay out their work by them; the definition does not look."""
    model, longest = load_model(published("gemma2")[0]), []

    def attention(q, k, v, *, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, **options):
        assert max_seqlen_q == cu_seqlens_q.diff().max() and max_seqlen_k == cu_seqlens_k.diff().max()
        longest.append((max_seqlen_q, max_seqlen_k))
        return q

    for layer in model.model.layers:
        layer.self_attn.ops = dataclasses.replace(model.ops, attention=attention)
    model(pack(sequences))
    longest_sequence = max(map(len, sequences))
    assert longest == [*[(longest_sequence, longest_sequence)] * 2, (1, longest_sequence)]


@pytest.mark.parametrize("family", FAMILIES)
def test_the_first_layers_are_recomputed_and_nothing_changes(published, sequences, family):
    packed, results = pack(sequences), []
    model = load_model(published(family)[0], head_dropout=0.0).train()
    calls = []
    for number, layer in enumerate(model.model.layers):
        layer.input_layernorm.register_forward_hook(lambda *_, number=number: calls.append(number))
    for recompute in range(len(model.model.layers) + 1):
        calls.clear()
        results.append(gradients_of(model(packed, recompute=recompute), model.parameters()))
        assert sorted(calls) == sorted([*range(len(model.model.layers)), *range(recompute)])
        torch.testing.assert_close(results[-1], results[0], rtol=0, atol=0)


@pytest.mark.parametrize("family", FAMILIES)
def test_bfloat16_stays_near_float32(published, sequences, family):
    packed = pack(sequences)
    exact, rough = (load_model(published(family)[0], dtype=d) for d in (torch.float32, torch.bfloat16))
    assert {p.dtype for p in rough.parameters()} == {torch.bfloat16}
    logits = rough(packed)
    assert logits.dtype == torch.float32
    torch.testing.assert_close(logits, exact(packed), rtol=0.1, atol=0.1)
