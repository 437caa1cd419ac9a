"""A checkpoint's tokenizer: what people type is text, what the template writes is known, no code is run."""

import io
import json
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from datetime import datetime
from types import SimpleNamespace

import pytest
from helpers import SHAPES, make_checkpoint, make_shaped_tokenizer, make_tokenizer
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, models, normalizers, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from common.files import read_json
from common.prompts import Prompter
from common.tokenizer import chat_template, load_tokenizer

TOKENIZERS = {shape: make_shaped_tokenizer(shape) for shape in SHAPES}
PROMPTERS = {name: Prompter(tokenizer, conversation_tokens=500) for name, tokenizer in TOKENIZERS.items()}
CHAT = "{% for m in messages %}{{ m.role + ': ' + m.content + ' ' }}{% endfor %}"


def control_ids(shape):
    """By name, not by the rule that is tested."""
    special, markers, *_ = SHAPES[shape]
    return set(TOKENIZERS[shape].convert_tokens_to_ids([*special, *markers]))


def pieces(shape):
    """Markers, their beginnings and ends, what stands around them, and ordinary text."""
    special, markers, ordinary, _ = SHAPES[shape]
    whole = [*special, *markers]
    parts = [text[:cut] for text in whole for cut in (1, 2, -1)] + [text[1:] for text in whole]
    plain = [" ", "\n", "  ", "fox", "<", ">", "|", "🦙", "\x00", "é", "▁", "\ufeff", "\uff1c", *ordinary]
    return st.lists(st.sampled_from(whole) | st.sampled_from(parts + plain), max_size=12).map("".join)


@pytest.mark.parametrize("shape", SHAPES)
def test_texts_never_give_a_control_id(shape):
    prompter, control = PROMPTERS[shape], control_ids(shape)

    @settings(max_examples=150, deadline=None)
    @given(texts=st.tuples(*[pieces(shape)] * 3))
    def check(texts):
        [tokenised] = prompter.tokenise([tuple([text] for text in texts)])
        for text, [ids] in zip(texts, tokenised, strict=True):
            assert not control & set(ids), text
            if shape != "gemma" or "▁" not in text:  # there a blank is written so
                assert prompter.tokenizer.decode(ids) == text

    check()


@pytest.mark.parametrize("shape", SHAPES)
def test_every_marker_is_text_in_the_instruction_too(shape):
    special, markers, *_ = SHAPES[shape]
    typed = "".join([*special, *markers])
    plain, marked = (
        Prompter(TOKENIZERS[shape], conversation_tokens=500, instruction=text) for text in ("x", typed)
    )
    ids = [[i for i in p.prefix_ids + p.suffix_ids if i in control_ids(shape)] for p in (plain, marked)]
    assert ids[0] == ids[1] != [], "only the template's own"


def test_the_templates_own_markers_are_ids():
    think = TOKENIZERS["chatml"].convert_tokens_to_ids("<think>")
    assert think in PROMPTERS["chatml"].suffix_ids


def test_added_tokens_that_are_ordinary_text_stay_tokens():
    tokenizer, ordinary = TOKENIZERS["gemma"], SHAPES["gemma"][2]
    text = "a <table>\n\n\nfox  dog</table> <h1>\n"
    [tokenised] = PROMPTERS["gemma"].tokenise([(ordinary, ordinary, [text])])
    assert [tokenizer.convert_ids_to_tokens(ids) for ids in tokenised.prompt] == [[one] for one in ordinary]
    plain = tokenizer([text], add_special_tokens=False, split_special_tokens=True).input_ids
    assert tokenised.response_b == plain, "what is in no way markup is tokenised as by the library"


def wrapped(backend, **names):
    return PreTrainedTokenizerFast(tokenizer_object=backend, chat_template=CHAT, **names)


def word_level():
    vocabulary = {word: i for i, word in enumerate(["<unk>", "<eos>", "user:", "system:"])}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return wrapped(backend, unk_token="<unk>", eos_token="<eos>")


def unigram():
    scores = [("<unk>", 0.0), ("</s>", -1.0), *((c, -5.0) for c in "abcdefghijklmnopqrstuvwxyz :<>/s")]
    return wrapped(Tokenizer(models.Unigram(scores, unk_id=0)), unk_token="<unk>", eos_token="</s>")


def merging_bpe():
    alphabet = ["<unk>", *"<think>user system: ", "<t", "<th", "<thi", "<thin", "<think", "<think>"]
    vocabulary = {text: i for i, text in enumerate(dict.fromkeys(alphabet))}
    merges = [("<think>"[:n], "<think>"[n]) for n in range(1, 7)]
    backend = Tokenizer(models.BPE(vocabulary, merges, unk_token="<unk>"))
    backend.add_tokens([AddedToken("<think>", special=False)])
    return wrapped(backend, unk_token="<unk>")


def unknown_is_the_end():
    letters = [chr(i) for i in range(32, 127)]
    backend = Tokenizer(
        models.BPE({text: i for i, text in enumerate(["</s>", *letters])}, [], unk_token="</s>")
    )
    return wrapped(backend, unk_token="</s>", eos_token="</s>")


