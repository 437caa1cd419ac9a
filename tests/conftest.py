"""Shared by all tests: one thread (two cores, tiny sizes), and small tokenizers made here."""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ["COLUMNS"] = "120"  # tables are read back by tests
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import pytest
import torch
from helpers import make_tokenizer

from common.locks import release

torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def end_of_script():
    """Gives back what a script would hold until its end."""
    yield
    release()


@pytest.fixture(scope="session")
def gemma_tokenizer():
    """A byte-level BPE tokenizer with Gemma's control tokens and chat template (no system role)."""
    return make_tokenizer("gemma")


@pytest.fixture(scope="session")
def llama_tokenizer():
    """A byte-level BPE tokenizer with Llama-3's control tokens and chat template."""
    return make_tokenizer("llama")
