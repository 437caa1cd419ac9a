"""Published checkpoints of toy size, made by transformers, at which every feature bites."""

import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import (
    Gemma2Config,
    Gemma2ForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)

VOCAB = 37
COMMON = {  # 4 heads of 10 are not the model's width, and share 2 key/value heads
    "vocab_size": VOCAB,
    "hidden_size": 24,
    "intermediate_size": 40,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 10,
    "rms_norm_eps": 1e-4,
    "pad_token_id": None,  # transformers gives its row no gradient
    "rope_parameters": {"rope_type": "default", "rope_theta": 300.0},
}
GEMMA = {"sliding_window": 4, "attn_logit_softcapping": 3.0, "query_pre_attn_scalar": 7}


def build_published(family, num_layers=3, **overrides):
    """A transformers model with weights so large that softcap, window and positions matter."""
    if family == "gemma2":
        config = Gemma2Config(**COMMON | GEMMA | {"num_hidden_layers": num_layers} | overrides)
        published = Gemma2ForCausalLM._from_config(config, attn_implementation="eager")
    else:
        config = LlamaConfig(**COMMON | {"num_hidden_layers": num_layers} | overrides)
        published = LlamaForCausalLM._from_config(config, attn_implementation="eager")
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in published.named_parameters():
            noise = 0.3 * torch.randn(parameter.shape, generator=generator)
            parameter.copy_(1 + noise if family == "llama" and "norm" in name else noise)
    return published.float().eval()


@pytest.fixture(scope="session")
def published(tmp_path_factory):
    """`published(family, num_layers)` -> (folder, transformers model); made once, not to be changed."""
    made = {}

    def make(family, num_layers=3):
        if (family, num_layers) not in made:
            folder = tmp_path_factory.mktemp(f"{family}-{num_layers}")
            model = build_published(family, num_layers)
            model.save_pretrained(folder)
            made[family, num_layers] = folder, model
        return made[family, num_layers]

    return make


@pytest.fixture
def folder_of(tmp_path):
    """`folder_of(family, **config overrides)` -> a fresh checkpoint folder that a test may spoil."""

    def make(family, **overrides):
        folder = tmp_path / family
        build_published(family, 2, **overrides).save_pretrained(folder)
        return folder

    return make


@pytest.fixture(scope="session")
def sequences():
    """Odd lengths, one of a single token, most longer than the window of 4."""
    generator = torch.Generator().manual_seed(2)
    return [torch.randint(0, VOCAB, (n,), generator=generator).tolist() for n in (11, 1, 5, 17, 3)]


@pytest.fixture(scope="session")
def tokenizer():
    words = {f"w{i}": i for i in range(VOCAB - 1)} | {"<unk>": VOCAB - 1}
    return PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(WordLevel(words, unk_token="<unk>")), unk_token="<unk>"
    )


@pytest.fixture(scope="session")
def edit_weights():
    def apply(folder, edit, file="model.safetensors"):
        tensors = load_file(folder / file)
        edit(tensors)
        save_file(tensors, folder / file, metadata={"format": "pt"})

    return apply


@pytest.fixture(scope="session")
def assert_same():
    def compare(model, other):
        assert dict(model.state_dict()).keys() == dict(other.state_dict()).keys()
        for name, value in model.state_dict().items():
            assert value.dtype == other.state_dict()[name].dtype
            assert torch.equal(value, other.state_dict()[name]), name

    return compare
