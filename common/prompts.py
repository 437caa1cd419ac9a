"""A comparison -> token ids: the only place where text becomes tokens, in training, labelling and serving.

A comparison is a row of parts (chat markup, instruction, headings, turns, answers, verdict cue). Every part
is tokenised on its own and the ids are laid end to end, so a part's ids never depend on its neighbours.

PAB:   for every turn: the user's text, answer A, answer B.
PAPB:  the whole conversation with A, then the whole conversation with B.
"""

import copy
from collections.abc import Sequence
from pathlib import Path
from typing import Literal, NamedTuple

from transformers import PreTrainedTokenizerBase

from common.batching import pack
from common.files import text_hash
from common.tokenizer import DATE, PROBES, chat_markup, split_control, tokenizer_hash

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

NO_BUDGET = 2**40
"""Tokens that no conversation has."""
LAYOUT_PROBES = (  # several turns, of them a null; answers that must be cut and then are alike; odd text
    (["Why?", None, "so " * 9], ["Because.", "", "a " * 40 + "!"], ["No \ud800.", "1, 2", "b " * 20]),
    ([PROBES[0]], ["x " * 200 + "good" + " y" * 200], ["x " * 200 + "bad" + " y" * 200]),
    (["\n".join(PROBES)], ["\n".join(PIECES)], [""]),
)
"""Comparisons whose sequences tell one layout from another."""


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
        date: Today, for a chat template that writes it: YYYY-MM-DD.

    Raises:
        ValueError: The chat template or the tokenizer cannot be used (`common.tokenizer` says when), or the
            budget is too small to show both answers of one turn.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        *,
        conversation_tokens: int,
        instruction: str = INSTRUCTION,
        date: str = DATE,
    ) -> None:
        self.tokenizer = tokenizer
        self.conversation_tokens = conversation_tokens
        self.instruction = instruction
        self.date = date
        chat = chat_markup(tokenizer, date=date)
        self._around = [self._markup(part) for part in chat]
        self._around[0] = _bos(tokenizer, self._around[0])
        emitted = {i for ids in self._around for i in ids}
        self._twin, never = split_control(tokenizer, emitted)
        self.highest_id = max(emitted | set(self._twin.get_vocab().values()) - never)
        """Of all ids that a text or the template can give."""
        self._ids = {piece: self._markup(piece) for piece in PIECES}
        # A cut text keeps the marker and one token on either side.
        self._least_text = len(self._ids[CUT]) + 2
        self._assemble(instruction)
        layout = self._layout_hash()
        self.template_hash = text_hash(*PIECES, *chat, tokenizer_hash(tokenizer), repr(sorted(never)), layout)
        self.prompt_hash = text_hash(self.template_hash, instruction, str(conversation_tokens))
        if conversation_tokens < (least := self._least_budget()):
            raise ValueError(
                f"conversation_tokens is {conversation_tokens}, but headings and the least of one turn need "
                f"{least} tokens with this tokenizer; raise --conversation-tokens"
            )

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
            "date": self.date,
        }

    def _assemble(self, instruction: str) -> None:
        """Lays what stands before and after every conversation."""
        before, between, after = self._around
        [instruction_ids] = self._plain([instruction])
        self.prefix_ids = [*before, *instruction_ids, *between]
        self.suffix_ids = [*self._ids[VERDICT], *after]

    def _layout_hash(self) -> str:
        """What this code makes of fixed comparisons, whatever the instruction and the budget are."""
        probe = copy.copy(self)
        probe._assemble(PROBES[2])
        sequences, flags = [], []
        for budget in (self._least_budget(), 2 * self._least_budget(), NO_BUDGET):
            probe.conversation_tokens = budget
            for comparison in probe.tokenise(LAYOUT_PROBES):
                for format in FORMATS:
                    for swapped in (False, True):
                        ids, *more = probe.render(comparison, format=format, swapped=swapped)
                        sequences.append(ids)
                        flags.append(more)
        packed = [x if isinstance(x, int) else x.tolist() for x in pack(sequences)]
        return text_hash(repr(flags), repr(packed))

    def _plain(self, texts: Sequence[str]) -> list[list[int]]:
        """Token ids of people's texts; markup inside them stays text."""
        return [one.ids for one in self._twin.encode_batch(list(texts), add_special_tokens=False)]

    def _markup(self, text: str) -> list[int]:
        """Token ids of our own template text, in which control tokens are meant."""
        if not text:
            return []
        return self.tokenizer(text, add_special_tokens=False, split_special_tokens=False).input_ids

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

    def _least_budget(self) -> int:
        """Tokens of headings and the least of one turn, in either format."""
        ids, least = self._ids, self._least_turn(3)
        pab = sum(len(ids[p]) for p in (OMITTED, USER, ANSWER_A, ANSWER_B, END_OF_TURN)) + least
        side = sum(len(ids[p]) for p in (OMITTED, CONVERSATION_B, USER, ANSWER_B, END_OF_TURN)) + least
        return max(pab, 2 * side)


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


def _bos(tokenizer: PreTrainedTokenizerBase, ids: list[int]) -> list[int]:
    """`ids` with the one bos that the tokenizer itself would put there; never two."""
    bos = tokenizer.bos_token_id
    adds_bos = bos is not None and tokenizer("a").input_ids[:1] == [bos]
    while ids[:2] == [bos, bos]:
        ids = ids[1:]
    return [bos, *ids] if adds_bos and ids[:1] != [bos] else ids
