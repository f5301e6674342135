"""Renders README.md from nbs/index.ipynb, which is also the site's first page.

python scripts/readme.py           writes README.md
python scripts/readme.py --check   exits 1 if README.md is not what the notebook says
"""

import argparse
import json
import re
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
NOTEBOOK = ROOT / "nbs" / "index.ipynb"
README = ROOT / "README.md"
NOTE = "<!-- Made from nbs/index.ipynb by `make readme`: change it there. -->"
DIRECTIVE = re.compile(r"^#\|\s*([\w-]+)\s*:?\s*(.*?)\s*$")
LINK = re.compile(r"(\]\(|\b(?:src|href)=\")(?![a-z][a-z0-9+.-]*:|#|/)([^)\s\"]+)")


def directives(
    source: str,  # of one cell
) -> tuple[dict[str, str], str]:  # `{name: value}`, and the source without them
    "Split a cell into its `#|` lines and the rest."
    lines, found = source.splitlines(), {}
    while lines and (match := DIRECTIVE.match(lines[0])):
        found[match[1]] = match[2]
        lines.pop(0)
    return found, "\n".join(lines).strip("\n")


def from_root(
    text: str,  # Markdown, as seen from nbs/
) -> str:  # the same, as seen from the folder of README.md
    "Rewrite relative links, which start at nbs/ in the notebook."

    def rewrite(match: re.Match) -> str:
        link = match[2]
        return match[1] + (link.removeprefix("../") if link.startswith("../") else f"nbs/{link}")

    return LINK.sub(rewrite, text)


def output_text(
    output: dict,  # one output of a code cell, nbformat 4
) -> str:  # Markdown
    "Render one output: Markdown and tables as they are, everything else as text."
    if output["output_type"] == "stream":
        return f"```text\n{''.join(output['text']).rstrip()}\n```"
    data = {
        kind: "".join(lines) for kind, lines in output.get("data", {}).items() if kind.startswith("text/")
    }
    if "text/markdown" in data:
        return from_root(data["text/markdown"].strip())
    if "<table" in data.get("text/html", ""):
        return re.sub(r"<style.*?</style>\s*", "", data["text/html"], flags=re.DOTALL).strip()
    if "text/plain" in data and not any(kind.startswith("image/") for kind in output["data"]):
        return f"```text\n{data['text/plain'].rstrip()}\n```"
    raise SystemExit(
        "readme: nbs/index.ipynb shows a picture; save it beside the notebook and link to the file"
    )


def render(
    notebook: dict,  # nbformat 4
) -> str:  # the whole of README.md
    "Render the notebook's visible cells, honouring `hide`, `include`, `echo` and `output`."
    parts = [NOTE]
    for cell in notebook["cells"]:
        found, source = directives("".join(cell["source"]))
        if "hide" in found or found.get("include") == "false" or cell["cell_type"] == "raw":
            continue
        if cell["cell_type"] == "markdown":
            parts.append(from_root(source))
            continue
        if source and found.get("echo") != "false":
            parts.append(f"```python\n{source}\n```")
        if found.get("output") != "false":
            parts += [output_text(output) for output in cell["outputs"]]
    return "\n\n".join(part for part in parts if part) + "\n"


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--check", action="store_true", help="only compare")
    check = parser.parse_args().check
    if not NOTEBOOK.exists():
        print("readme: there is no nbs/index.ipynb yet", file=sys.stderr)
        return 0
    text = render(json.loads(NOTEBOOK.read_text(encoding="utf-8")))
    if README.exists() and README.read_text(encoding="utf-8") == text:
        return 0
    if check:
        print("README.md is not what nbs/index.ipynb says: make readme", file=sys.stderr)
        return 1
    README.write_text(text, encoding="utf-8")
    print("readme: README.md renewed")
    return 0


if __name__ == "__main__":
    sys.exit(main())
