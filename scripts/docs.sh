#!/bin/sh
# Renders the site from the notebooks into _docs; nbdev would try to install Quarto by sudo, so ask first.
set -eu
cd "$(dirname "$0")/.."
if ! command -v quarto >/dev/null; then
    echo "docs: the site is rendered by Quarto, which is not on the PATH. Get it from quarto.org," >&2
    echo "docs: or by 'conda install -c conda-forge quarto' or 'brew install --cask quarto'." >&2
    exit 2
fi
PATH="$PWD/.venv/bin:$PATH" nbdev-docs "$@"
echo "docs: open _docs/index.html"
