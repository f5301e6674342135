"""What the pre-commit hook does: cleans and exports the staged notebooks, lints what is staged."""

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
LINTED = ("nbs/", "tests/", "bench/", "scripts/")


def git(*arguments: str) -> list[str]:
    "Run git and give its output line by line."
    done = subprocess.run(["git", *arguments], cwd=ROOT, check=True, capture_output=True, text=True)
    return done.stdout.splitlines()


def clean_and_export(
    notebooks: list[str],  # paths from the checkout's top
) -> None:
    "Clean these notebooks, export them, and render the README if the index is among them."
    from nbdev.clean import nbdev_clean
    from nbdev.doclinks import nbdev_export

    for name in notebooks:
        nbdev_clean(name)
        nbdev_export(name)
    if "nbs/index.ipynb" in notebooks:
        subprocess.run([sys.executable, "scripts/readme.py"], check=True)


def main() -> int:
    os.chdir(ROOT)
    os.environ.pop("IN_TEST", None)  # under which nbdev exports nothing
    staged = git("diff", "--cached", "--name-only", "--diff-filter=ACMR", "--", "*.ipynb", "*.py")
    notebooks = [name for name in staged if name.startswith("nbs/") and name.endswith(".ipynb")]
    if notebooks:
        made = (*notebooks, "titanic_mlops", "README.md")
        left = set(
            git("diff", "--name-only", "--", *made)
        )  # changed, but not staged, before we touched anything
        clean_and_export(notebooks)
        new = [f for f in git("ls-files", "--others", "--exclude-standard", "--", "titanic_mlops")]
        unstaged = sorted(set(git("diff", "--name-only", "--", *made)) - (left - set(notebooks))) + new
        if unstaged:
            print("pre-commit: not in the commit yet; look at them, then: git add " + " ".join(unstaged))
            return 1
    linted = [name for name in staged if name.startswith(LINTED)]
    if linted:
        check = subprocess.run([".venv/bin/ruff", "check", "--quiet", "--output-format=concise", *linted])
        form = subprocess.run([".venv/bin/ruff", "format", "--quiet", "--check", *linted])
        if check.returncode or form.returncode:
            print("pre-commit: ruff is not content with: " + " ".join(linted) + "; make format mends most")
            return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
