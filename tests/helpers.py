"""Small tokenizers, checkpoints and comparisons for the tests."""

import json
import os
import random
import subprocess
import sys
from pathlib import Path

import polars as pl
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    Gemma2Config,
    Gemma2ForSequenceClassification,
    LlamaConfig,
    LlamaForSequenceClassification,
    PreTrainedTokenizerFast,
)

from common.pairs import SCHEMA
from common.prompts import INSTRUCTION, PIECES

ROOT = Path(__file__).resolve().parent.parent
WORDS = [
    "the",
    "a",
    "red",
    "blue",
    "fox",
    "dog",
    "runs",
    "sleeps",
    "over",
    "under",
    "hill",
    "river",
    "and",
    "or",
    "but",
    "quick",
    "lazy",
    "good",
    "bad",
    "fine",
]

GEMMA_TEMPLATE = (
    "{{ bos_token }}{% if messages[0]['role'] == 'system' %}{{ raise_exception('System role not supported') }}"
    "{% endif %}{% for message in messages %}{{ '<start_of_turn>' + message['role'] + '\n' + message['content'] "
    "| trim + '<end_of_turn>\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<start_of_turn>model\n' }}"
    "{% endif %}"
)
LLAMA_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}{{ '<|start_header_id|>' + message['role'] + "
    "'<|end_header_id|>\n\n' + message['content'] | trim + '<|eot_id|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
)
CONTROL = {
    "gemma": ["<pad>", "<eos>", "<bos>", "<start_of_turn>", "<end_of_turn>"],
    "llama": [
        "<|begin_of_text|>",
        "<|end_of_text|>",
        "<|start_header_id|>",
        "<|end_header_id|>",
        "<|eot_id|>",
        "[PAD]",
    ],
}


def make_tokenizer(family: str) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer of about 600 tokens in the form of a published one."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=600,
        special_tokens=CONTROL[family],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([" ".join(WORDS), *PIECES, INSTRUCTION] * 3, trainer)
    names = {
        "gemma": {"pad_token": "<pad>", "eos_token": "<eos>", "bos_token": "<bos>"},
        "llama": {"pad_token": "[PAD]", "eos_token": "<|eot_id|>", "bos_token": "<|begin_of_text|>"},
    }[family]
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, **names)
    others = [token for token in CONTROL[family] if token not in names.values()]
    fast.add_special_tokens({"additional_special_tokens": others})
    fast.chat_template = GEMMA_TEMPLATE if family == "gemma" else LLAMA_TEMPLATE
    return fast


def make_checkpoint(folder: Path, family: str, *, seed: int = 0) -> Path:
    """A two-layer backbone with its tokenizer, in the published file format."""
    tokenizer = make_tokenizer(family)
    torch.manual_seed(seed)
    shape = {
        "vocab_size": len(tokenizer),
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "pad_token_id": tokenizer.pad_token_id,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "initializer_range": 0.2,
    }
    if family == "gemma":
        config = Gemma2Config(**shape, sliding_window=16, query_pre_attn_scalar=6)
        model = Gemma2ForSequenceClassification(config)
    else:
        model = LlamaForSequenceClassification(LlamaConfig(**shape))
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def make_comparisons(
    count: int, *, seed: int = 0, source: str = "test", labelled: bool = True
) -> pl.DataFrame:
    """Random comparisons of one to three turns in which the answer with more of the word "good" tends to win."""
    draw = random.Random(seed)

    def text(longest: int) -> str:
        return " ".join(draw.choices(WORDS, k=draw.randint(1, longest)))

    rows = []
    for i in range(count):
        turns = draw.choice((1, 1, 1, 2, 3))
        prompt, first, second = ([text(n) for _ in range(turns)] for n in (8, 20, 20))
        votes = [" ".join(answers).split().count("good") for answers in (first, second)]
        winner = 2 if votes[0] == votes[1] else int(votes[1] > votes[0])
        labels = [float(winner == c) if labelled else None for c in range(3)]
        rows.append(
            (f"{seed}-{i}", source, "m1", "m2", prompt, first, second, *labels, i % 5 if labelled else None)
        )
    return pl.DataFrame(rows, schema=SCHEMA, orient="row")


def run_script(
    *arguments: object, environment: dict | None = None, timeout: int = 240
) -> subprocess.CompletedProcess:
    """Runs one of our scripts in a process of its own; output is text."""
    return subprocess.run(
        [sys.executable, *(str(argument) for argument in arguments)],
        cwd=ROOT,
        env=os.environ | {"OMP_NUM_THREADS": "1", "COLUMNS": "120"} | (environment or {}),
        capture_output=True,
        text=True,
        timeout=timeout,
    )


def read_losses(folder: Path) -> list[float]:
    """The logged losses of a run, in the order of its steps."""
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line)["loss"] for line in lines]
