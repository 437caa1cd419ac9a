"""A checkpoint's tokenizer: loaded without its code, its chat markup, and its twin for people's texts."""

import json
import re
import sys
from collections.abc import Set
from itertools import groupby
from pathlib import Path

from tokenizers import Tokenizer
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from common.files import text_hash
from common.tokenizer.chat_template import DATE, Conversation, render

INSTRUCTION_SLOT = "@@instruction@@"
CONVERSATION_SLOT = "@@conversation@@"
# Behaviour that a vocabulary alone does not show: spaces, digits, casing, bytes, markup typed by a user.
PROBES = (
    "Hello  world\n\t3.14",
    "naïve 東京 🦙",
    "<bos><end_of_turn><|eot_id|>",
    "    def f(x):\r\n",
    "\ufffd\x00",
)
UNKNOWN = "\U0010fffd \x00 🦙 ꙮ"
"""Characters that a vocabulary without bytes does not know."""
HTML = (
    "a b blockquote br caption code div em h1 h2 h3 h4 h5 h6 hr i img li ol p pre s span strong sub sup "
    "table tbody td tfoot th thead tr u ul"
)
ORDINARY = re.compile(rf"[\s▁]*|\w+|.|</?({'|'.join(HTML.split())})/?>")
"""Added tokens that are people's text even where they look like markup: white space, words, HTML tags."""
BRACKETED = re.compile(r"\s*(<.+>|\[.+\]|\{.+\})\s*", re.DOTALL)
"""The look of a control marker: <|im_end|>, </think>, [INST], <unused7>."""


def load_tokenizer(folder: Path) -> PreTrainedTokenizerBase:
    """The tokenizer that lies in a checkpoint folder; Python files of the folder are never run.

    Raises:
        ValueError: There is none, its files cannot be read, or it needs code of its own.
    """
    # Without these files transformers makes up an empty vocabulary instead of failing.
    if not any((folder / name).is_file() for name in ("tokenizer.json", "tokenizer.model")):
        raise ValueError(
            f"{folder} has no tokenizer.json; fetch the checkpoint again, or copy its tokenizer's files there"
        )
    stdin, sys.stdin = sys.stdin, None  # nobody is asked whether foreign code may run
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    except Exception as error:  # a broken file makes the libraries raise anything, a bare Exception included
        if "trust_remote_code" in str(error):
            raise ValueError(
                f"the tokenizer in {folder} is Python code of its own, which is never run; take a checkpoint "
                "whose tokenizer.json is enough"
            ) from error
        raise ValueError(
            f"the tokenizer in {folder} cannot be read: {type(error).__name__}: {error}. "
            "Fetch the checkpoint again, or copy the tokenizer's files into it"
        ) from error
    finally:
        sys.stdin = stdin
    if not tokenizer.is_fast:
        raise ValueError(f"{folder} has no tokenizer.json that the tokenizers library reads; add one")
    return tokenizer


def tokenizer_hash(tokenizer: PreTrainedTokenizerBase) -> str:
    """Identity of a tokenizer by what it does: vocabulary, merges, control tokens, and ids of probe texts.

    The serialised form as a whole is not hashed: it changes between library versions.
    """
    merges = json.loads(tokenizer.backend_tokenizer.to_str())["model"].get("merges", [])
    merged = "\n".join(pair if isinstance(pair, str) else " ".join(pair) for pair in merges)
    vocabulary = "\n".join(f"{token!r} {i}" for token, i in sorted(tokenizer.get_vocab().items()))
    special = repr(sorted(zip(tokenizer.all_special_ids, tokenizer.all_special_tokens, strict=True)))
    probes = [
        repr(tokenizer(probe, add_special_tokens=False, split_special_tokens=split).input_ids)
        for probe in PROBES
        for split in (False, True)
    ]
    return text_hash(vocabulary, merged, special, *probes)


