"""A checkpoint's prompt and vocabulary fit its weights and this code, or it is not opened."""

import json
from types import SimpleNamespace

import pytest
from helpers import make_checkpoint, make_comparisons, make_preference, make_tokenizer

from common import prompts, tokens
from common.data.table import ORDERS
from common.files import read_json
from common.models import load_model, save_checkpoint
from common.prompts import INSTRUCTION, Prompter
from common.tokens import Sequences, tokenise
from common.train import steps
from common.train.recipe import Recipe
from common.trained import make_prompter, open_prompter

RECIPE = Recipe(conversation_tokens=150)


def open_parent(folder):
    return steps.open_parent(str(folder), RECIPE, instruction=None, training=SimpleNamespace(dry_run=True))


def open_trained(folder):
    """As a checkpoint that was trained with whatever this code gives."""
    prompt = Prompter(make_tokenizer("gemma"), conversation_tokens=150).describe()
    return open_prompter(str(folder), {"prompt": prompt})


@pytest.fixture
def folder(tmp_path):
    return make_checkpoint(tmp_path / "model", "gemma")


def resized(folder, *, rows=0, tokens=(), special=(), template=""):
    """The checkpoint with `rows` more in its config, and more added tokens."""
    tokenizer = make_tokenizer("gemma")
    size = len(tokenizer)
    tokenizer.add_tokens(list(tokens))
    tokenizer.add_tokens(list(special), special_tokens=True)
    tokenizer.chat_template += template
    tokenizer.save_pretrained(folder)
    config = read_json(folder / "config.json") | {"vocab_size": size + rows}
    (folder / "config.json").write_text(json.dumps(config))
    return size


@pytest.mark.parametrize("how", [open_parent, open_trained])
@pytest.mark.parametrize(
    ("changes", "highest"),
    [
        ({"rows": -1}, -1),
        ({"rows": -40}, -1),
        ({"tokens": ["<table>"]}, 0),
        ({"special": ["<answer>"], "template": "<answer>"}, 0),
        ({"special": ["<one>", "<answer>"], "template": "<answer>", "rows": 1}, 1),
    ],
)
def test_an_id_without_an_embedding_is_refused_at_load(how, changes, highest, folder):
    size = resized(folder, **changes)
    expected = f"ids up to {size + highest}, but config.json says vocab_size {size + changes.get('rows', 0)}"
    with pytest.raises(ValueError, match=expected):
        how(folder)


@pytest.mark.parametrize("changes", [{}, {"rows": 64}, {"special": ["<|pad|>"]}, {"tokens": ["<think>"]}])
def test_a_padded_vocabulary_or_a_marker_that_no_text_gives_is_fine(changes, folder):
    resized(folder, **changes)
    assert open_parent(folder).prompter.highest_id < read_json(folder / "config.json")["vocab_size"]


# What is trained is what is served, also after the code changed


def swap_headings(patch):
    original = Prompter._lay_out
    other = lambda self, turns, headings, budget: original(self, turns, headings[::-1], budget)  # noqa: E731
    patch.setattr(Prompter, "_lay_out", other)


def cut_otherwise(patch):
    original = prompts.cut_lengths
    patch.setattr(prompts, "cut_lengths", lambda n, budget, least: original(n, budget - 1, least))


def keep_the_head(patch):
    patch.setattr(Prompter, "_cut", lambda self, text, length: text[:length])


def write_null_otherwise(patch):
    original = prompts.clean_text
    patch.setattr(prompts, "clean_text", lambda text: "null" if text is None else original(text))


def put_the_instruction_last(patch):
    original = Prompter._assemble

    def assemble(self, instruction):
        original(self, instruction)
        self.suffix_ids = [*self._plain([instruction])[0], *self.suffix_ids]

    patch.setattr(Prompter, "_assemble", assemble)


