"""The site's sources are whole: checked here without Quarto, which only `make docs` needs."""

import json
import re
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import unquote

import docs
import pytest
import yaml

ROOT = Path(__file__).resolve().parent.parent
NBS = ROOT / "nbs"
NOTEBOOKS = sorted(f for f in NBS.rglob("*.ipynb") if ".ipynb_checkpoints" not in f.parts)
CONFIG = yaml.safe_load((ROOT / "_quarto.yml").read_text(encoding="utf-8"))

each_notebook = pytest.mark.parametrize(
    "notebook", NOTEBOOKS, ids=lambda file: file.relative_to(NBS).as_posix()
)


def pages(entry: object) -> Iterator[str]:
    "All pages that a piece of the sidebar names."
    if isinstance(entry, str):
        yield entry
    elif isinstance(entry, list):
        for part in entry:
            yield from pages(part)
    elif isinstance(entry, dict):
        yield from pages([entry.get("href") or entry.get("file") or [], entry.get("contents") or []])


def prose(file: Path) -> str:
    "A notebook's Markdown, without code in it."
    cells = json.loads(file.read_text(encoding="utf-8"))["cells"]
    text = "\n\n".join("".join(cell["source"]) for cell in cells if cell["cell_type"] == "markdown")
    return re.sub(r"```.*?```|`[^`\n]*`", "", text, flags=re.DOTALL)


def headings(file: Path) -> set[str]:
    "The anchors that Pandoc gives a notebook's headings."
    anchors = set()
    for line in re.findall(r"^#+ +(.+)$", prose_with_code(file), re.MULTILINE):
        explicit = re.search(r"\{#([\w-]+)", line)
        plain = re.sub(r"[^\w\s.-]", "", re.sub(r"\{.*\}", "", line).lower()).strip()
        anchors |= {explicit[1] if explicit else re.sub(r"^[^a-z]+", "", re.sub(r"\s", "-", plain))}
    return anchors


def prose_with_code(file: Path) -> str:
    "A notebook's Markdown, code blocks left out, names in backticks kept: headings have them."
    cells = json.loads(file.read_text(encoding="utf-8"))["cells"]
    text = "\n\n".join("".join(cell["source"]) for cell in cells if cell["cell_type"] == "markdown")
    return re.sub(r"```.*?```", "", text, flags=re.DOTALL)


def test_sidebar_lists_every_notebook_once():
    listed = list(pages(CONFIG["website"]["sidebar"]["contents"]))
    there = [file.relative_to(NBS).as_posix() for file in NOTEBOOKS]
    lacking, gone = sorted(set(there) - set(listed)), sorted(set(listed) - set(there))
    assert not lacking, (
        f"no line in the sidebar of _quarto.yml for: {', '.join(lacking)}; add it in reading order"
    )
    assert not gone, f"the sidebar of _quarto.yml names pages that nbs/ does not have: {', '.join(gone)}"
    assert len(listed) == len(set(listed)), "the sidebar of _quarto.yml names a page twice"


def test_configuration_names_only_files_that_exist():
    website, html = CONFIG["website"], CONFIG["format"]["html"]
    named = [website.get("favicon"), website.get("image"), html.get("css"), html.get("include-in-header")]
    named += [CONFIG["project"].get("resources", []), CONFIG.get("metadata-files", [])]
    theme = html.get("theme", [])
    named += [
        part
        for part in pages(list(theme.values()) if isinstance(theme, dict) else theme)
        if part.endswith("css")
    ]
    missing = [page for page in pages([part or [] for part in named]) if not list(NBS.glob(page))]
    assert not missing, f"_quarto.yml names files that nbs/ does not have: {', '.join(missing)}"
    assert CONFIG["project"]["type"] == "website"
    assert CONFIG["project"]["output-dir"] == "_docs"  # where nbdev looks for it


@each_notebook
def test_links_resolve(notebook: Path):
    links = re.findall(r"\]\(\s*<?([^)\s>]+)", prose(notebook)) + re.findall(
        r"(?:src|href)=\"([^\"]+)\"", prose(notebook)
    )
    broken = []
    for link in links:
        if re.match(r"[a-z][a-z0-9+.-]*:", link):
            continue
        path, _, anchor = unquote(link).partition("#")
        target = (notebook.parent / path).resolve() if path else notebook
        if not target.exists() or not target.is_relative_to(ROOT):
            broken.append(link)
        elif anchor and target.suffix == ".ipynb" and anchor not in headings(target):
            names = re.findall(
                r"^ *(?:class|def|async def) (\w+)", target.read_text().replace('"', "\n"), re.MULTILINE
            )
            if anchor.split(".")[-1].lower() not in {
                n.lower() for n in names
            }:  # nbdev makes an anchor for each of these
                broken.append(link)
    assert not broken, f"{notebook.relative_to(ROOT)} links to what is not there: {', '.join(broken)}"


@each_notebook
def test_notebook_has_title_and_summary(notebook: Path):
    first = next(
        (c for c in json.loads(notebook.read_text())["cells"] if c["cell_type"] == "markdown"), {"source": []}
    )
    text = "".join(first["source"])
    assert re.match(r"# [^#\s]", text), f"{notebook.relative_to(ROOT)} must begin with '# Title'"
    assert re.search(r"^> \S", text, re.MULTILINE), (
        f"{notebook.relative_to(ROOT)}: a line '> summary' belongs under the title"
    )


@each_notebook
def test_notebook_processes_for_the_site(notebook: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(ROOT)
    monkeypatch.setenv("IN_TEST", "1")
    page = tmp_path / notebook.name
    docs.process(notebook, page)
    shown = json.loads(page.read_text(encoding="utf-8"))["cells"]
    header = "".join(shown[0]["source"])
    assert shown[0]["cell_type"] == "raw" and "title:" in header, f"{notebook.name}: no title for the site"
    outputs = [output for cell in shown for output in cell.get("outputs", [])]
    failed = [output["evalue"] for output in outputs if output["output_type"] == "error"]
    assert not failed, f"{notebook.relative_to(ROOT)} fails in nbdev's processing: {failed[0]}"
