#!/usr/bin/env bash
# Builds the API reference from docstrings; a warning of pdoc is an error:  launch/docs.sh [DIRECTORY]
# Without an argument it is in .venv/api: open index.html there.
set -euo pipefail

# shellcheck source=launch/setup.sh
source "$(dirname "${BASH_SOURCE[0]}")/setup.sh"
OUT="$(realpath -m "${1:-$ROOT/.venv/api}")"
cd "$ROOT"
setup_environment test,lint,frameworks
say "pdoc: the API reference, in $OUT"
"$PY" -W error::UserWarning -m pdoc --docformat google -o "$OUT" dist_asgd dist_asgd.checkpoint \
    dist_asgd.integrations.{accelerate,lightning,transformers}
