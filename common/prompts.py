"""A comparison -> token ids: the only place where text becomes tokens, in training, labelling and serving.

A comparison is a row of parts (chat markup, instruction, headings, turns, answers, verdict cue). Every part
is tokenised on its own and the ids are laid end to end, so a part's ids never depend on its neighbours.

PAB:   for every turn: the user's text, answer A, answer B.
PAPB:  the whole conversation with A, then the whole conversation with B.
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Literal, NamedTuple

from jinja2 import TemplateError
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from common.files import text_hash

Format = Literal["PAB", "PAPB"]
FORMATS: tuple[Format, ...] = ("PAB", "PAPB")

INSTRUCTION = (
    "Two assistants answered the same user. Which answer will the user prefer: A, B, or neither (a tie)?"
)
USER = "[User]\n"
ANSWER_A = "\n\n[Answer A]\n"
ANSWER_B = "\n\n[Answer B]\n"
END_OF_TURN = "\n\n"
CONVERSATION_A = "[Conversation with A]\n\n"
CONVERSATION_B = "[Conversation with B]\n\n"
OMITTED = "[earlier turns left out]\n\n"
CUT = "\n[...]\n"
NULL_TURN = "(null)"
VERDICT = "[Preferred answer]"
PIECES = (
    *(USER, ANSWER_A, ANSWER_B, END_OF_TURN, CONVERSATION_A, CONVERSATION_B),
    *(OMITTED, CUT, NULL_TURN, VERDICT),
)

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


class TokenisedComparison(NamedTuple):
    """Token ids of every turn's texts, each tokenised on its own."""

    prompt: list[list[int]]
    response_a: list[list[int]]
    response_b: list[list[int]]


class Rendered(NamedTuple):
    """One comparison as the model reads it."""

    input_ids: list[int]
    truncated: bool
    """Something was cut or left out to stay inside the budget."""
    became_identical: bool
    """The answers differ, but what was kept of them does not."""


