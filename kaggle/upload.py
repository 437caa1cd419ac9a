"""Brings a verified bundle to Kaggle with the official client: a private data set and its notebook.

In    artifacts/bundle/, verified
Out   https://www.kaggle.com/datasets/OWNER/SLUG and https://www.kaggle.com/code/OWNER/SLUG
Run   just submit --upload --owner YOUR_KAGGLE_NAME
"""

import importlib.util
import os
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path

from bundle_manifest import read_bundle, read_verification
from common.console import say
from common.files import write_json

COMPETITION = "lmsys-chatbot-arena"
ACCELERATOR = "NvidiaTeslaT4"
"""Kaggle's name for two T4s."""
KERNEL = {
    "code_file": "notebook.ipynb",
    "language": "python",
    "kernel_type": "notebook",
    "is_private": True,
    "enable_gpu": True,
    "enable_internet": False,
}
"""kernel-metadata.json, but for its name and what it reads."""
POLL_SECONDS = 20
CREDENTIAL_FILES = ("access_token", "access_token.txt", "credentials.json", "kaggle.json")


def upload(bundle: Path, *, owner: str, slug: str, poll_seconds: float = POLL_SECONDS) -> None:
    """Uploads the data set (a new version, if it is there), waits until it is ready, pushes the notebook.

    Args:
        bundle: Verified bundle.
        owner: Kaggle user name.
        slug: Name of data set and notebook, in lower case with hyphens.
        poll_seconds: Seconds between two looks at the data set's status.

    Raises:
        ValueError: The bundle is not verified or was changed; no client, no credentials (with the steps to
            take by hand); or the client failed.
    """
    read_verification(bundle)
    read_bundle(bundle)
    dataset = f"{owner}/{slug}"
    title = {"id": dataset, "title": slug}
    write_json(bundle / "dataset-metadata.json", title | {"licenses": [{"name": "other"}]})  # none given away
    if reason := missing(os.environ, Path.home()):
        raise ValueError(f"nothing was uploaded: {reason}\n{steps(bundle, dataset)}")
    source = ["-p", str(bundle), "-r", "tar"]
    exists = client(["datasets", "status", dataset]).returncode == 0
    run_client(["datasets", *(("version", *source, "-m", "just submit") if exists else ("create", *source))])
    while "ready" not in (status := client(["datasets", "status", dataset]).stdout.strip().lower()):
        if "error" in status:
            raise ValueError(f"Kaggle could not unpack the data set {dataset}: {status}; see its page")
        say(f"{dataset}: {status or 'no status yet'}")
        time.sleep(poll_seconds)
    with tempfile.TemporaryDirectory() as folder:
        shutil.copy(bundle / "notebook.ipynb", folder)
        sources = {"dataset_sources": [dataset], "competition_sources": [COMPETITION]}
        write_json(Path(folder) / "kernel-metadata.json", title | sources | KERNEL)
        run_client(["kernels", "push", "-p", folder, "--accelerator", ACCELERATOR])
    say(f"https://www.kaggle.com/code/{dataset} is running; when it has finished:\n{hand_in(dataset)}")


def missing(environment: Mapping[str, str], home: Path) -> str | None:
    """What stands against an upload: no client, no credentials; None where both are there."""
    found = importlib.util.find_spec("kaggle")
    if found is None or found.origin is None:  # without an origin it is our own folder kaggle/
        return "the kaggle client is not installed"
    folder = Path(environment.get("KAGGLE_CONFIG_DIR") or home / ".kaggle")
    token, *key = (environment.get(f"KAGGLE_{name}") for name in ("API_TOKEN", "USERNAME", "KEY"))
    files = [place / name for place in (folder, home / ".kaggle") for name in CREDENTIAL_FILES]
    if token or all(key) or any(path.is_file() for path in files):
        return None
    return f"no Kaggle credentials in {folder} or the environment"


def steps(bundle: Path, dataset: str) -> str:
    """What to do by hand, as commands to copy."""
    return f"""\
1. pip install kaggle six
2. Make an API token on https://www.kaggle.com/settings and put it into ~/.kaggle/access_token,
   or: export KAGGLE_API_TOKEN=...
3. Accept the rules of https://www.kaggle.com/competitions/{COMPETITION}
4. just submit --upload --owner {dataset.partition("/")[0]}
or in place of the last one:
4. kaggle datasets create -p {shlex.quote(str(bundle))} -r tar
   (the next time: kaggle datasets version, with -m NOTE)
5. On https://www.kaggle.com/code make a notebook from {bundle / "notebook.ipynb"}: add the data set
   {dataset} and the competition {COMPETITION}, GPU T4 x2, internet off; save and run all
6. {hand_in(dataset)}"""


def hand_in(dataset: str) -> str:
    """The command that hands a finished notebook's submission.csv in."""
    return f"kaggle competitions submit {COMPETITION} -k {dataset} -f submission.csv -v 1 -m arena-preference"


def client(arguments: list[str]) -> subprocess.CompletedProcess:
    """One call of the official client; `-P` keeps our folder kaggle/ out of its way."""
    command = [sys.executable, "-P", "-m", "kaggle", *arguments]
    return subprocess.run(command, capture_output=True, text=True)


def run_client(arguments: list[str]) -> None:
    """A call that must succeed; shows what the client says."""
    say(f"$ kaggle {shlex.join(arguments)}")
    found = client(arguments)
    say(found.stdout.rstrip())
    said = (found.stderr or found.stdout).strip()
    # the client reports some failures in words only
    if found.returncode or "error:" in found.stdout.lower():
        raise ValueError(f"kaggle {shlex.join(arguments)} failed (status {found.returncode}): {said}")
