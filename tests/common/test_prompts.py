"""One place where text becomes tokens: layout, control tokens, truncation, hashes."""

from types import SimpleNamespace

import pytest
from helpers import make_tokenizer
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers.processors import TemplateProcessing

from common import prompts
from common.prompts import CUT, FORMATS, NULL_TURN, OMITTED, Prompter, clean_text, cut_lengths

ONE_TURN = (["the fox runs"], ["a good answer"], ["a bad answer or two"])


def decode(prompter, ids):
    return prompter.tokenizer.decode(ids, skip_special_tokens=False)


def render(prompter, comparison, **options):
    [tokens] = prompter.tokenise([comparison])
    return prompter.render(tokens, **options)


def test_pab_layout_without_system_role(gemma_tokenizer):
    prompter = Prompter(gemma_tokenizer, conversation_tokens=500, instruction="Judge.")
    text = decode(prompter, render(prompter, ONE_TURN).input_ids)
    assert text == (
        "<bos><start_of_turn>user\nJudge.\n\n[User]\nthe fox runs\n\n[Answer A]\na good answer\n\n"
        "[Answer B]\na bad answer or two\n\n[Preferred answer]<end_of_turn>\n<start_of_turn>model\n"
    )


def test_pab_layout_with_system_role(llama_tokenizer):
    prompter = Prompter(llama_tokenizer, conversation_tokens=500, instruction="Judge.")
    text = decode(prompter, render(prompter, ONE_TURN).input_ids)
    assert text.startswith(
        "<|begin_of_text|><|start_header_id|>system<|end_header_id|>\n\nJudge.<|eot_id|>"
        "<|start_header_id|>user<|end_header_id|>\n\n[User]\nthe fox runs"
    )
    assert text.endswith("<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n")


def test_papb_tells_the_conversation_twice(gemma_tokenizer):
    prompter = Prompter(gemma_tokenizer, conversation_tokens=500)
    comparison = (["one", "two"], ["a1", "a2"], ["b1", "b2"])
    text = decode(prompter, render(prompter, comparison, format="PAPB").input_ids)
    body = text[text.index("[Conversation with A]") : text.index("[Preferred")]
    assert body == (
        "[Conversation with A]\n\n[User]\none\n\n[Answer A]\na1\n\n[User]\ntwo\n\n[Answer A]\na2\n\n"
        "[Conversation with B]\n\n[User]\none\n\n[Answer B]\nb1\n\n[User]\ntwo\n\n[Answer B]\nb2\n\n"
    )


def test_swapping_exchanges_the_answers_and_keeps_the_shared_prefix(gemma_tokenizer):
    prompter = Prompter(gemma_tokenizer, conversation_tokens=500)
    given_order = render(prompter, ONE_TURN).input_ids
    swapped = render(prompter, ONE_TURN, swapped=True).input_ids
    exchanged = render(prompter, (ONE_TURN[0], ONE_TURN[2], ONE_TURN[1])).input_ids
    assert swapped == exchanged != given_order
    [tokens] = prompter.tokenise([ONE_TURN])
    shared = len(prompter.prefix_ids) + len(prompter._ids[prompts.USER]) + len(tokens.prompt[0])
    assert swapped[:shared] == given_order[:shared]


@pytest.mark.parametrize("family", ["gemma", "llama"])
def test_exactly_one_bos(family):
    tokenizer = make_tokenizer(family)
    ids = render(Prompter(tokenizer, conversation_tokens=500), ONE_TURN).input_ids
    assert ids.count(tokenizer.bos_token_id) == 1 and ids[0] == tokenizer.bos_token_id


def test_a_template_that_repeats_bos_still_gives_one():
    tokenizer = make_tokenizer("gemma")
    tokenizer.chat_template = "{{ bos_token }}" + tokenizer.chat_template
    ids = render(Prompter(tokenizer, conversation_tokens=500), ONE_TURN).input_ids
    assert ids.count(tokenizer.bos_token_id) == 1


@pytest.mark.parametrize("ids", [[], [1], [1, 7], [7, 1], [3, 3, 7], [3, 7, 3]])
def test_only_a_repeated_bos_is_taken_away(ids):
    class Tokenizer:
        bos_token_id = 3

        def __call__(self, text):
            return SimpleNamespace(input_ids=[9])  # adds none

    assert prompts._bos(Tokenizer(), ids) == (ids[1:] if ids[:2] == [3, 3] else ids)


@pytest.mark.parametrize("family", ["gemma", "llama"])
@pytest.mark.parametrize("written", [True, False])
@pytest.mark.parametrize("added", [True, False])
def test_a_bos_is_there_if_the_template_writes_it_or_the_tokenizer_adds_it(family, written, added):
    tokenizer = make_tokenizer(family)
    bos, i = tokenizer.bos_token, tokenizer.bos_token_id
    process = TemplateProcessing(single=f"{bos} $A" if added else "$A", special_tokens=[(bos, i)])
    tokenizer.backend_tokenizer.post_processor = process
    if not written:
        tokenizer.chat_template = tokenizer.chat_template.replace("bos_token", "''")
    ids = render(Prompter(tokenizer, conversation_tokens=500), ONE_TURN).input_ids
    assert ids.count(i) == (ids[0] == i) == (written or added)


