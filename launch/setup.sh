# shellcheck shell=bash
# Makes .venv in the repository root and installs this project into it. Source it, then:
#
#   setup_environment test,lint      # extras of pyproject.toml; sets $PY to the environment's python
#
# torch >= 2.10 that python3 already has (a CUDA build, a cluster's own build) is used as it is and not downloaded again;
# otherwise the versions in constraints.txt are installed. A second run finds a stamp in .venv and installs nothing.
# PYTHON=/path/to/python3.12 chooses another python3 for a new environment.

ROOT="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
PY="$ROOT/.venv/bin/python"

say() { printf '== %s\n' "$*"; }
die() {
    printf 'dist_asgd: %s\n' "$*" >&2
    exit 1
}

# Prints the folder that holds torch; fails unless this python imports torch >= 2.10.
find_torch() {
    "$1" -c '
import os, torch
if tuple(int(n) for n in torch.__version__.split(".")[:2]) < (2, 10):
    raise SystemExit(1)
print(os.path.dirname(os.path.dirname(torch.__file__)))' 2>/dev/null
}

make_environment() {
    local python="${PYTHON:-python3}" torch_folder
    command -v "$python" >/dev/null || die "$python is missing: install Python 3.10 or newer."
    "$python" -c 'import sys; sys.exit(sys.version_info < (3, 10))' ||
        die "$("$python" --version) is too old: install Python 3.10 or newer, or name one with PYTHON=/path/to/python3."
    "$python" -c 'import venv, ensurepip' 2>/dev/null ||
        die "$python cannot make virtual environments: install its venv and pip (Debian, Ubuntu: apt-get install python3-venv)."

    if torch_folder="$(find_torch "$python")"; then
        say "making .venv with $("$python" --version), using the torch it already has"
        "$python" -m venv --system-site-packages "$ROOT/.venv" || die "could not make $ROOT/.venv: see the message above."
        # Where python3 is itself in a virtual environment, --system-site-packages does not reach that one's packages.
        find_torch "$PY" >/dev/null ||
            printf '%s\n' "$torch_folder" >"$("$PY" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/outer.pth"
    else
        say "making .venv with $("$python" --version)"
        "$python" -m venv "$ROOT/.venv" || die "could not make $ROOT/.venv: see the message above."
        touch "$ROOT/.venv/pinned"
    fi
}

# What an installation depends on: if this changes, install again.
fingerprint() {
    (cd "$ROOT" && "$PY" -c '
import hashlib, os, sys
digest = hashlib.sha256(f"{sys.version} {os.getcwd()}".encode())
for name in ("pyproject.toml", "constraints.txt"):
    with open(name, "rb") as file:
        digest.update(file.read())
print(digest.hexdigest())')
}

install_project() {
    local extras="$1" constraints="$ROOT/constraints.txt"
    "$PY" -m pip --version >/dev/null 2>&1 || die "pip is missing in $ROOT/.venv: remove that folder and run this again."
    # An environment that we did not fill ourselves keeps its torch.
    if [[ ! -e "$ROOT/.venv/pinned" ]] && find_torch "$PY" >/dev/null; then
        constraints="$ROOT/.venv/constraints.txt"
        grep -v '^torch==' "$ROOT/constraints.txt" >"$constraints"
    fi
    say "installing dist_asgd[$extras] (the first time takes a minute or more)"
    "$PY" -m pip install -qq --no-input --disable-pip-version-check -c "$constraints" -e "${ROOT}[$extras]" </dev/null ||
        die "pip could not install dist_asgd[$extras]: see its message above, and check that the package index is reachable."
}

setup_environment() {
    local extras="$1" stamp="$ROOT/.venv/stamp-$1" print
    [[ -e "$ROOT/.venv" ]] || make_environment
    "$PY" -c 'import sys; sys.exit(sys.prefix == sys.base_prefix or sys.version_info < (3, 10))' 2>/dev/null ||
        die "$ROOT/.venv is not a working virtual environment of Python 3.10 or newer: remove it and run this again."
    print="$(fingerprint)" || die "could not read pyproject.toml and constraints.txt in $ROOT."
    if [[ "$(cat "$stamp" 2>/dev/null)" == "$print" ]]; then
        say "using .venv as it is"
        return
    fi
    install_project "$extras"
    printf '%s\n' "$print" >"$stamp"
}