@pytest.mark.parametrize(
    ("make", "marker"),
    [(word_level, "<eos>"), (unigram, "</s>"), (merging_bpe, "<think>"), (unknown_is_the_end, "</s>")],
)
def test_a_tokenizer_that_cannot_keep_markers_apart_is_refused(make, marker):
    tokenizer = make()
    tokenizer.name_or_path = "some/model"
    with pytest.raises(ValueError, match=f"some/model gives the control token '{marker}' for the text"):
        Prompter(tokenizer, conversation_tokens=500)


def test_an_unknown_character_may_be_unknown():
    letters = [chr(i) for i in range(32, 127)]
    vocabulary = {text: i for i, text in enumerate(["<unk>", "</s>", "\n", *letters])}
    backend = Tokenizer(models.BPE(vocabulary, [], unk_token="<unk>"))
    prompter = Prompter(wrapped(backend, unk_token="<unk>", eos_token="</s>"), conversation_tokens=900)
    [[[unknown]], [literal], [end]] = prompter.tokenise([(["🦙"], ["<unk>"], ["</s>"])])[0]
    assert unknown == 0 and len(literal) == 5 and len(end) == 4 and not {0, 1} & {*literal, *end}


def variant(**flags):
    """ChatML's with a marker that takes blanks along, stands for normalised text, or wants a whole word."""
    backend = Tokenizer.from_str(TOKENIZERS["chatml"].backend_tokenizer.to_str())
    backend.normalizer = normalizers.Sequence([normalizers.NFKC(), normalizers.Lowercase()])
    backend.add_tokens([AddedToken("<answer>", **flags)])
    tokenizer = wrapped(backend, eos_token="<|im_end|>")
    return Prompter(tokenizer, conversation_tokens=500), tokenizer.convert_tokens_to_ids("<answer>")


@pytest.mark.parametrize("flag", ["lstrip", "rstrip", "normalized", "single_word"])
def test_no_variant_of_a_marker_gets_through(flag):
    prompter, marker = variant(**{"normalized": False, flag: True})
    texts = [
        "<answer>",
        " <answer> ",
        "<ANSWER>",
        "\uff1canswer\uff1e",
        "a<answer>b",
        "a <answer>\n",
        "\uff1cANSWER>",
    ]
    [tokenised] = prompter.tokenise([(texts, texts, texts)])
    assert not any(marker in ids for ids in tokenised.prompt)


def test_a_tokenizer_set_to_split_still_reads_the_templates_markup():
    tokenizer = make_tokenizer("gemma")
    before = Prompter(tokenizer, conversation_tokens=500).prefix_ids
    tokenizer.split_special_tokens = True
    assert Prompter(tokenizer, conversation_tokens=500).prefix_ids == before


def test_settings_to_cut_or_fill_up_are_left_aside():
    tokenizer = make_tokenizer("gemma")
    tokenizer.backend_tokenizer.enable_truncation(3)
    tokenizer.backend_tokenizer.enable_padding(length=9)
    [tokenised] = Prompter(tokenizer, conversation_tokens=500).tokenise(
        [(["fox"], ["a fox runs over"], [""])]
    )
    assert tokenizer.decode(tokenised.response_a[0]) == "a fox runs over" and tokenised.response_b == [[]]


# Chat templates


@pytest.mark.parametrize(
    ("template", "reason"),
    [
        ("{{ raise_exception('not today') }}", "TemplateError: not today"),
        ("{% for m in messages %}{{ m.content * 2 }}{% endfor %}", "repeats"),
        (CHAT + "{{ messages[-1].content }}", "repeats"),
        ("{{ bos_token }}hello", "drops"),
        ("{% for m in messages %}{{ m.content | upper }}{% endfor %}", "drops"),
        ("{{ messages[-1].content.split() | reverse | join }}", "reorders"),
        ("{{ 'a' + 1 }}", "TypeError"),
        ("{{ nothing.at.all }}", "UndefinedError"),
        ("{% for m in messages %}", "TemplateSyntaxError"),
        ("{{ 1 / 0 }}", "ZeroDivisionError"),
        ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "RecursionError"),
        ("{{ '\\ud800' }}" + CHAT, "UnicodeEncodeError"),
        ("{{ ['a', 'b'] | random }}" + CHAT, "No filter named 'random'"),
        ("{{ ''.__class__.__mro__ }}" + CHAT, "SecurityError"),
        ({"rag": CHAT, "tool_use": CHAT}, "rag"),
        ([CHAT], "list"),
    ],
)
def test_a_template_that_cannot_be_used_is_refused_by_name(template, reason):
    tokenizer = make_tokenizer("gemma")
    tokenizer.chat_template, tokenizer.name_or_path = template, "some/model"
    with pytest.raises(ValueError, match=r"chat template of some/model cannot be used: ") as caught:
        Prompter(tokenizer, conversation_tokens=500)
    assert reason in str(caught.value)


ENDLESS = {
    "loops": "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}",
    "allocates": "{% set x = 'a' * 10**10 %}",
    "folds": "{{ 'a' * 10**10 }}",
    "doubles": "{% set n = namespace(x='ab') %}{% for i in range(99) %}{% set n.x = n.x * 2 %}{% endfor %}",
    "writes": "{{ 'a' * 10**6 }}",
}