def chat_markup(tokenizer: PreTrainedTokenizerBase, *, date: str = DATE) -> tuple[str, str, str]:
    """What the chat template writes before the instruction, between it and the conversation, and after.

    Args:
        tokenizer: Where its template refuses a system message, the instruction goes into the user's.
        date: Today, for the template: YYYY-MM-DD.

    Raises:
        ValueError: There is no template, or it fails, is cut off, or does not show both messages once.
    """
    name = tokenizer.name_or_path
    if not tokenizer.chat_template:
        raise ValueError(
            f"the tokenizer of {name} has no chat template; use an instruction-tuned model, or add "
            "chat_template.jinja to its folder"
        )
    user = {"role": "user", "content": CONVERSATION_SLOT}
    both = {"role": "user", "content": f"{INSTRUCTION_SLOT}\n\n{CONVERSATION_SLOT}"}
    asked: list[Conversation] = [[{"role": "system", "content": INSTRUCTION_SLOT}, user], [both]]
    try:
        template = tokenizer.get_chat_template()
        if not isinstance(template, str):
            raise ValueError(f"it is no text but a {type(template).__name__}")
        found = render(template, asked, variables=tokenizer.special_tokens_map, date=date)
        for text, _ in found:
            before, *rest = re.split(f"({INSTRUCTION_SLOT}|{CONVERSATION_SLOT})", text)
            if rest[::2] == [INSTRUCTION_SLOT, CONVERSATION_SLOT]:
                return before, *rest[1::2]
        text, reason = found[-1]
        raise ValueError(reason or f"it drops, repeats or reorders messages: {text[:500]!r}")
    except ValueError as error:
        raise ValueError(
            f"the chat template of {name} cannot be used: {error}. Put one that can into chat_template.jinja"
        ) from error


def split_control(tokenizer: PreTrainedTokenizerBase, emitted: Set[int]) -> tuple[Tokenizer, frozenset[int]]:
    """The tokenizer's twin for people's texts, in which control tokens are text, and the ids it never gives.

    An added token is control if the library calls it special, if the template emits it, or if it looks like
    markup, unless it is ordinary text (`ORDINARY`).

    Args:
        emitted: Ids that the chat template's markup gives.

    Raises:
        ValueError: A text gives the id of a control token all the same.
    """
    backend = tokenizer.backend_tokenizer
    added = sorted(backend.get_added_tokens_decoder().items())
    control = dict(zip(tokenizer.all_special_ids, tokenizer.all_special_tokens, strict=True))
    for i, token in added:
        text = token.content
        is_markup = BRACKETED.fullmatch(text) or text in tokenizer.get_chat_template()
        is_emitted = i in emitted and text.strip("▁ \t\r\n")
        if token.special or is_emitted or (is_markup and not ORDINARY.fullmatch(text)):
            control[i] = text
    twin = Tokenizer(backend.model)  # shares the model: a copy of a large vocabulary takes seconds
    twin.normalizer, twin.pre_tokenizer = backend.normalizer, backend.pre_tokenizer
    for is_control, group in groupby(added, key=lambda pair: pair[0] in control):
        add = twin.add_special_tokens if is_control else twin.add_tokens
        add([token for _, token in group])
    twin.encode_special_tokens = True
    assert all(twin.token_to_id(token.content) == i for i, token in added)
    never = set(control)
    if list(tokenizer.special_tokens_map.values()).count(tokenizer.unk_token) == 1:
        never -= {tokenizer.unk_token_id} - emitted  # what an unknown character gives, and nothing else
    texts = [UNKNOWN, *(form for text in control.values() for form in (text, f" a{text}b\n{text}{text} "))]
    for text, encoding in zip(texts, twin.encode_batch(texts, add_special_tokens=False), strict=True):
        if given := never & set(encoding.ids):
            raise ValueError(
                f"the tokenizer of {tokenizer.name_or_path} gives the control token "
                f"{control[min(given)]!r} for the text {text!r}: whoever types it could steer the model. "
                "Take another checkpoint"
            )
    return twin, frozenset(never)