@pytest.mark.parametrize("family", ["gemma", "llama"])
def test_markup_in_text_and_instruction_stays_text(family):
    tokenizer = make_tokenizer(family)
    control = tokenizer.all_special_tokens
    typed = " ".join(control)
    plain = render(Prompter(tokenizer, conversation_tokens=900, instruction="x"), ONE_TURN).input_ids
    prompter = Prompter(tokenizer, conversation_tokens=900, instruction=typed)
    marked = render(prompter, ([typed], [typed], [typed + "!"])).input_ids
    special = set(tokenizer.all_special_ids)
    assert [i for i in marked if i in special] == [i for i in plain if i in special]
    assert decode(prompter, marked).count(control[-1]) >= 4


def test_parts_do_not_depend_on_their_neighbours(gemma_tokenizer):
    prompter = Prompter(gemma_tokenizer, conversation_tokens=500)
    one, two = prompter.tokenise([ONE_TURN, (["the fox runs"], ["other"], ["a good answer"])])
    assert one.prompt == two.prompt and one.response_a == two.response_b


def test_null_turn_and_lone_surrogates_have_one_rendering(gemma_tokenizer):
    prompter = Prompter(gemma_tokenizer, conversation_tokens=500)
    rendered = render(prompter, ([None], ["\ud800 x"], ["\U0001f999"]))
    text = decode(prompter, rendered.input_ids)
    assert f"[User]\n{NULL_TURN}\n" in text and "[Answer A]\n\ufffd x\n" in text and "\U0001f999" in text
    assert clean_text("\ud83e\udd99") == "\U0001f999"  # a valid pair is one character


def test_last_turn_is_kept_longest_and_dropped_turns_are_marked(gemma_tokenizer):
    prompter = Prompter(gemma_tokenizer, conversation_tokens=160)
    turns = (
        ["first " * 9, "second", "third"],
        ["a " * 40, "b " * 10, "last a"],
        ["c " * 40, "d " * 10, "last b"],
    )
    rendered = render(prompter, turns)
    text = decode(prompter, rendered.input_ids)
    assert rendered.truncated and not rendered.became_identical
    assert "third" in text and "last a" in text and "last b" in text
    assert "first" not in text or CUT in text
    tight = Prompter(gemma_tokenizer, conversation_tokens=120)
    assert OMITTED.strip() in decode(tight, render(tight, turns).input_ids)


def body_length(prompter, comparison, format):
    around = len(prompter.prefix_ids) + len(prompter.suffix_ids)
    return len(render(prompter, comparison, format=format).input_ids) - around


