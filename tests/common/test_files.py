"""A name stays inside its folder; a JSON file's fields are what is expected."""

import os

import pytest

from common.files import SHA256, TEXT, check_fields, confined, list_of, number, or_null


@pytest.fixture
def folder(tmp_path):
    """A folder with two files, beside a file that is none of its business."""
    (tmp_path / "secret.json").write_text("{}")
    folder = tmp_path / "folder"
    (folder / "sub").mkdir(parents=True)
    for name in ("a.json", "sub/b.json"):
        (folder / name).write_text("{}")
    return folder


def test_plain_names_and_links_that_stay(folder, tmp_path):
    (folder / "link.json").symlink_to("sub/b.json")
    (tmp_path / "other name").symlink_to(folder)
    for place in (folder, tmp_path / "other name"):
        for name in ("a.json", "sub/b.json", "link.json"):
            assert confined(place, name) == place / name


@pytest.mark.parametrize(
    "name",
    [
        *("../secret.json", "sub/../../secret.json", "/etc/hostname", "sub//b.json", "./a.json", "a.json/"),
        *("", "sub\\b.json", "a.json\0"),
    ],
)
def test_names_that_are_not_plain(folder, name):
    with pytest.raises(ValueError, match="is no plain name of a file below that folder"):
        confined(folder, name)


def test_what_is_no_file_of_the_folder_is_not_opened(folder, tmp_path):
    os.mkfifo(folder / "pipe")
    (folder / "out").symlink_to(tmp_path / "secret.json")
    (folder / "out-folder").symlink_to(tmp_path)
    (folder / "circle").symlink_to("circle")
    for name, message in (
        ("pipe", "is no regular file"),
        ("sub", "is no regular file"),
        ("out", "leads to .*secret.json, outside of"),
        ("out-folder/secret.json", "leads to .*secret.json, outside of"),
        ("circle", "cannot be read"),
        ("absent", "cannot be read: .*missing"),
    ):
        with pytest.raises(ValueError, match=message):
            confined(folder, name)


def test_a_snapshot_of_the_hub_links_into_its_own_blobs(tmp_path):
    hub = tmp_path / "hub"
    for repository in ("models--x--y", "models--x--z", "elsewhere"):
        (hub / repository / "blobs").mkdir(parents=True)
        (hub / repository / "blobs/0f").write_text("weights")
        (hub / repository / "snapshots/rev/sub").mkdir(parents=True)
        (hub / repository / "snapshots/rev/w").symlink_to("../../blobs/0f")
        (hub / repository / "snapshots/rev/sub/w").symlink_to("../../../blobs/0f")
    snapshot = hub / "models--x--y/snapshots/rev"
    assert confined(snapshot, "w").read_text() == confined(snapshot, "sub/w").read_text() == "weights"
    (snapshot / "other").symlink_to("../../../models--x--z/blobs/0f")
    (hub / "models--x--y/refs").write_text("")
    (snapshot / "refs").symlink_to("../../refs")
    for place, name in ((snapshot, "other"), (snapshot, "refs"), (hub / "elsewhere/snapshots/rev", "w")):
        with pytest.raises(ValueError, match="outside of"):
            confined(place, name)


@pytest.mark.parametrize(
    ("rule", "good", "bad"),
    [
        (TEXT, ["a"], ["", None, 1, ["a"]]),
        (SHA256, ["0f" * 32], ["0f" * 31, "0F" * 32, "0f" * 32 + "\n", None]),
        (number(0, 1), [0, 1, 0.5], [-1e-9, float("nan"), float("inf"), True, "0.5", None, 10**400]),
        (number(1, 9, whole=True), [1, 9], [0, 10, 1.0, True, None]),
        (or_null(TEXT), [None, "a"], ["", 1]),
        (list_of(TEXT), [["a"], ["a", "b"]], [[], ["a", 1], "ab", None, {"a": 1}]),
        (list_of(TEXT, 2), [["a", "b"]], [["a"], ["a", "b", "c"], [], None]),
    ],
)
def test_rules(rule, good, bad):
    fits, expected = rule
    assert all(map(fits, good)) and not any(map(fits, bad)) and expected


def test_the_first_field_that_does_not_fit_is_named():
    rules = {"a": TEXT, "b.c": number(0, 1)}
    check_fields("x.json", {"a": "text", "b": {"c": 1, "more": 2}, "more": 3}, rules, way_out="do it")
    for found, message in (
        ({"b": {"c": 1}}, "x.json: a is absent, expected a text; do it"),
        ({"a": "text", "b": {"c": 2}}, "x.json: b.c is 2, expected a number from 0 to 1; do it"),
        ({"a": "text", "b": []}, "b.c is absent"),
        ({"a": ["x" * 500]}, "a is .{80}, expected"),
    ):
        with pytest.raises(ValueError, match=message):
            check_fields("x.json", found, rules, way_out="do it")
