"""The isolation isolates: each check here also shows that without it the thing would have been reached."""

import socket
import subprocess
import tempfile
from contextlib import closing
from pathlib import Path

import nbformat
import pytest
from helpers import ROOT

from bundle import REQUIREMENTS, needed_distributions
from sandbox import NAMESPACE, SOCKET_BLOCK, isolation, make_environment, run_notebook

CONNECT = """
import socket, sys
socket.create_connection(("127.0.0.1", int(sys.argv[1])), timeout=5)
print("connected")
"""
HOWS = [
    pytest.param(
        NAMESPACE,
        marks=pytest.mark.skipif(isolation() != NAMESPACE, reason="network namespaces are not allowed here"),
    ),
    SOCKET_BLOCK,
]


@pytest.fixture(scope="module")
def pythons(tmp_path_factory):
    """Isolation -> Python of a clean environment with a kernel in it."""
    folder = tmp_path_factory.mktemp("environments")
    wanted = needed_distributions((*REQUIREMENTS["kernel"], "numpy"))
    return {
        how: make_environment(folder / how.split()[0], wanted, block_sockets=how == SOCKET_BLOCK)
        for how in (NAMESPACE, SOCKET_BLOCK)
    }


@pytest.fixture
def port():
    """A port of this machine that answers."""
    with closing(socket.create_server(("127.0.0.1", 0), backlog=16)) as server:
        yield server.getsockname()[1]


@pytest.fixture
def work():
    """A folder with a short path, as Unix sockets need."""
    with tempfile.TemporaryDirectory(dir="/tmp") as name:
        yield Path(name)


def run_cells(*cells, how, pythons, work, inputs, hidden=(), variables=None):
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(cell) for cell in cells])
    return run_notebook(
        notebook,
        python=pythons[how],
        inputs=inputs,
        hidden=hidden,
        work=work,
        how=how,
        variables=variables or {},
    )


def test_the_environment_holds_what_is_listed_and_no_more(pythons):
    python = pythons[NAMESPACE]
    for module, is_there in (("numpy", True), ("ipykernel", True), ("polars", False), ("common", False)):
        found = subprocess.run([python, "-c", f"import {module}"], capture_output=True, cwd="/", env={})
        assert (found.returncode == 0) == is_there, (module, found.stderr)


def test_another_version_than_installed_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"lists numpy 0\.1, but .* is installed here"):
        make_environment(tmp_path / "e", {"numpy": "0.1"}, block_sockets=False)
    with pytest.raises(ValueError, match="lists no-such-thing 1, but none is installed here"):
        make_environment(tmp_path / "f", {"no-such-thing": "1"}, block_sockets=False)


@pytest.mark.parametrize("how", HOWS)
def test_the_network_is_cut_off_in_the_kernel_and_its_children(how, pythons, work, port):
    free = subprocess.run([pythons[NAMESPACE], "-c", CONNECT, str(port)], capture_output=True, text=True)
    assert free.stdout == "connected\n", free.stderr
    cell = f"""
import socket, subprocess, sys
def attempts():
    yield lambda: socket.create_connection(("127.0.0.1", {port}), timeout=5)
    yield lambda: socket.socket().connect(("127.0.0.1", {port}))
    yield lambda: socket.socket(socket.AF_INET, socket.SOCK_DGRAM).sendto(b"x", ("127.0.0.1", {port}))
    yield lambda: socket.getaddrinfo("example.org", 80)
for attempt in attempts():
    try:
        attempt()
    except OSError as error:
        print("refused")
child = subprocess.run([sys.executable, "-c", {CONNECT!r}, "{port}"], capture_output=True, text=True)
print("child", child.returncode, "OSError" in child.stderr or "unreachable" in child.stderr)
"""
    text = run_cells(cell, how=how, pythons=pythons, work=work, inputs={})
    assert text.splitlines() == ["refused"] * 4 + ["child 1 True"]


@pytest.mark.skipif(isolation() != NAMESPACE, reason="network namespaces are not allowed here")
def test_inputs_are_read_only_and_the_repository_is_hidden(pythons, work, tmp_path):
    (tmp_path / "in").mkdir()
    (tmp_path / "in/file.txt").write_text("as it was")
    cell = f"""
import os
place = os.environ["BUNDLE_INPUTS"] + "/x/"
print(open(place + "file.txt").read())
for name in ("file.txt", "new.txt"):
    try:
        open(place + name, "w")
    except OSError:
        print("refused")
print(os.listdir({str(ROOT / "common")!r}), sorted(os.environ.keys() & {{"PYTHONPATH", "VIRTUAL_ENV"}}))
"""
    text = run_cells(
        cell,
        how=NAMESPACE,
        pythons=pythons,
        work=work,
        inputs={"x": tmp_path / "in"},
        hidden=[ROOT / "common"],
    )
    assert text.splitlines() == ["as it was", "refused", "refused", "[] []"]
    assert (ROOT / "common/files.py").is_file() and (tmp_path / "in/file.txt").read_text() == "as it was"


def test_a_cell_that_raises_is_an_error_with_its_last_words(pythons, work):
    cells = ("print('before')", "raise RuntimeError('no good')", "print('after')")
    with pytest.raises(ValueError, match=r"(?s)the notebook raised:.*before.*RuntimeError: no good"):
        run_cells(*cells, how=SOCKET_BLOCK, pythons=pythons, work=work, inputs={})
