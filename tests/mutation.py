"""Small wrong changes (mutants) of the modules that make numbers: which of them does no test notice?

In    the modules of NEAREST, and the tests beside each (fast ones first)
Out   a JSON line a mutant, as each ends; stdout: a table by module, and every survivor with its change
Run   python tests/mutation.py --out mutants.jsonl --jobs 2      (300 mutants: about an hour on two cores)

cosmic-ray makes the mutants; it is no dependency of the project: `pip install cosmic-ray` before. The draw is
the same for the same seed and source, and takes from each module in proportion to its mutants. What changes
only annotations, docstrings or the texts of errors does not count, nor does what is no Python. Tests that do
not end are a mutant noticed by the clock. A run goes on where its file ends; to try survivors again after
writing a test, remove their lines.
"""

import argparse
import ast
import difflib
import hashlib
import json
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from queue import SimpleQueue

from cosmic_ray.ast import ast_nodes, get_ast
from cosmic_ray.mutating import mutate_code
from cosmic_ray.plugins import get_operator, operator_names

ROOT = Path(__file__).resolve().parents[1]
LOADING = "models/test_parity.py models/test_checkpoint.py models/test_save.py models/test_foreign.py"
NEAREST = {
    "ops/__init__.py": "ops/test_choose.py",
    "ops/attention.py": "ops/test_attention.py",
    "ops/gated_activation.py": "ops/test_elementwise.py",
    "ops/rms_norm.py": "ops/test_elementwise.py",
    "ops/rotary.py": "ops/test_elementwise.py",
    "models/families.py": LOADING,
    "models/layers.py": "models/test_parity.py",
    "models/head.py": "models/test_head.py models/test_parity.py",
    "models/preference.py": LOADING,
    "models/weights.py": "models/test_save.py models/test_checkpoint.py",
    "models/checkpoint.py": LOADING,
    "train/optim.py": "train/test_optim.py stages/test_fsdp.py",
    "batching.py": "common/test_batching.py score/test_predict.py",
    "tokenizer/__init__.py": "common/test_tokenizer.py common/test_prompts.py",
    "tokenizer/chat_template.py": "common/test_tokenizer.py",
    "prompts.py": "common/test_prompts.py common/test_trained.py",
    "tokens.py": "common/test_tokens.py",
    "score/metrics.py": "score/test_metrics.py",
    "score/calibration.py": "score/test_calibration.py",
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--num-mutants", type=int, default=300)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--jobs", type=int, default=1, help="test runs side by side")
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    mutants = draw(args.num_mutants, args.seed)
    found = {one["id"]: one for one in map(json.loads, args.out.open())} if args.out.exists() else {}
    with tempfile.TemporaryDirectory() as scratch, ThreadPoolExecutor(args.jobs) as workers:
        trees = SimpleQueue()
        for number in range(args.jobs):
            trees.put(copy_tree(Path(scratch, str(number))))
        firsts = {tests: module for module, tests in NEAREST.items()}  # one module of each set of tests
        ran = workers.map(lambda module: run(trees, module), firsts.values())
        unharmed = dict(zip(firsts, ran, strict=True))
        for module, tests in NEAREST.items():
            if unharmed[tests][0] != "survived":
                print(f"left out: the tests of {module} fail before any change", file=sys.stderr)
                mutants = [mutant for mutant in mutants if mutant["module"] != module]

        def judge(mutant: dict) -> None:
            module = mutant["module"]
            outcome, seconds = run(trees, module, mutant.pop("source"), 30 + 4 * unharmed[NEAREST[module]][1])
            found[mutant["id"]] = mutant | {"outcome": outcome, "seconds": round(seconds, 1)}
            with args.out.open("a") as file:
                file.write(json.dumps(found[mutant["id"]]) + "\n")

        list(workers.map(judge, (mutant for mutant in mutants if mutant["id"] not in found)))
    show([found[mutant["id"]] for mutant in mutants])