class Prompter:
    """Renders comparisons for one tokenizer, instruction and budget.

    Args:
        tokenizer: With a chat template; a template that refuses a system message gets the instruction in
            the user's message.
        conversation_tokens: Budget in tokens of the conversation: turns, answers and their headings. In PAPB
            each side has half of it. Chat markup, instruction and verdict cue come on top.
        instruction: What the model is asked; its text never becomes control tokens.

    Raises:
        ValueError: No chat template, or a budget too small to show both answers of one turn.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        *,
        conversation_tokens: int,
        instruction: str = INSTRUCTION,
    ) -> None:
        self.tokenizer = tokenizer
        self.conversation_tokens = conversation_tokens
        self.instruction = instruction
        before, between, after = _chat_markup(tokenizer)
        self._ids = {piece: self._markup(piece) for piece in PIECES}
        [instruction_ids] = self._plain([instruction])
        self.prefix_ids = [*_bos(tokenizer, self._markup(before)), *instruction_ids, *self._markup(between)]
        self.suffix_ids = [*self._ids[VERDICT], *self._markup(after)]
        self.template_hash = text_hash(*PIECES, before, between, after, tokenizer_hash(tokenizer))
        self.prompt_hash = text_hash(self.template_hash, instruction, str(conversation_tokens))
        # A cut text keeps the marker and one token on either side.
        self._least_text = len(self._ids[CUT]) + 2
        self._check_budget()

    def tokenise(
        self, comparisons: Sequence[tuple[Sequence[str | None], Sequence[str | None], Sequence[str | None]]]
    ) -> list[TokenisedComparison]:
        """Tokenises (prompt, response_a, response_b) turn lists, all their texts in one call."""
        texts = [clean_text(text) for comparison in comparisons for turns in comparison for text in turns]
        ids = iter(self._plain(texts))
        return [
            TokenisedComparison(*([next(ids) for _ in turns] for turns in comparison))
            for comparison in comparisons
        ]

    def render(
        self, comparison: TokenisedComparison, *, format: Format = "PAB", swapped: bool = False
    ) -> Rendered:
        """Lays a tokenised comparison out within the budget; `swapped` exchanges the answers."""
        prompt, first, second = comparison
        if swapped:
            first, second = second, first
        if format == "PAB":
            turns = list(zip(prompt, first, second, strict=True))
            body, kept = self._lay_out(turns, (USER, ANSWER_A, ANSWER_B), self.conversation_tokens)
            kept_first, kept_second = [turn[1] for turn in kept], [turn[2] for turn in kept]
            truncated = kept != turns
        elif format == "PAPB":
            body, sides = [], []
            for heading, answer_heading, answers in (
                (CONVERSATION_A, ANSWER_A, first),
                (CONVERSATION_B, ANSWER_B, second),
            ):
                turns = list(zip(prompt, answers, strict=True))
                budget = self.conversation_tokens // 2 - len(self._ids[heading])
                side, kept = self._lay_out(turns, (USER, answer_heading), budget)
                body += self._ids[heading] + side
                sides.append(([turn[1] for turn in kept], kept != turns))
            (kept_first, cut_first), (kept_second, cut_second) = sides
            truncated = cut_first or cut_second
        else:
            raise ValueError(f"format {format!r} is unknown; known: {', '.join(FORMATS)}")
        became_identical = kept_first == kept_second and first != second
        return Rendered([*self.prefix_ids, *body, *self.suffix_ids], truncated, became_identical)

    def describe(self) -> dict[str, object]:
        """What a checkpoint must remember of its prompt."""
        return {
            "template_hash": self.template_hash,
            "prompt_hash": self.prompt_hash,
            "instruction": self.instruction,
            "conversation_tokens": self.conversation_tokens,
        }

    def _plain(self, texts: Sequence[str]) -> list[list[int]]:
        """Token ids of people's texts; markup inside them stays text."""
        if not texts:
            return []
        return self.tokenizer(
            list(texts), add_special_tokens=False, split_special_tokens=True, verbose=False
        ).input_ids

    def _markup(self, text: str) -> list[int]:
        """Token ids of our own template text, in which control tokens are meant."""
        return self.tokenizer(text, add_special_tokens=False).input_ids if text else []

    def _lay_out(
        self, turns: Sequence[tuple[list[int], ...]], headings: tuple[str, ...], budget: int
    ) -> tuple[list[int], list[tuple[list[int], ...]]]:
        """Token ids of the turns that fit, and the turns as kept, earliest first."""
        overhead = sum(len(self._ids[heading]) for heading in headings) + len(self._ids[END_OF_TURN])
        kept = self._spend(turns, overhead, budget)
        body = [] if len(kept) == len(turns) else list(self._ids[OMITTED])
        for turn in kept:
            for heading, text in zip(headings, turn, strict=True):
                body += self._ids[heading] + text
            body += self._ids[END_OF_TURN]
        return body, kept

    def _spend(
        self, turns: Sequence[tuple[list[int], ...]], overhead: int, budget: int
    ) -> list[tuple[list[int], ...]]:
        """Spends the budget from the last turn backwards; where it runs out a turn is cut, the rest left."""
        costs = [overhead + sum(len(text) for text in turn) for turn in turns]
        if sum(costs) <= budget:
            return list(turns)
        if len(turns) > 1:
            budget -= len(self._ids[OMITTED])
        kept: list[tuple[list[int], ...]] = []
        for turn, cost in zip(reversed(turns), reversed(costs), strict=True):
            if cost <= budget:
                kept.append(turn)
                budget -= cost
                continue
            if budget - overhead >= self._least_turn(len(turn)):
                lengths = cut_lengths([len(text) for text in turn], budget - overhead, self._least_text)
                kept.append(tuple(self._cut(text, n) for text, n in zip(turn, lengths, strict=True)))
            break
        return kept[::-1]

    def _least_turn(self, num_texts: int) -> int:
        """Tokens with which a turn of `num_texts` texts can be cut: the prompt takes a quarter at most."""
        return max(4, num_texts) * self._least_text

    def _cut(self, text: list[int], length: int) -> list[int]:
        """Takes the middle out of `text` behind a visible marker, so that `length` tokens remain."""
        if len(text) <= length:
            return text
        around = length - len(self._ids[CUT])
        head = (around + 1) // 2
        return text[:head] + self._ids[CUT] + text[len(text) - (around - head) :]

    def _check_budget(self) -> None:
        ids, least = self._ids, self._least_turn(3)
        pab = sum(len(ids[p]) for p in (OMITTED, USER, ANSWER_A, ANSWER_B, END_OF_TURN)) + least
        side = sum(len(ids[p]) for p in (OMITTED, CONVERSATION_B, USER, ANSWER_B, END_OF_TURN)) + least
        if self.conversation_tokens < max(pab, 2 * side):
            raise ValueError(
                f"conversation_tokens is {self.conversation_tokens}, but headings and the least of one turn "
                f"need {max(pab, 2 * side)} tokens with this tokenizer; raise --conversation-tokens"
            )


