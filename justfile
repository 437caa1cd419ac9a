# Every job by name. Arguments after the model go to the script: just stage1 gemma9b --dry-run

set positional-arguments
set shell := ["bash", "-euo", "pipefail", "-c"]

python := "python3"
# GPUs of this machine; set with: just gpus=8 stage1 gemma27b
gpus := `nvidia-smi -L 2>/dev/null | grep -c '^GPU' || true`
# Several machines: MACHINES, MACHINE_RANK, MAIN_IP and MAIN_PORT in the environment of each
machines := env("MACHINES", "1")
machine_rank := env("MACHINE_RANK", "0")
main_ip := env("MAIN_IP", "127.0.0.1")
main_port := env("MAIN_PORT", "29500")
processes := if gpus == "0" { "1" } else if machines == "1" { gpus } else { shell('echo $(($1 * $2))', gpus, machines) }
launch := python + " -m common.train.launcher --num_processes " + processes + " --config_file accelerate_configs/"
# One process needs no launcher
alone := if machines == "1" { python } else { "echo 'error: MACHINES=" + machines + ", but no GPU here; say how many: just gpus=8 ..., or unset MACHINES' >&2; exit 1;" }
launch_replicas := if processes == "1" { alone } else { launch + "ddp.yaml" + rendezvous }
rendezvous := if machines == "1" { "" } else { " --num_machines " + machines + " --machine_rank " + machine_rank + " --main_process_ip " + main_ip + " --main_process_port " + main_port }
hybrid := if machines == "1" { ".yaml" } else { "_multinode.yaml --parallelism_config_dp_replicate_size " + machines + " --parallelism_config_dp_shard_size " + gpus }

# List the jobs
default:
    @just --list --unsorted

# Install into the active environment, from the exact versions; `just setup gpu` adds flash-attn and Transformer Engine
setup extra="dev":
    #!/usr/bin/env bash
    set -euo pipefail
    wanted="$(pwd; cat pyproject.toml constraints.txt)"; stamp="$({{python}} -c 'import sys; print(sys.prefix)')/.arena-preference-{{extra}}"
    [ "$wanted" = "$(cat "$stamp" 2>/dev/null)" ] && exit 0
    {{python}} -m pip install --disable-pip-version-check --constraint constraints.txt --editable ".[{{extra}}]" && echo "$wanted" > "$stamp"

# The whole pipeline on tiny models, on a CPU (about 4 minutes): --train-csv F --test-csv G for real votes
[no-exit-message]
demo *args: setup
    @{{python}} stages/demo.py "$@"

# All tests
[no-exit-message]
test *args: setup
    {{python}} -m pytest --numprocesses 2 --dist loadfile "$@"

# Lint and formatting, read only
[no-exit-message]
check: setup
    {{python}} -m ruff check .
    {{python}} -m ruff format --check .

# Lines of code outside tests; docstrings, comments and blank lines do not count
lines:
    #!/usr/bin/env python3
    import ast, io, subprocess, tokenize
    total, thin = 0, (tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT, tokenize.ENDMARKER)
    for path in subprocess.run(["git", "ls-files", "*.py", ":!tests"], capture_output=True, text=True).stdout.split():
        text = open(path, encoding="utf-8").read()
        bodies = [node.body for node in ast.walk(ast.parse(text)) if isinstance(getattr(node, "body", None), list)]
        alone = [one for body in bodies for one in body if isinstance(one, ast.Expr) and isinstance(getattr(one.value, "value", None), str)]
        docs = {line for one in alone for line in range(one.lineno, one.end_lineno + 1)}
        tokens = [token for token in tokenize.generate_tokens(io.StringIO(text).readline) if token.type not in thin]
        total += len({line for token in tokens for line in range(token.start[0], token.end[0] + 1)} - docs)
    print(f"{total:,} lines of code")

# Repair what lint and formatting can
fix: setup
    {{python}} -m ruff check --fix .
    {{python}} -m ruff format .

# Raw files in data/ -> comparison tables in artifacts/data/; --hub fetches what is not there
[no-exit-message]
prep *args: setup
    @{{python}} data_prep/prepare.py "$@"

# What overlaps with what: duplicates, shared and near-duplicate prompts, fold crossings
[no-exit-message]
leaks *args: setup
    @{{python}} data_prep/leak_check.py "$@"

# Benchmarks, ours beside what one would pick instead: data, padding; on a GPU train MODEL, attention, ops
[no-exit-message]
bench name *args: setup
    @{{python}} "benchmarks/$1.py" "${@:2}"

# Fine-tune a teacher on real votes: gemma9b, gemma27b, armorm8b, tiny-gemma, tiny-llama
[no-exit-message]
stage1 model *args: setup
    @{{just_executable()}} python={{python}} gpus={{gpus}} _train stage1 "$@"

# Fine-tune a student on soft labels
[no-exit-message]
stage2 model *args: setup
    @{{just_executable()}} python={{python}} gpus={{gpus}} _train stage2 "$@"

# Fine-tune a student on real votes again; --final for the bundle
[no-exit-message]
stage3 model *args: setup
    @{{just_executable()}} python={{python}} gpus={{gpus}} _train stage3 "$@"

# Label the pool with every finished teacher
[no-exit-message]
pseudo-label *args: setup
    @{{launch_replicas}} stages/pseudo_label.py "$@"

# Score checkpoints and their ensemble
[no-exit-message]
evaluate *args: setup
    @{{launch_replicas}} stages/evaluate.py "$@"

# Build the bundle and prove it offline; --upload --owner NAME brings it to Kaggle
[no-exit-message]
submit *args: setup
    @{{python}} kaggle/submit.py "$@"

# What happened, as one page with pictures: artifacts/report/report.html
[no-exit-message]
report *args: setup
    @{{python}} stages/report.py "$@"

# What this machine has and lacks; needs no set-up
[no-exit-message]
doctor *args:
    @{{python}} stages/doctor.py "$@"

[no-exit-message]
_train stage model *args:
    @{{ if processes == "1" { alone } else if model =~ "^tiny" { launch_replicas } else if model != "gemma27b" { launch + "fsdp_9b.yaml" + rendezvous } else { launch + "fsdp_27b" + hybrid + rendezvous } }} "stages/$1.py" "${@:2}"