def count_positions_from_one(patch):
    original = prompts.pack

    def pack(*arguments, **options):
        packed = original(*arguments, **options)
        return packed._replace(position_ids_T=packed.position_ids_T + 1)

    patch.setattr(prompts, "pack", pack)
    patch.setattr("common.batching.pack", pack)


def leave_labels(patch):
    patch.setattr(Sequences, "labels_of", lambda self, index: self.labels[self.row[index]])


def draw_orders_otherwise(patch):
    patch.setattr(tokens, "_random_order", lambda seed, source, key: ORDERS[int(key) % 2])


LAYOUT = (swap_headings, cut_otherwise, keep_the_head, write_null_otherwise, put_the_instruction_last)
PACKING = (leave_labels, draw_orders_otherwise)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A checkpoint with the prompt that it was trained with."""
    backbone = make_checkpoint(tmp_path_factory.mktemp("trained") / "backbone", "gemma")
    prompter = make_prompter(backbone, conversation_tokens=150, instruction=INSTRUCTION, preference=None)
    folder = backbone.with_name("trained")
    preference = make_preference(prompt=prompter.describe())
    save_checkpoint(folder, model=load_model(backbone), tokenizer=prompter.tokenizer, preference=preference)
    return folder


def open_run(folder, output, parent):
    accelerator = SimpleNamespace(is_main_process=True)
    data = {"train": make_comparisons(4), "held_out": None}
    return steps.open_run("stage1", "m", output, RECIPE, parent, **data, accelerator=accelerator)


@pytest.mark.parametrize("change", [*LAYOUT, count_positions_from_one, *PACKING])
def test_other_code_is_noticed_by_every_key(change, trained, tmp_path, monkeypatch):
    preference, frame = read_json(trained / "preference.json"), make_comparisons(4)

    def cached(prompter):
        tokenise(frame, prompter, formats=("PAB",), orders=ORDERS, cache=tmp_path / "tokens")
        return len(list((tmp_path / "tokens").iterdir()))

    before = open_parent(trained)
    assert cached(before.prompter) == cached(open_parent(trained).prompter) == 1
    open_run(trained, tmp_path / "run", before).begin()
    open_run(trained, tmp_path / "run", open_parent(trained))
    change(monkeypatch)
    prompter = Prompter(before.prompter.tokenizer, conversation_tokens=150)
    assert cached(prompter) == 2, "tokenised anew"
    parent = SimpleNamespace(folder=trained, prompter=prompter)
    with pytest.raises(ValueError, match=r"inputs\.prompt is"):
        open_run(trained, tmp_path / "run", parent)
    if change not in PACKING:  # only training has labels and draws
        for how in (open_parent, lambda folder: open_prompter(str(folder), preference)):
            with pytest.raises(ValueError, match="was trained with"):
                how(trained)


def test_the_layout_hash_is_that_of_any_budget_and_instruction(trained):
    tokenizer = make_tokenizer("gemma")
    found = {
        Prompter(tokenizer, conversation_tokens=n, instruction=text).template_hash
        for n, text in ((150, INSTRUCTION), (4096, "Which?"))
    }
    assert found == {read_json(trained / "preference.json")["prompt"]["template_hash"]}


def test_a_checkpoint_of_another_day_is_told_its_own_date(trained, tmp_path, monkeypatch):
    """Opened on, and after, a change of the date that this code tells templates."""
    tokenizer = make_tokenizer("gemma")
    tokenizer.chat_template += "{{ date_string }}"
    prompter = Prompter(tokenizer, conversation_tokens=150, date="2025-02-03")
    preference = make_preference(prompt=prompter.describe())
    model = load_model(trained)
    save_checkpoint(tmp_path / "dated", model=model, tokenizer=tokenizer, preference=preference)
    opened = open_prompter(str(tmp_path / "dated"), preference)
    assert opened.suffix_ids == prompter.suffix_ids and "03 Feb 2025" in tokenizer.decode(opened.suffix_ids)
    assert open_parent(tmp_path / "dated").prompter.template_hash == prompter.template_hash
