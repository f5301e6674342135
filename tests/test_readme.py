"""The README's renderer, on a notebook that has one of everything."""

import pytest
import readme


def code(source: str, *outputs: dict) -> dict:
    return {"cell_type": "code", "source": source.splitlines(keepends=True), "outputs": list(outputs)}


def prose(source: str) -> dict:
    return {"cell_type": "markdown", "source": source.splitlines(keepends=True)}


def shown(kind: str, text: str) -> dict:
    return {"output_type": "execute_result", "data": {kind: text.splitlines(keepends=True)}}


def test_what_is_hidden_stays_hidden():
    text = readme.render({"cells": [code("#| hide\nsecret()"), prose("#| hide\nnot said"), prose("said")]})
    assert "said" in text and "secret" not in text and "not said" not in text


def test_links_start_at_the_top():
    cell = prose(
        "[a](02_data/01_contract.ipynb) [b](../CONTRIBUTING.md) [c](https://x.org) [d](#top) ![e](a.png)"
    )
    text = readme.render({"cells": [cell]})
    assert "[a](nbs/02_data/01_contract.ipynb) [b](CONTRIBUTING.md) [c](https://x.org) [d](#top)" in text
    assert "![e](nbs/a.png)" in text


def test_code_and_outputs():
    cells = [
        code("#| echo: false\nfigures()", shown("text/markdown", "| a |\n|---|\n")),
        code("1 + 1", shown("text/plain", "2")),
        code("#| output: false\nnoisy()", {"output_type": "stream", "text": ["noise"]}),
    ]
    text = readme.render({"cells": cells})
    assert "figures()" not in text and "| a |\n|---|" in text
    assert "```python\n1 + 1\n```\n\n```text\n2\n```" in text
    assert "noisy()" in text and "noise\n" not in text


def test_a_picture_must_be_a_file():
    with pytest.raises(SystemExit, match="picture"):
        readme.render({"cells": [code("plot()", shown("image/png", "AAAA"))]})
