"""How many tokens comparisons take, whole and as cut to a budget."""

import numpy as np
import polars as pl

from common.console import progress
from common.data.table import TEXTS
from common.models.zoo import find_checkpoint
from common.prompts import Prompter, load_tokenizer

ROWS_PER_CHUNK = 1_000
NO_BUDGET = 2**40
"""Tokens that no conversation has."""


def load_prompters(checkpoint: str, conversation_tokens: int) -> tuple[Prompter, Prompter]:
    """Prompters of one tokenizer: without a budget, and with it."""
    tokenizer = load_tokenizer(find_checkpoint(checkpoint, weights=False))
    whole, cut = (
        Prompter(tokenizer, conversation_tokens=budget) for budget in (NO_BUDGET, conversation_tokens)
    )
    return whole, cut


def count_tokens(frame: pl.DataFrame, whole: Prompter, cut: Prompter) -> tuple[np.ndarray, np.ndarray]:
    """Tokens of each comparison as a PAB sequence, without a budget and with one; int64 [comparisons]."""
    counts: list[tuple[int, int]] = []
    with progress("tokenising", len(frame), "comparisons") as advance:
        for start in range(0, len(frame), ROWS_PER_CHUNK):
            texts = frame[start : start + ROWS_PER_CHUNK].select(TEXTS).rows()
            for tokenised in whole.tokenise(texts):
                rendered = cut.render(tokenised)
                kept = len(rendered.input_ids)
                counts.append((len(whole.render(tokenised).input_ids) if rendered.truncated else kept, kept))
            advance(len(texts))
    before, after = np.array(counts, dtype=np.int64).T
    return before, after
