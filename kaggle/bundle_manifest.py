"""The bundle's table of contents: what lies in it, and whether it still is what it was. No torch in here."""

import json
from pathlib import Path

from common.console import progress
from common.data.table import LABELS, NUM_SHOWN, ORDERS
from common.files import (
    SHA256,
    TEXT,
    check_fields,
    confined,
    file_hash,
    list_of,
    number,
    or_null,
    read_json,
    text_hash,
)

MANIFEST = "manifest.json"
VERIFICATION = "verify.json"
UNLISTED = {MANIFEST, VERIFICATION, "dataset-metadata.json"}
"""Files of a bundle that its manifest does not list: itself, what is written about it, the client's own."""
FORMAT = 1

OBJECT = (lambda value: isinstance(value, dict), "an object")
HASHES = (lambda value: OBJECT[0](value) and all(map(SHA256[0], value.values())), "a sha256 of every file")
RULES = {
    "format": (lambda value: value == FORMAT, f"{FORMAT}, which this code reads"),
    "classes": (lambda value: value == list(LABELS), f"the class order {list(LABELS)}"),
    "files": HASHES,
    "prior": list_of(number(0, 1), len(LABELS)),
    "models": list_of(OBJECT),
    "scaling": or_null(OBJECT),
    **dict.fromkeys(("requirements.libraries", "requirements.kernel"), OBJECT),
}
SCALING_RULES = dict.fromkeys(("scaling.scale", "scaling.bias"), list_of(number(-1e6, 1e6), len(LABELS)))
MODEL_RULES = {
    **dict.fromkeys(("name", "folder", "format", "checkpoint"), TEXT),
    **dict.fromkeys(("template_hash", "checkpoint_hash"), SHA256),
    "order": (lambda value: value in (*ORDERS, "both"), f"one of {', '.join(ORDERS)}, both"),
    "weight": number(0, 1e6),
}
WAY_OUT = "the bundle is not the one that was built: copy it again, or build it with just submit"


def read_manifest(bundle: Path) -> dict:
    """A bundle's manifest, its files unread.

    Raises:
        ValueError: There is none, or it is not one that this code reads.
    """
    path = bundle / MANIFEST
    if not path.is_file():
        raise ValueError(f"{bundle} has no {MANIFEST}: it is not a bundle; build one with just submit")
    manifest = read_json(confined(bundle, MANIFEST))
    check_fields(path, manifest, RULES, way_out=WAY_OUT)
    if manifest["scaling"] is not None:
        check_fields(path, manifest, SCALING_RULES, way_out=WAY_OUT)
    for model in manifest["models"]:
        check_fields(path, model, MODEL_RULES, way_out=WAY_OUT)
        if f"{model['folder']}/config.json" not in manifest["files"]:
            raise ValueError(f"{path} lists no files of the model folder {model['folder']!r}; {WAY_OUT}")
    return manifest


def read_bundle(bundle: Path) -> dict:
    """The manifest, once every file of the bundle has been compared with it.

    Raises:
        ValueError: A file is changed, missing or not listed, or the manifest is not one that this code reads.
    """
    manifest = read_manifest(bundle)
    listed, present = set(manifest["files"]), set(files_of(bundle))
    for what, names in (("missing", listed - present), ("not in the manifest", present - listed)):
        if names:
            raise ValueError(f"{bundle}: {what}: {', '.join(sorted(names)[:NUM_SHOWN])}; {WAY_OUT}")
    with progress("checking the bundle", len(listed), "files") as advance:
        for name, expected in manifest["files"].items():
            if (found := file_hash(confined(bundle, name))) != expected:
                raise ValueError(
                    f"{bundle / name} has sha256 {found[:12]}, the manifest says {expected[:12]}; {WAY_OUT}"
                )
            advance(1)
    return manifest


def files_of(bundle: Path) -> list[str]:
    """Names of all that a manifest lists, relative to the bundle, sorted: what is no folder of the bundle."""
    found = (path for path in bundle.rglob("*") if path.is_symlink() or not path.is_dir())
    return sorted({path.relative_to(bundle).as_posix() for path in found} - UNLISTED)


def read_verification(bundle: Path) -> dict:
    """verify.json of a bundle: what proved it, and that it is about this very manifest.

    The seal shows a changed byte; it is no proof of who wrote it.

    Raises:
        ValueError: The bundle was not verified, verify.json was changed, or it is about another manifest.
    """
    path = bundle / VERIFICATION
    if not path.is_file():
        raise ValueError(f"{bundle} was not verified: it has no {VERIFICATION}; run just submit")
    result = read_json(path)
    if result.get("seal") != seal(result):
        raise ValueError(f"{path} was changed after it was written: its seal does not fit; run just submit")
    if result["manifest_sha256"] != (found := file_hash(bundle / MANIFEST)):
        raise ValueError(
            f"{path} is about the manifest {result['manifest_sha256'][:12]}, but {bundle / MANIFEST} is "
            f"{found[:12]}: the bundle was changed after it was verified; run just submit"
        )
    return result


def seal(result: dict) -> str:
    """sha256 of a verification without its seal."""
    rest = {name: value for name, value in result.items() if name != "seal"}
    return text_hash(json.dumps(rest, sort_keys=True))
