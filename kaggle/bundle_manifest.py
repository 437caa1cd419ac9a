"""The bundle's table of contents: what lies in it, and whether it still is what it was. No torch in here."""

import json
from pathlib import Path

from common.console import progress
from common.data.table import LABELS, NUM_SHOWN
from common.files import file_hash, read_json, text_hash

MANIFEST = "manifest.json"
VERIFICATION = "verify.json"
UNLISTED = {MANIFEST, VERIFICATION, "dataset-metadata.json"}
"""Files of a bundle that its manifest does not list: itself, what is written about it, the client's own."""
FORMAT = 1


def read_manifest(bundle: Path) -> dict:
    """A bundle's manifest, its files unread.

    Raises:
        ValueError: There is none, or it is not one that this code reads.
    """
    path = bundle / MANIFEST
    if not path.is_file():
        raise ValueError(f"{bundle} has no {MANIFEST}: it is not a bundle; build one with just submit")
    manifest = read_json(path)
    if manifest.get("format") != FORMAT:
        raise ValueError(
            f"{path} has format {manifest.get('format')!r}, this code reads {FORMAT}; build the bundle again"
        )
    if manifest["classes"] != list(LABELS):
        raise ValueError(f"{path} has the class order {manifest['classes']}, this code {list(LABELS)}")
    return manifest


def read_bundle(bundle: Path) -> dict:
    """The manifest, once every file of the bundle has been compared with it.

    Raises:
        ValueError: A file is changed, missing or not listed, or the manifest is not one that this code reads.
    """
    manifest = read_manifest(bundle)
    listed, present = set(manifest["files"]), set(files_of(bundle))
    way_out = "the bundle is not the one that was built: copy it again, or build it with just submit"
    for what, names in (("missing", listed - present), ("not in the manifest", present - listed)):
        if names:
            raise ValueError(f"{bundle}: {what}: {', '.join(sorted(names)[:NUM_SHOWN])}; {way_out}")
    with progress("checking the bundle", len(listed), "files") as advance:
        for name, expected in manifest["files"].items():
            if (found := file_hash(bundle / name)) != expected:
                raise ValueError(
                    f"{bundle / name} has sha256 {found[:12]}, the manifest says {expected[:12]}; {way_out}"
                )
            advance(1)
    return manifest


def files_of(bundle: Path) -> list[str]:
    """Names of the files that a manifest lists, relative to the bundle, sorted."""
    names = (path.relative_to(bundle).as_posix() for path in bundle.rglob("*") if path.is_file())
    return sorted(name for name in names if name not in UNLISTED)


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
