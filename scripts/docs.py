"""Renders the site from the notebooks into _docs, with nbdev and Quarto.

nbdev-docs by itself would try to install Quarto by sudo; it stops at an annotation that names a
library which is only imported for type checkers, as our slow ones are; and it runs every cell that has
an import in it, without the cells before. Pages are to show the stored outputs, so `lenient` has it run only
what documentation needs: exported cells, plain imports and `show_doc`.
"""

import ast
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


def lenient() -> None:
    "Make nbdev, in this process, lenient about annotations and sparing with what it runs."
    import fastcore.docments
    import nbdev.processors

    asked = nbdev.processors._do_eval

    def runs(cell) -> bool | None:
        if cell.cell_type != "code" or not (lines := cell.parsed_()):
            return None
        exported = cell.directives_.keys() & {"export", "exports", "exporti", "exec_doc"}
        imports = all(isinstance(line, ast.Import | ast.ImportFrom) for line in lines)
        return asked(cell) if exported or imports or nbdev.processors._show_docs(lines) else None

    fastcore.docments.signature = signature
    if asked.__module__ == nbdev.processors.__name__:  # not ours already
        nbdev.processors._do_eval = runs


def process(
    notebook: Path,  # .ipynb
    page: Path,  # where the processed notebook goes
) -> None:
    "Do to one notebook what nbdev does before Quarto renders it."
    from nbdev.processors import FilterDefaults
    from nbdev.serve_drv import exec_nb

    lenient()
    exec_nb(notebook, page, FilterDefaults)


def main() -> int:
    if not shutil.which("quarto"):
        print(NO_QUARTO, file=sys.stderr)
        return 2
    from nbdev.quarto import nbdev_docs

    lenient()
    os.chdir(ROOT)
    nbdev_docs.__wrapped__(n_workers=0)  # in this process, which is lenient
    print("docs: open _docs/index.html")
    return 0


if __name__ == "__main__":
    sys.exit(main())
