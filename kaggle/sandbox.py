"""Running a notebook as the platform does: the listed libraries only, no network, read-only inputs."""

import os
import re
import shlex
import shutil
import subprocess
import venv
from collections import defaultdict
from collections.abc import Mapping, Sequence
from importlib.metadata import Distribution, distributions
from pathlib import Path

import nbformat
from jupyter_client.kernelspec import KernelSpecManager
from jupyter_client.manager import AsyncKernelManager
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError, DeadKernelError
from packaging.utils import canonicalize_name

from common.console import say
from common.files import write_json

NAMESPACE = "network namespace"
SOCKET_BLOCK = "socket block"
COLOURS = re.compile(r"\x1b\[[0-9;]*m")
KEPT_VARIABLES = ("PATH", "LANG", "LD_LIBRARY_PATH", "CUDA_VISIBLE_DEVICES", "OMP_NUM_THREADS", "TMPDIR")
BLOCK = '''"""Refuses every connection that leaves the machine's own files: no address family but AF_UNIX."""
import socket, sys

REACHING = {f"socket.{name}" for name in ("connect", "bind", "sendto", "sendmsg")}


def refuse(event, arguments):
    if event == "socket.getaddrinfo" or (event in REACHING and arguments[0].family != socket.AF_UNIX):
        raise OSError("the network is cut off")


sys.addaudithook(refuse)
'''


def make_environment(folder: Path, wanted: Mapping[str, str], *, block_sockets: bool) -> Path:
    """A virtual environment that holds certain installed distributions, linked, and nothing else.

    Args:
        folder: To create.
        wanted: Canonical name -> version, dependencies included; the versions must be the installed ones.
        block_sockets: Refuse every network connection of its Python processes.

    Returns:
        Its Python.

    Raises:
        ValueError: A distribution is not installed in that version.
    """
    venv.create(folder, symlinks=True, with_pip=False)
    [target] = folder.glob("lib/python*/site-packages")
    here: dict[str, Distribution] = {}
    owners = defaultdict(set)  # first part of the path -> the installed distributions that have files there
    for installed in distributions():
        here.setdefault(name := canonicalize_name(installed.name), installed)
        for top in {file.parts[0] for file in installed.files or ()}:
            owners[top].add(name)
    for name, version in wanted.items():
        if (found := here[name].version if name in here else "none") != version:
            raise ValueError(
                f"the manifest lists {name} {version}, but {found} is installed here; build the bundle again "
                "with just submit"
            )
        files = [file for file in here[name].files or () if file.parts[0] not in ("..", "/", "__pycache__")]
        # file by file where a distribution that is not listed also has a part of a namespace
        for path in {file.parts[0] if owners[file.parts[0]] <= set(wanted) else str(file) for file in files}:
            if not (target / path).exists():
                (target / path).parent.mkdir(parents=True, exist_ok=True)
                (target / path).symlink_to(Path(here[name].locate_file(path)))
    if block_sockets:
        (target / "_cut_network.py").write_text(BLOCK, encoding="utf-8")
        (target / "_cut_network.pth").write_text("import _cut_network\n", encoding="utf-8")
    return folder / "bin/python"


def isolation() -> str:
    """The strongest isolation that this machine allows: a network namespace, else a socket block."""
    if shutil.which("unshare") is None:
        return SOCKET_BLOCK
    place = Path(__file__).resolve().parent
    trial = subprocess.run(isolated(["true"], read_only={place: place}, hidden=[place]), capture_output=True)
    return NAMESPACE if trial.returncode == 0 else SOCKET_BLOCK


def isolated(command: Sequence[str], *, read_only: Mapping[Path, Path], hidden: Sequence[Path]) -> list[str]:
    """A command in namespaces of its own: no network, some folders read-only, some empty.

    Args:
        command: Words of the command.
        read_only: Existing folder -> what appears there, read-only; absolute.
        hidden: Folders that appear empty.
    """
    steps = ["set -e"]
    for place, source in read_only.items():
        where = shlex.quote(str(place))
        steps += [f"mount --bind {shlex.quote(str(source))} {where}", f"mount -o remount,bind,ro {where}"]
    steps += [f"mount -t tmpfs -o ro tmpfs {shlex.quote(str(folder))}" for folder in hidden]
    steps.append('exec "$@"')
    unshare = ["unshare", "--map-root-user", "--net", "--mount"]
    return [*unshare, "sh", "-c", "; ".join(steps), "sh", *command]


def run_notebook(
    notebook: nbformat.NotebookNode,
    *,
    python: Path,
    inputs: Mapping[str, Path],
    hidden: Sequence[Path],
    work: Path,
    how: str,
    variables: Mapping[str, str],
) -> str:
    """Executes a notebook's cells in a kernel of another Python.

    Args:
        notebook: Executed in place.
        python: Of an environment with ipykernel.
        inputs: Name below the input folder -> folder; read-only in a namespace.
        hidden: Folders that the kernel must not see, where it has a namespace.
        work: Existing empty folder, where the cells run; input folder and home lie in it.
        how: `NAMESPACE` or `SOCKET_BLOCK`.
        variables: Environment variables of the kernel; of our own it gets `KEPT_VARIABLES` only.

    Returns:
        What the cells printed.

    Raises:
        ValueError: A cell raised; what it printed last is shown.
    """
    places = {work / "inputs" / name: folder.resolve() for name, folder in inputs.items()}
    (work / "inputs").mkdir()
    command = [str(python), "-m", "ipykernel_launcher", "-f", "{connection_file}"]
    if how == NAMESPACE:
        for place in places:
            place.mkdir()
        command = isolated(command, read_only=places, hidden=hidden)
    else:
        for place, folder in places.items():
            place.symlink_to(folder, target_is_directory=True)
    spec = {"argv": command, "display_name": "bundle", "language": "python"}
    write_json(work / "kernels/bundle/kernel.json", spec)
    specs = KernelSpecManager(kernel_dirs=[str(work / "kernels")], ensure_native_kernel=False)
    # Unix sockets: they reach into another network namespace, TCP does not.
    sockets = {"transport": "ipc", "ip": str(work / "kernel"), "connection_file": str(work / "kernel.json")}
    manager = AsyncKernelManager(kernel_name="bundle", kernel_spec_manager=specs, **sockets)
    environment = {name: os.environ[name] for name in KEPT_VARIABLES if name in os.environ}
    environment |= {"HOME": str(work), "PYTHONNOUSERSITE": "1", "BUNDLE_INPUTS": str(work / "inputs")}
    client = TellingClient(notebook, km=manager, timeout=None, shutdown_kernel="immediate")
    try:
        client.execute(env=environment | variables, cwd=str(work), cleanup_kc=True)
    except (CellExecutionError, DeadKernelError) as error:
        last = "\n".join([*client.told.splitlines()[-15:], *str(error).splitlines()[-1:]])
        raise ValueError(f"the notebook raised:\n{COLOURS.sub('', last)}") from error
    return client.told


class TellingClient(NotebookClient):
    """nbclient, which also shows what the cells print while they run."""

    told = ""
    """What they have printed."""

    def process_message(self, msg, cell, cell_index):
        """Handles one message of the kernel."""
        if msg["msg_type"] == "stream":
            self.told += msg["content"]["text"]
            for line in msg["content"]["text"].splitlines():
                say(f"  | {line}")
        return super().process_message(msg, cell, cell_index)