def cut_lengths(lengths: Sequence[int], budget: int, least: int) -> list[int]:
    """Tokens that each text of one turn keeps: the prompt yields first, the answers are cut in proportion.

    Args:
        lengths: Tokens of the prompt, then of each answer; their sum is over the budget.
        budget: Tokens to share, at least `max(4, number of texts) * least`.
        least: Tokens that every text keeps (or all that it has).

    Example: prompt 100, answers 300 and 100, budget 250, least 5 -> [62, 141, 47].
    """
    prompt, *answers = lengths
    prompt_kept = min(prompt, max(budget // 4, budget - sum(answers)))
    rest = budget - prompt_kept
    total = sum(answers)
    if total <= rest:
        return [prompt_kept, *answers]
    kept = [max(min(answer, least), rest * answer // total) for answer in answers]
    while (excess := sum(kept) - rest) > 0:
        longest = kept.index(max(kept))
        kept[longest] -= excess
    return [prompt_kept, *kept]


def clean_text(text: str | None) -> str:
    """A text that every tokenizer takes: null has one fixed rendering, lone surrogates become U+FFFD."""
    if text is None:
        return NULL_TURN
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


def read_instruction(path: Path | None) -> str:
    """The instruction in a text file, or ours."""
    if path is None:
        return INSTRUCTION
    try:
        text = path.read_text(encoding="utf-8").strip()
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"--instruction {path} cannot be read: {error}") from error
    if not text:
        raise ValueError(f"--instruction {path} is empty")
    return text


def load_tokenizer(folder: Path) -> PreTrainedTokenizerBase:
    """The tokenizer that lies in a checkpoint folder.

    Raises:
        ValueError: There is none, or its files cannot be read.
    """
    # Without these files transformers makes up an empty vocabulary instead of failing.
    if not any((folder / name).is_file() for name in ("tokenizer.json", "tokenizer.model")):
        raise ValueError(
            f"{folder} has no tokenizer.json; fetch the checkpoint again, or copy its tokenizer's files there"
        )
    try:
        return AutoTokenizer.from_pretrained(folder)
    except Exception as error:  # a broken file makes the libraries raise anything, a bare Exception included
        raise ValueError(
            f"the tokenizer in {folder} cannot be read: {type(error).__name__}: {error}. "
            "Fetch the checkpoint again, or copy the tokenizer's files into it"
        ) from error


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


def _chat_markup(tokenizer: PreTrainedTokenizerBase) -> tuple[str, str, str]:
    """What the chat template writes before the instruction, between it and the conversation, and after."""
    if not tokenizer.chat_template:
        raise ValueError(
            f"the tokenizer of {tokenizer.name_or_path} has no chat template; use an instruction-tuned "
            "model, or add chat_template.jinja to its folder"
        )
    user = {"role": "user", "content": CONVERSATION_SLOT}
    try:
        text = _apply(tokenizer, [{"role": "system", "content": INSTRUCTION_SLOT}, user])
    except TemplateError:  # such as Gemma's: "System role not supported"
        text = ""
    if INSTRUCTION_SLOT not in text:
        user = {"role": "user", "content": f"{INSTRUCTION_SLOT}\n\n{CONVERSATION_SLOT}"}
        text = _apply(tokenizer, [user])
    before, found, rest = text.partition(INSTRUCTION_SLOT)
    between, found_too, after = rest.partition(CONVERSATION_SLOT)
    if not (found and found_too):
        raise ValueError(
            f"the chat template of {tokenizer.name_or_path} drops or reorders the user's message: {text!r}"
        )
    return before, between, after


def _apply(tokenizer: PreTrainedTokenizerBase, messages: list[dict[str, str]]) -> str:
    return tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)


def _bos(tokenizer: PreTrainedTokenizerBase, ids: list[int]) -> list[int]:
    """`ids` with the one bos that the tokenizer itself would put there; never two."""
    bos = tokenizer.bos_token_id
    adds_bos = bos is not None and tokenizer("a").input_ids[:1] == [bos]
    while ids[:2] == [bos, bos]:
        ids = ids[1:]
    return [bos, *ids] if adds_bos and ids[:1] != [bos] else ids
