"""Small tokenizers, checkpoints and comparisons for the tests."""

import fcntl
import json
import os
import random
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import IO

import polars as pl
import torch
import xxhash
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import (
    Gemma2Config,
    Gemma2ForSequenceClassification,
    LlamaConfig,
    LlamaForSequenceClassification,
    PreTrainedTokenizerFast,
)

from common.data.sources.find import fetch
from common.data.sources.votes import open_competition, read_competition
from common.data.table import LABELS, SCHEMA
from data_prep.demo_arena import (
    GEMMA_CONTROL,
    GEMMA_TEMPLATE,
    LLAMA_CONTROL,
    LLAMA_TEMPLATE,
    train_tokenizer,
)

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

FAMILIES = {"gemma": (GEMMA_CONTROL, GEMMA_TEMPLATE), "llama": (LLAMA_CONTROL, LLAMA_TEMPLATE)}


def make_tokenizer(family: str) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer of a few hundred tokens in the form of a published one."""
    return train_tokenizer([" ".join(WORDS)] * 3, *FAMILIES[family])


SHAPES = {  # control markers by whether the tokenizer calls them special, ordinary added tokens, template
    "gemma": (
        ["<pad>", "<eos>", "<bos>", "<unk>", "<start_of_turn>", "<end_of_turn>"],
        ["<mask>", "[@BOS@]", "<unused7>"],
        ["\n\n", "\n\n\n", "▁▁", "▁▁▁▁", "<table>", "</table>", "<h1>", "<b>"],
        GEMMA_TEMPLATE,
    ),
    "llama": (
        ["<|begin_of_text|>", "<|end_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"],
        ["<|python_tag|>", "[TOOL_CALLS]", "<<SYS>>"],
        [],
        """\
{{ bos_token }}{% if not date_string is defined %}\
{% if strftime_now is defined %}{% set date_string = strftime_now("%d %b %Y") %}\
{% else %}{% set date_string = "26 Jul 2024" %}{% endif %}{% endif %}\
{% if messages[0].role == 'system' %}{% set system = messages[0].content | trim %}\
{% set messages = messages[1:] %}{% else %}{% set system = '' %}{% endif %}\
{{ '<|start_header_id|>system<|end_header_id|>\\n\\nCutting Knowledge Date: December 2023\\n' }}\
{{ 'Today Date: ' + date_string + '\\n\\n' + system + '<|eot_id|>' }}\
{% for message in messages %}{% if message.tool_calls %}{{ '<|python_tag|>' }}{% endif %}\
{{ '<|start_header_id|>' + message.role + '<|end_header_id|>\\n\\n' }}\
{{ message.content | trim + '<|eot_id|>' }}\
{% endfor %}\
{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}{% endif %}""",
    ),
    "chatml": (
        ["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
        ["<think>", "</think>", "<tool_call>", "</tool_call>", "<|fim_prefix|>", "]~b]", "assistant"],
        [],
        """\
{% for message in messages %}\
{{ '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>\\n' }}\
{% if message.tool_calls %}{{ '<tool_call>]~b]' }}{% endif %}{% endfor %}\
{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n<think>\\n\\n</think>\\n\\n' }}{% endif %}""",
    ),
}


def make_shaped_tokenizer(shape: str) -> PreTrainedTokenizerFast:
    """A few hundred tokens, built as the published tokenizers of Gemma, Llama 3.1 and ChatML (Qwen) are.

    Gemma's is SentencePiece's BPE with bytes, Llama's takes whole words of its vocabulary (`ignore_merges`).
    """
    special, markers, ordinary, template = SHAPES[shape]
    tokenizer = Tokenizer(models.BPE())
    if shape == "gemma":
        tokenizer.normalizer = normalizers.Replace(" ", "▁")
        tokenizer.pre_tokenizer = pre_tokenizers.Split(" ", "merged_with_previous")
        tokenizer.decoder = decoders.Sequence(
            [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
        )
        held, alphabet = [*special, *markers, *ordinary, *(f"<0x{i:02X}>" for i in range(256))], []
    else:
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        tokenizer.decoder = decoders.ByteLevel()
        held, alphabet = [], pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=700, special_tokens=held, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator([" ".join(WORDS) + " < > | / [ ] _"] * 3, trainer)
    state = json.loads(tokenizer.to_str())
    state["added_tokens"] = []
    state["model"] |= {
        "gemma": {"byte_fallback": True, "fuse_unk": True, "unk_token": "<unk>"},
        "llama": {"ignore_merges": True},
        "chatml": {},
    }[shape]
    tokenizer = Tokenizer.from_str(json.dumps(state))
    tokenizer.add_special_tokens([AddedToken(text, normalized=False) for text in special])
    tokenizer.add_tokens([AddedToken(text, normalized=False) for text in (*markers, *ordinary)])
    names = ["pad_token", "eos_token", "bos_token", "unk_token"] if shape == "gemma" else []
    names = {"llama": ["bos_token", "eos_token"], "chatml": ["eos_token"]}.get(shape, names)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, chat_template=template, **dict(zip(names, special, strict=False))
    )


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


def make_preference(**changes) -> dict:
    """What a stage writes into preference.json, as far as any code reads it."""
    return {
        "stage": "stage3",
        "model": "tiny-gemma",
        "classes": list(LABELS),
        "formats": ["PAB"],
        "prompt": {
            "template_hash": "a" * 64,
            "prompt_hash": "b" * 64,
            "instruction": "Which?",
            "conversation_tokens": 200,
        },
        "label_prior": [0.4, 0.35, 0.25],
        "lineage": {"train": "v" * 64, "held_out": None, "parent": "artifacts/stage2/x"},
    } | changes


def make_comparisons(
    count: int, *, seed: int = 0, source: str = "test", labelled: bool = True
) -> pl.DataFrame:
    """Random comparisons of one to three turns; the answer with more of the word "good" wins."""
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


def few_or_many(rows: st.SearchStrategy) -> st.SearchStrategy[list]:
    """Lists of one to six, where a single row decides, or of 20 to 60, where many meet."""
    return st.lists(rows, min_size=1, max_size=6) | st.lists(rows, min_size=20, max_size=60)


def key_of(turns: list[str | None]) -> bytes:
    """`common.data.chats.stable_key` of a list, in plain Python."""
    text = "".join("n" if turn is None else f"{len(turn.encode())}:{turn}" for turn in turns)
    return xxhash.xxh3_128_digest(text.encode())


def read_competition_file(path: Path, *, source: str = "arena55k", skip_bad_rows: bool = False):
    """Comparisons and report of one file in the competition's columns."""
    with TemporaryDirectory() as scratch:
        files = fetch([str(path)], Path(scratch))
        return read_competition(open_competition(files, source, Path(scratch)), skip_bad_rows=skip_bad_rows)


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


def read_losses(folder: Path, metric: str = "loss") -> list[float]:
    """The logged losses of a run, or another metric, in the order of its steps."""
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line)[metric] for line in lines]


@contextmanager
def held_elsewhere(output: Path) -> Iterator[IO]:
    """The lock of an output as another process would hold it; yields its file."""
    path = output.with_name(f".{output.name}.lock")
    path.parent.mkdir(parents=True, exist_ok=True)
    who = {"process": 4321, "host": "elsewhere", "start": "2031-01-02 03:04:05+00:00", "command": "stage1.py"}
    path.write_text(json.dumps(who))
    with path.open("a") as file:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield file


HELD = "is being written by process 4321 on elsewhere .started 2031-01-02 03:04:05.00:00: stage1.py"
"""What a second start is told then, as a regular expression."""
