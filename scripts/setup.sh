#!/bin/sh
# Makes .venv from requirements/dev.lock; `make setup` calls it when that, or this file, is newer than
# the stamp. The stamp is written last: whatever was cut short is made anew the next time.
set -eu
cd "$(dirname "$0")/.."
here=$(pwd -P) # as make and venv see it
say() { printf '\033[1m%s\033[0m\n' "setup: $*" >&2; }

# --- a Python 3.11 that can make environments
for python in "${PYTHON:-}" python3.11 python3 python; do
    [ -n "$python" ] && "$python" -c 'import sys; sys.exit(sys.version_info[:2] != (3, 11))' 2>/dev/null && break
    python=
done
if [ -z "$python" ]; then
    say "Python 3.11 is needed and neither python3.11 nor python3 is one (python3 is: $(python3 --version 2>&1 || true))."
    say "Install it (Debian: apt install python3.11-venv; macOS: brew install python@3.11), or name it: make PYTHON=/path/to/python3.11"
    exit 2
fi
"$python" -c 'import ensurepip, venv' 2>/dev/null ||
    scripts/system.sh python3.11-venv "this Python can't make environments" || exit 2

# --- one at a time: who comes second waits, and mostly finds all of it there
exec 9<scripts/setup.sh
if command -v flock >/dev/null 2>&1 && ! flock -n 9; then
    say "waiting for another set-up of this checkout"
    flock 9
    ready=.venv/.ready
    [ "$(cat $ready 2>/dev/null)" = "$here" ] && [ $ready -nt requirements/dev.lock ] &&
        [ $ready -nt pyproject.toml ] && [ $ready -nt scripts/setup.sh ] && exit 0
fi

# --- .venv, from nothing if it is missing, moved, broken, or was cut short while it was being filled
fresh=
[ -e .venv/.filling ] && fresh="the last set-up was cut short"
[ -x .venv/bin/python ] && .venv/bin/python -c 'import sys, pip; sys.exit(sys.version_info[:2] != (3, 11))' 2>/dev/null ||
    fresh="${fresh:-there is none that works}"
[ -z "$fresh" ] && [ "$(.venv/bin/python -c 'import sys; print(sys.prefix)')" -ef .venv ] || fresh="${fresh:-it was moved}"
grep -qsF "$here/.venv" .venv/bin/activate || fresh="${fresh:-it was moved}"
if [ -n "$fresh" ]; then
    say "making .venv ($fresh)"
    "$python" -m venv --clear .venv
fi
rm -f .venv/.ready
touch .venv/.filling

# --- the locked packages
sed -n '/^uv==/,/[^\\]$/p' requirements/dev.lock >.venv/uv.txt
if ! .venv/bin/uv --version 2>/dev/null | grep -qF "$(sed -n 's/^uv==\([^ ]*\).*/uv \1/p' .venv/uv.txt)"; then
    say "installing uv"
    .venv/bin/python -m pip install --disable-pip-version-check -q --require-hashes --no-deps -r .venv/uv.txt
fi
say "installing $(grep -c '^[a-z0-9]' requirements/dev.lock) locked packages (the first time takes a few minutes)"
quiet=--quiet
[ -t 2 ] && quiet= # a terminal gets uv's progress bars, a log doesn't get 300 lines
export VIRTUAL_ENV="$here/.venv"
compile= # where Python may not keep bytecode, as in many images, each import would compile anew: 4 s instead of 2 for Prefect
[ -z "${PYTHONDONTWRITEBYTECODE:-}" ] || compile=--compile-bytecode
.venv/bin/uv pip sync $quiet $compile --require-hashes requirements/dev.lock
rm -f .venv/.filling
.venv/bin/uv pip install $quiet --no-deps --no-build-isolation -e .
[ -z "$compile" ] || .venv/bin/python -m compileall -q -j 0 titanic_mlops

# --- what a git checkout has besides: hooks, and a merge driver that keeps notebooks whole
if [ "$(git rev-parse --show-toplevel 2>/dev/null || true)" -ef . ]; then
    hooks=$(git config --local core.hooksPath || true)
    case "$hooks" in
    '' | .githooks) git config --local core.hooksPath .githooks ;;
    *) say "core.hooksPath is $hooks and stays so: call .githooks/pre-commit from there" ;;
    esac
    git config --local merge.jupyternotebook.name "merge notebooks cell by cell (nbdev)"
    git config --local merge.jupyternotebook.driver '"$(git rev-parse --show-toplevel)"/.venv/bin/nbdev-merge %O %A %B %P'
fi

# --- the kernel that starts warm
.venv/bin/python - <<'PYTHON'
import importlib.util

if importlib.util.find_spec("titanic_mlops.flow") and importlib.util.find_spec("titanic_mlops.flow.kernels"):
    from titanic_mlops.flow.kernels import install_kernelspec

    install_kernelspec()
PYTHON

echo "$here" >.venv/.ready
say "ready"