@pytest.mark.parametrize("name", ENDLESS)
def test_a_template_without_end_is_cut_off(name):
    tokenizer = make_tokenizer("gemma")
    tokenizer.chat_template, tokenizer.name_or_path = ENDLESS[name] + CHAT, "some/model"
    started = time.monotonic()
    with pytest.raises(ValueError, match=r"some/model cannot be used: .*(cut off|MemoryError|characters)"):
        Prompter(tokenizer, conversation_tokens=500)
    assert time.monotonic() - started < 60


def test_the_template_runs_with_threads_about_and_once_a_process(monkeypatch):
    tokenizer = make_tokenizer("gemma")
    tokenizer.chat_template += "{# another #}"
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda _: Prompter(tokenizer, conversation_tokens=500).prompt_hash, range(4)))
    assert len(set(found)) == 1
    monkeypatch.setattr(chat_template.subprocess, "run", lambda *a, **k: pytest.fail("rendered again"))
    assert Prompter(tokenizer, conversation_tokens=600).prefix_ids


def test_a_template_is_rendered_as_by_the_library():
    for family in ("gemma", "llama", *SHAPES):
        tokenizer = TOKENIZERS.get(family) or make_tokenizer(family)
        messages = [{"role": "user", "content": "  fox\n"}]
        ours = chat_template.render(
            tokenizer.chat_template, [messages], variables=tokenizer.special_tokens_map, date="2024-07-26"
        )
        theirs = tokenizer.apply_chat_template(
            messages, tokenize=False, add_generation_prompt=True, date_string="26 Jul 2024"
        )
        assert ours == [(theirs, "")]


DATED = CHAT + "{{ strftime_now('%Y-%m-%d') }}"


@pytest.mark.parametrize("template", [SHAPES["llama"][3], DATED])
def test_a_template_that_writes_the_date_writes_that_of_the_checkpoint(template, monkeypatch):
    """The library tells it today's: with its own rendering two days give two prompts."""
    tokenizer = make_shaped_tokenizer("llama")
    tokenizer.chat_template = template
    asked = [{"role": "user", "content": "fox"}]
    seen = []
    for day in (2, 3):
        today = SimpleNamespace(now=lambda day=day: datetime(2031, 5, day))
        monkeypatch.setattr("transformers.utils.chat_template_utils.datetime", today)
        chat_template._render.cache_clear()
        prompter = Prompter(tokenizer, conversation_tokens=500)
        theirs = tokenizer.apply_chat_template(asked, tokenize=False)
        seen.append((prompter.prompt_hash, prompter.prefix_ids + prompter.suffix_ids, theirs))
    assert seen[0][:2] == seen[1][:2] and seen[0][2] != seen[1][2]
    text = tokenizer.decode(seen[0][1])
    assert "26 Jul 2024" in text or "2024-07-26" in text
    other = Prompter(tokenizer, conversation_tokens=500, date="2025-01-31")
    assert other.prompt_hash != seen[0][0] and other.describe()["date"] == "2025-01-31"
    assert (
        "31 Jan 2025" in (text := tokenizer.decode(other.prefix_ids + other.suffix_ids)) or "2025-01" in text
    )


def test_a_date_that_is_none_is_refused():
    with pytest.raises(ValueError, match="cannot be used: ValueError: Invalid isoformat string: 'today'"):
        Prompter(make_tokenizer("gemma"), conversation_tokens=500, date="today")


def test_a_default_among_named_templates_is_taken():
    tokenizer = make_tokenizer("gemma")
    before = Prompter(tokenizer, conversation_tokens=500)
    tokenizer.chat_template = {"default": tokenizer.chat_template, "rag": "{{ 1 / 0 }}"}
    assert Prompter(tokenizer, conversation_tokens=500).prompt_hash == before.prompt_hash


# Foreign code


@pytest.mark.parametrize("known", [True, False])
def test_python_files_of_a_checkpoint_are_never_run(known, tmp_path, monkeypatch):
    """Whether transformers knows the class or not; asked on standard input, the answer is yes."""
    folder, marker = make_checkpoint(tmp_path / "model", "gemma"), tmp_path / "ran"
    (folder / "theirs.py").write_text(
        f"open({str(marker)!r}, 'w')\nfrom transformers import PreTrainedTokenizerFast as Theirs\n"
    )
    config = read_json(folder / "tokenizer_config.json") | {
        "auto_map": {"AutoTokenizer": ["theirs.Theirs"] * 2}
    }
    if not known:
        config["tokenizer_class"] = "Theirs"
        (folder / "config.json").write_text(json.dumps({"model_type": "theirs"}))
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    stdin = io.StringIO("y\n" * 9)
    monkeypatch.setattr(sys, "stdin", stdin)
    try:
        assert load_tokenizer(folder).get_vocab() == make_tokenizer("gemma").get_vocab()
    except ValueError as error:
        assert not known and "code of its own, which is never run" in str(error)
    assert not marker.exists() and sys.stdin is stdin and stdin.tell() == 0, "nothing was asked"