def draw(num_mutants: int, seed: int) -> list[dict]:
    """The same mutants for the same seed and source, none twice, spread over the modules."""
    spread, generator, seen = [], random.Random(seed), set()
    for module in NEAREST:
        ways = [*ways_to_change((ROOT / "common" / module).read_text(encoding="utf-8"))]
        generator.shuffle(ways)
        spread += [((place + 0.5) / len(ways), module, *way) for place, way in enumerate(ways)]
    mutants = []
    for _, module, operator, occurrence in sorted(spread):
        source = (ROOT / "common" / module).read_text(encoding="utf-8")
        mutated = mutate_code(source, get_operator(operator)(), occurrence)
        name = hashlib.sha256(f"{module}\n{mutated}".encode()).hexdigest()[:16]
        if name in seen or meaning(mutated) in (None, meaning(source)):
            continue
        seen.add(name)
        lines = [*difflib.unified_diff(source.splitlines(), mutated.splitlines(), lineterm="", n=0)]
        line = int(lines[2].split()[1].split(",")[0][1:])
        about = {"module": module, "line": line, "operator": operator, "diff": lines[3:]}
        mutants.append({"id": name, **about, "source": mutated})
        if len(mutants) == num_mutants:
            break
    return mutants


def ways_to_change(source: str) -> Iterator[tuple[str, int]]:
    """Every operator that takes no arguments, with the number of each place where it can act."""
    nodes = [*ast_nodes(get_ast(source))]
    for name in operator_names():
        if not get_operator(name).arguments():
            places = sum(len(list(get_operator(name)().mutation_positions(node))) for node in nodes)
            yield from ((name, occurrence) for occurrence in range(places))


def meaning(source: str) -> str | None:
    """The syntax tree without annotations, docstrings and texts of errors; None where the source has none."""
    try:
        tree = ast.parse(source)
    except SyntaxError:
        return None
    for node in ast.walk(tree):
        for name in ("annotation", "returns", "msg"):
            if getattr(node, name, None) is not None:
                setattr(node, name, ast.Constant(None))
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant):
            node.value = ast.Constant(None)
        if isinstance(node, ast.Raise) and isinstance(node.exc, ast.Call):
            node.exc.args = []
    return ast.dump(tree)


def copy_tree(folder: Path) -> Path:
    """A private copy, in which a module can be changed while others are tested beside it."""
    unneeded = shutil.ignore_patterns(".*", "__pycache__", "artifacts", "*.jsonl")
    return shutil.copytree(ROOT, folder, ignore=unneeded)


def run(
    trees: SimpleQueue, module: str, source: str | None = None, timeout: float = 900
) -> tuple[str, float]:
    """(outcome, seconds) of the module's tests, with its source replaced."""
    tree = trees.get()
    path, start = tree / "common" / module, time.monotonic()
    original = path.read_text(encoding="utf-8")
    path.write_text(original if source is None else source, encoding="utf-8")
    # Without bytecode: a change that keeps a file's size within one second would go unseen.
    inherited = os.environ.get("PYTHONPATH", "")
    environment = os.environ | {
        "PYTHONPATH": f"{tree}{os.pathsep}{inherited}",
        "PYTHONDONTWRITEBYTECODE": "1",
    }
    environment |= {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    options = ("-x", "-q", "-p", "no:cacheprovider", "--hypothesis-seed=0", f"--basetemp={tree / '.tests'}")
    tests = [f"tests/{path}" for path in NEAREST[module].split()]
    process = subprocess.Popen(
        [sys.executable, "-m", "pytest", *options, *tests],
        cwd=tree,
        env=environment,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_DATA, (12 << 30, 12 << 30)),
    )
    try:
        outcome = "survived" if process.wait(timeout) == 0 else "killed"
    except subprocess.TimeoutExpired:
        outcome = "timed out"
    finally:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)  # what the tests started too
        process.wait()
        path.write_text(original, encoding="utf-8")
        trees.put(tree)
    return outcome, time.monotonic() - start


def show(mutants: list[dict]) -> None:
    """The table, then the survivors."""
    kinds = ("killed", "timed out", "survived")
    print(f"{'module':26}{'mutants':>9}" + "".join(f"{kind:>11}" for kind in kinds))
    for module in [*NEAREST, "all"]:
        outcomes = [one["outcome"] for one in mutants if module in (one["module"], "all")]
        print(f"{module:26}{len(outcomes):9}" + "".join(f"{outcomes.count(kind):11}" for kind in kinds))
    for one in mutants:
        if one["outcome"] == "survived":
            print(f"\ncommon/{one['module']}:{one['line']}  {one['operator']}", *one["diff"], sep="\n  ")


if __name__ == "__main__":
    main()