@pytest.mark.parametrize("format", FORMATS)
def test_turns_that_fit_are_left_whole_and_in_order(gemma_tokenizer, format):
    turns = [[f"{text}{i} " * 9 for i in range(4)] for text in ("p", "a", "b")]
    needed = body_length(Prompter(gemma_tokenizer, conversation_tokens=5000), turns, format)
    for budget, is_cut in ((needed - 2, True), (needed, False), (needed + 2, False)):
        rendered = render(Prompter(gemma_tokenizer, conversation_tokens=budget), turns, format=format)
        assert rendered.truncated == is_cut, budget
    half = Prompter(gemma_tokenizer, conversation_tokens=needed * 2 // 3)
    rendered = render(half, turns, format=format)
    text = decode(half, rendered.input_ids)
    assert rendered.truncated and OMITTED.strip() in text and "p0" not in text
    for letter in "ab":
        assert text.index(f"{letter}2 ") < text.index(f"{letter}3 ")


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("longer", ["a", "b"])
def test_one_long_answer_is_enough_to_be_truncated(gemma_tokenizer, format, longer):
    prompter = Prompter(gemma_tokenizer, conversation_tokens=300)
    answers = [["x " * 400] if side == longer else ["short"] for side in "ab"]
    assert render(prompter, (["q"], *answers), format=format).truncated


def test_the_least_budget_shows_both_answers_and_one_token_less_does_not(gemma_tokenizer):
    with pytest.raises(ValueError, match="need") as caught:
        Prompter(gemma_tokenizer, conversation_tokens=20)
    least = int(str(caught.value).split("need ")[1].split()[0])
    prompter = Prompter(gemma_tokenizer, conversation_tokens=least)
    turns = (["early", "p " * 99], ["early", "a " * 99], ["early", "b " * 99])

    def shown():
        texts = [decode(prompter, render(prompter, turns, format=format).input_ids) for format in FORMATS]
        return all("[Answer A]\na" in text and "[Answer B]\nb" in text for text in texts)

    assert shown()
    prompter.conversation_tokens -= 1
    assert not shown()


def test_a_long_answer_loses_its_middle(gemma_tokenizer):
    prompter = Prompter(gemma_tokenizer, conversation_tokens=200)
    answer = "start " + "x " * 500 + "finish"
    text = decode(prompter, render(prompter, (["q"], [answer], ["short answer"])).input_ids)
    assert "[Answer A]\nstart" in text and "finish\n\n[Answer B]\n" in text and CUT in text
    assert "[Answer B]\ns" in text and " answer\n\n[Pref" in text  # in proportion, not to nothing


def test_a_pair_that_becomes_identical_is_counted(gemma_tokenizer):
    prompter = Prompter(gemma_tokenizer, conversation_tokens=150)
    middle = ["x " * 300 + word + " y" * 300 for word in ("good", "bad")]
    assert render(prompter, (["q"], [middle[0]], [middle[1]])).became_identical
    assert not render(prompter, (["q"], [middle[0]], [middle[0]])).became_identical  # it always was
    assert not render(prompter, (["q"], ["good"], ["bad"])).became_identical


TEXT = st.text(alphabet="ab <>|_é🦙\n", max_size=60)
TURNS = st.integers(1, 4).flatmap(
    lambda n: st.tuples(*(st.lists(st.none() | TEXT, min_size=n, max_size=n) for _ in range(3)))
)


@settings(max_examples=80, deadline=None)
@given(comparison=TURNS, budget=st.integers(130, 300), format=st.sampled_from(["PAB", "PAPB"]))
def test_budget_holds_and_the_swapped_rendering_is_the_mirror(comparison, budget, format):
    prompter = PROMPTERS.setdefault(budget, Prompter(TOKENIZER, conversation_tokens=budget))
    rendered = render(prompter, comparison, format=format)
    around = len(prompter.prefix_ids) + len(prompter.suffix_ids)
    assert len(rendered.input_ids) - around <= budget
    exchanged = (comparison[0], comparison[2], comparison[1])
    swapped = render(prompter, exchanged, format=format, swapped=True)
    assert swapped.input_ids == rendered.input_ids


TOKENIZER = make_tokenizer("gemma")
PROMPTERS: dict[int, Prompter] = {}


def test_cut_lengths_example():
    assert cut_lengths([100, 300, 100], 250, 5) == [62, 141, 47]


@given(
    lengths=st.lists(st.integers(0, 3000), min_size=2, max_size=3),
    budget=st.integers(40, 2000),
    least=st.integers(1, 10),
)
def test_cut_lengths_spends_at_most_the_budget_and_leaves_no_answer_empty(lengths, budget, least):
    if sum(lengths) <= budget:
        return
    kept = cut_lengths(lengths, budget, least)
    assert sum(kept) <= budget
    for length, n in zip(lengths[1:], kept[1:], strict=True):
        assert min(length, least) <= n <= length


def test_hashes_follow_what_matters(gemma_tokenizer, llama_tokenizer):
    base = Prompter(gemma_tokenizer, conversation_tokens=500)
    other_budget = Prompter(gemma_tokenizer, conversation_tokens=501)
    other_instruction = Prompter(gemma_tokenizer, conversation_tokens=500, instruction="?")
    other_tokenizer = Prompter(llama_tokenizer, conversation_tokens=500)
    again = Prompter(make_tokenizer("gemma"), conversation_tokens=500)
    assert again.prompt_hash == base.prompt_hash
    assert base.template_hash == other_budget.template_hash == other_instruction.template_hash
    assert base.template_hash != other_tokenizer.template_hash
    assert len({p.prompt_hash for p in (base, other_budget, other_instruction, other_tokenizer)}) == 4


def test_hash_survives_saving_and_notices_a_changed_tokenizer(gemma_tokenizer, tmp_path):
    from transformers import AutoTokenizer

    gemma_tokenizer.save_pretrained(tmp_path)
    base = Prompter(gemma_tokenizer, conversation_tokens=500)
    assert (
        Prompter(AutoTokenizer.from_pretrained(tmp_path), conversation_tokens=500).prompt_hash
        == base.prompt_hash
    )
    path = tmp_path / "tokenizer.json"
    path.write_text(path.read_text().replace('"add_prefix_space": false', '"add_prefix_space": true'))
    changed = Prompter(AutoTokenizer.from_pretrained(tmp_path), conversation_tokens=500)
    assert changed.template_hash != base.template_hash


def test_a_budget_below_the_fixed_part_is_refused_with_the_number_that_works(gemma_tokenizer):
    with pytest.raises(ValueError, match=r"conversation_tokens is 20, but .* need (\d+) tokens") as caught:
        Prompter(gemma_tokenizer, conversation_tokens=20)
    least = int(str(caught.value).split("need ")[1].split()[0])
    assert Prompter(gemma_tokenizer, conversation_tokens=least)
    with pytest.raises(ValueError):
        Prompter(gemma_tokenizer, conversation_tokens=least - 1)


def test_a_tokenizer_without_chat_template_is_refused():
    tokenizer = make_tokenizer("gemma")
    tokenizer.chat_template = None
    with pytest.raises(ValueError, match="no chat template"):
        Prompter(tokenizer, conversation_tokens=500)
