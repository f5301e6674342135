"""Renders the site from the notebooks into _docs, with nbdev and Quarto.

nbdev-docs by itself would try to install Quarto by sudo, and stops at an annotation that names a
library which is only imported for type checkers, as our slow ones are.
"""

import inspect
import os
import shutil
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
NO_QUARTO = """\
docs: the site is rendered by Quarto, which is not on the PATH. Get it from quarto.org, or by
docs: 'conda install -c conda-forge quarto', or by 'brew install --cask quarto'."""


def signature(obj, *, eval_str: bool = False, **options) -> inspect.Signature:
    "A signature whose annotations stay text where their names are not imported."
    try:
        return inspect.signature(obj, eval_str=eval_str, **options)
    except NameError:
        return inspect.signature(obj, eval_str=False, **options)


def process(
    notebook: Path,  # .ipynb
    page: Path,  # where the processed notebook goes
) -> None:
    "Do to one notebook what nbdev does before Quarto renders it."
    import fastcore.docments
    from nbdev.processors import FilterDefaults
    from nbdev.serve_drv import exec_nb

    fastcore.docments.signature = signature
    exec_nb(notebook, page, FilterDefaults)


def main() -> int:
    if not shutil.which("quarto"):
        print(NO_QUARTO, file=sys.stderr)
        return 2
    import fastcore.docments
    from nbdev.quarto import nbdev_docs

    fastcore.docments.signature = signature
    os.chdir(ROOT)
    nbdev_docs.__wrapped__(n_workers=0)  # in this process, where the signature is ours
    print("docs: open _docs/index.html")
    return 0


if __name__ == "__main__":
    sys.exit(main())
