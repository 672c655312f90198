# shellcheck shell=bash
# Checks what users get. Source it after setup.sh, then call check_package. It
#
#   1. builds the sdist, and the wheel from what is in the sdist, into .venv/package;
#   2. compares both with the files that git tracks;
#   3. installs the wheel, and nothing else by name, into .venv/bare, an environment without this repository and NumPy;
#   4. runs the Python of README.md there, in one process and on two ranks, and the dist-asgd command;
#   5. has mypy read a user's file there, to which the types of the package must be known.
#
# A second run takes .venv/bare as it is and only installs the wheel again.

BARE="$ROOT/.venv/bare"
PACKAGE="$ROOT/.venv/package"
UNPACKED=".ci/ .gitignore" # tracked by git, and in no package

check_package() {
    if [[ ! -e "$ROOT/.venv/pinned" ]]; then
        package_skipped "python3 brings its own torch; a bare environment would download another"
        return
    fi
    build_package
    make_bare_environment
    say "pip install -c constraints.txt $(basename "$WHEEL") into .venv/bare"
    bare -m pip uninstall -qq -y --disable-pip-version-check dist-asgd >/dev/null 2>&1 </dev/null || true
    bare -m pip install -qq --no-input --disable-pip-version-check -c "$ROOT/constraints.txt" "$WHEEL" </dev/null ||
        die "pip could not install $WHEEL into .venv/bare: see its message above."
    ! bare -c 'import numpy' 2>/dev/null || die "NumPy is in .venv/bare, so nothing there shows that it is not needed."
    run_readme
    say "dist-asgd plan, in .venv/bare"
    "$BARE/bin/dist-asgd" plan --world-size 2 1000x1000 1000 >/dev/null || die "dist-asgd fails where only the wheel is."
    check_types
}

# Without py.typed in the wheel everything would be Any, and mypy would tell of an ignore that ignores nothing.
check_types() {
    say "mypy on a user's file, with the wheel in .venv/bare"
    cat >"$PACKAGE/user.py" <<'END'
import torch

from dist_asgd import EMA, ShardedASGD, ShardedAverages

model = torch.nn.Linear(2, 1)
optimizer = ShardedASGD(model.named_parameters(), lr=0.1, average={"ema": EMA(0.9)})
norm: torch.Tensor = optimizer.clip_grad_norm_(1.0)
numbers: dict[str, float] = optimizer.metrics(distance=True)
averages = ShardedAverages(model.named_parameters(), EMA(half_life="long"))  # type: ignore[arg-type]
averages.start_averaging(norm)  # type: ignore[call-arg]
END
    (cd "$PACKAGE" && env -u MYPYPATH "$PY" -m mypy --python-executable "$BARE/bin/python" --config-file /dev/null \
        --cache-dir "$ROOT/.venv/mypy" --warn-unused-ignores --disallow-any-unimported user.py) ||
        die "a user's file has other types where only the wheel is: see mypy's message above."
}

package_skipped() {
    if [[ "${CI:-}" == true ]]; then
        printf '!!\n!! CI WITHOUT THE BARE ENVIRONMENT: %s\n!!\n' "$1"
    else
        say "the wheel will not be tried in a bare environment: $1"
    fi
}

# Sets $WHEEL. The wheel is built from the sdist: so that has everything that a build needs.
build_package() {
    local sdist wheel
    say "building sdist and wheel"
    rm -rf "$PACKAGE"
    mkdir -p "$PACKAGE/unpacked"
    "$PY" -m hatchling build -t sdist -d "$PACKAGE" >/dev/null || die "hatchling could not build the sdist."
    sdist=("$PACKAGE"/*.tar.gz)
    tar -xzf "${sdist[0]}" -C "$PACKAGE/unpacked" --strip-components 1
    (cd "$PACKAGE/unpacked" && "$PY" -m hatchling build -t wheel -d "$PACKAGE" >/dev/null) ||
        die "hatchling could not build the wheel from what is in ${sdist[0]}."
    wheel=("$PACKAGE"/*.whl)
    WHEEL="${wheel[0]}"
    compare_with_git
}

# Fails for a tracked file that the sdist lacks, and for one of the package that the wheel lacks.
compare_with_git() {
    git -C "$ROOT" rev-parse --is-inside-work-tree >/dev/null 2>&1 || return 0
    git -C "$ROOT" ls-files -z | "$PY" -c '
import pathlib, sys, zipfile

unpacked, wheel, left_out = pathlib.Path(sys.argv[1]), zipfile.ZipFile(sys.argv[2]).namelist(), tuple(sys.argv[3].split())
tracked = [name for name in sys.stdin.read().split("\0") if name and not name.startswith(left_out)]
tracked = [name for name in tracked if pathlib.Path(name).exists()]
for kind, missing in (
    ("sdist", [name for name in tracked if not (unpacked / name).is_file()]),
    ("wheel", [name for name in tracked if name.startswith("dist_asgd/") and name not in wheel]),
):
    if missing:
        raise SystemExit(f"dist_asgd: the {kind} lacks {missing}: see [tool.hatch.build] in pyproject.toml")
' "$PACKAGE/unpacked" "$WHEEL" "$UNPACKED"
}

make_bare_environment() {
    local print
    print="$(fingerprint)" || die "could not read pyproject.toml and constraints.txt in $ROOT."
    [[ "$(cat "$BARE/stamp" 2>/dev/null)" != "$print" ]] || return 0
    say "making .venv/bare, with the torch and fsspec of constraints.txt (the first time takes a minute)"
    rm -rf "$BARE"
    "$PY" -m venv "$BARE" || die "could not make $BARE: see the message above."
    bare -m pip install -qq --no-input --disable-pip-version-check -c "$ROOT/constraints.txt" torch fsspec </dev/null ||
        die "pip could not install torch and fsspec into .venv/bare: see its message above."
    printf '%s\n' "$print" >"$BARE/stamp"
}

# The environment's python, without what the caller's environment would add to its path.
bare() {
    env -u PYTHONPATH OMP_NUM_THREADS=1 "$BARE/bin/python" "$@"
}

# Writes the first Python block of README.md, which is a program, to a file and runs it. Later blocks go on from its names.
run_readme() {
    local program="$PACKAGE/readme.py"
    awk -v file="$program" '
        /^```python$/ && !n++ { inside = 1; next }
        /^```$/ { inside = 0 }
        inside { print > file }' "$ROOT/README.md"
    [[ -s "$program" ]] || die "README.md has no Python to run."
    say "README.md, first Python block, in .venv/bare: one process"
    (cd "$PACKAGE" && bare "$program" </dev/null) || die "the first block of README.md fails where only the wheel is."
    say "README.md, first Python block, in .venv/bare: two ranks"
    (cd "$PACKAGE" && bare -m torch.distributed.run --standalone --nproc-per-node 2 "$program" </dev/null) ||
        die "the first block of README.md fails on two ranks where only the wheel is."
}
