"""Running a notebook as the platform does: the listed libraries only, no network, read-only inputs."""

import os
import re
import shlex
import shutil
import subprocess
import venv
from collections import defaultdict
from collections.abc import Mapping, Sequence
from importlib.metadata import PackageNotFoundError, distribution, distributions
from pathlib import Path

import nbformat
from jupyter_client.kernelspec import KernelSpecManager
from jupyter_client.manager import AsyncKernelManager
from jupyter_core.utils import run_sync
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
import socket


def refuse(*_, **__):
    raise OSError("the network is cut off")


def guarded(method):
    def call(self, *arguments):
        return method(self, *arguments) if self.family == socket.AF_UNIX else refuse()

    return call


for name in ("connect", "connect_ex", "sendto", "bind"):
    setattr(socket.socket, name, guarded(getattr(socket.socket, name)))
socket.getaddrinfo = refuse
'''


def make_environment(folder: Path, wanted: Mapping[str, str], *, block_sockets: bool) -> Path:
    """A virtual environment that holds certain installed distributions, linked, and nothing else.

    Args:
        folder: To create.
        wanted: Name -> version, dependencies included; the versions must be the installed ones.
        block_sockets: Refuse every network connection of its Python processes.

    Returns:
        Its Python.

    Raises:
        ValueError: A distribution is not installed in that version.
    """
    venv.create(folder, symlinks=True, with_pip=False)
    [target] = folder.glob("lib/python*/site-packages")
    names = {canonicalize_name(name) for name in wanted}
    owners = _top_level_owners()
    for name, version in wanted.items():
        try:
            installed = distribution(name)
        except PackageNotFoundError as error:
            raise ValueError(f"the manifest lists {name} {version}, which is not installed here") from error
        if installed.version != version:
            raise ValueError(
                f"the manifest lists {name} {version}, but {installed.version} is installed here; build the "
                "bundle again with just submit"
            )
        for top, files in _files_by_top_level(installed).items():
            if owners[top] <= names:
                if not (target / top).exists():
                    (target / top).symlink_to(Path(installed.locate_file(top)))
                continue
            for file in files:  # a namespace that a distribution which is not listed also has a part of
                (target / file).parent.mkdir(parents=True, exist_ok=True)
                (target / file).symlink_to(Path(installed.locate_file(file)))
    if block_sockets:
        (target / "_cut_network.py").write_text(BLOCK, encoding="utf-8")
        (target / "_cut_network.pth").write_text("import _cut_network\n", encoding="utf-8")
    return folder / "bin/python"


def _files_by_top_level(installed) -> dict[str, list[str]]:
    """First part of the path -> files below it, as far as they lie in site-packages."""
    found = defaultdict(list)
    for file in installed.files or ():
        if file.parts[0] not in ("..", "/", "__pycache__"):
            found[file.parts[0]].append(str(file))
    return found


def _top_level_owners() -> dict[str, set[str]]:
    """First part of the path -> the installed distributions that have files there."""
    owners = defaultdict(set)
    for installed in distributions():
        for top in {file.parts[0] for file in installed.files or ()}:
            owners[top].add(canonicalize_name(installed.metadata["Name"]))
    return owners


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
        read_only: Folder -> where it appears, read-only; an existing folder.
        hidden: Folders that appear empty.
    """
    steps = ["set -e"]
    for source, place in read_only.items():
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
    places = {work / "inputs" / name: folder for name, folder in inputs.items()}
    for place, folder in places.items():
        place.parent.mkdir(exist_ok=True)
        if how == NAMESPACE:
            place.mkdir()
        else:
            place.symlink_to(folder.resolve(), target_is_directory=True)
    command = [str(python), "-m", "ipykernel_launcher", "-f", "{connection_file}"]
    if how == NAMESPACE:
        read_only = {folder.resolve(): place for place, folder in places.items()}
        command = isolated(command, read_only=read_only, hidden=hidden)
    spec = {"argv": command, "display_name": "bundle", "language": "python"}
    write_json(work / "kernels/bundle/kernel.json", spec)
    specs = KernelSpecManager(kernel_dirs=[str(work / "kernels")], ensure_native_kernel=False)
    # Unix sockets: they reach into another network namespace, TCP does not.
    manager = AsyncKernelManager(
        kernel_name="bundle",
        kernel_spec_manager=specs,
        transport="ipc",
        ip=str(work / "kernel"),
        connection_file=str(work / "connection.json"),
    )
    environment = {name: os.environ[name] for name in KEPT_VARIABLES if name in os.environ}
    environment |= {
        "HOME": str(work),
        "PYTHONNOUSERSITE": "1",
        "BUNDLE_INPUTS": str(work / "inputs"),
        **variables,
    }
    client = TellingClient(notebook, km=manager, timeout=None, resources={"metadata": {"path": str(work)}})
    try:
        client.execute(env=environment)
    except (CellExecutionError, DeadKernelError) as error:
        last = "\n".join([*printed(notebook).splitlines()[-15:], *str(error).splitlines()[-1:]])
        raise ValueError(f"the notebook raised:\n{COLOURS.sub('', last)}") from error
    finally:
        run_sync(manager.shutdown_kernel)(now=True)
    return printed(notebook)


class TellingClient(NotebookClient):
    """nbclient, which also shows what the cells print while they run."""

    def process_message(self, msg, cell, cell_index):
        """Handles one message of the kernel."""
        if msg["msg_type"] == "stream":
            for line in msg["content"]["text"].splitlines():
                say(f"  | {line}")
        return super().process_message(msg, cell, cell_index)


def printed(notebook: nbformat.NotebookNode) -> str:
    """Everything that the cells wrote to stdout and stderr."""
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", ())]
    return "".join(output["text"] for output in outputs if output["output_type"] == "stream")
