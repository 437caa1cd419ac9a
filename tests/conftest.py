"""Shared by all tests: one thread (two cores, tiny sizes), and small tokenizers made here."""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ["COLUMNS"] = "120"  # tables are read back by tests
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import pytest
import torch
from helpers import make_tokenizer

from common import runs
from common.locks import lock, release

torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def end_of_script(request, monkeypatch):
    """Gives back what a script would hold until its end; those of data_prep are called as functions here."""

    def hold_for_a_moment(path):
        with lock(path):
            pass

    if request.path.parent.name == "data_prep":
        monkeypatch.setattr(runs, "hold", hold_for_a_moment)
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
