"""Every snippet of the README and the docs runs, and every link in them leads somewhere."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]
FENCE = re.compile(r"^```(\w+)\n(.*?)^```$", re.DOTALL | re.MULTILINE)


def snippets(language):
    return [
        pytest.param(code, id=f"{page.relative_to(ROOT)}-{i}")
        for page in PAGES
        for i, (kind, code) in enumerate(FENCE.findall(page.read_text()))
        if kind == language
    ]


@pytest.mark.flower
@pytest.mark.parametrize("code", snippets("python"))
def test_snippet_runs(code, capsys):
    exec(compile(code, "snippet", "exec"), {"__name__": "snippet"})


@pytest.mark.parametrize("page", PAGES, ids=lambda p: str(p.relative_to(ROOT)))
def test_links_lead_somewhere(page):
    for target in re.findall(r"\]\((?!https?://)([^)#]+)", page.read_text()):
        assert (page.parent / target).exists(), target


def test_make_commands_of_the_readme_are_run_by_ci():
    ci = (ROOT / ".ci/run").read_text() + (ROOT / "tests/e2e/test_runs.py").read_text()
    makes = [line for line in commands() if line.startswith("make")]
    assert makes
    for line in makes:
        assert f"step {line}\n" in ci or f'shell("{line}"' in ci


def test_every_built_in_method_has_a_card():
    from fedmask_flwr.methods import BUILTIN

    readme = (ROOT / "README.md").read_text()
    for name in BUILTIN:
        assert (ROOT / f"docs/methods/{name}.md").exists()
        assert f"docs/methods/{name}.md" in readme


def commands():
    """Lines of the README's shell blocks, without comments."""
    blocks = [code for kind, code in FENCE.findall((ROOT / "README.md").read_text()) if kind == "bash"]
    return [line.split("  #")[0].strip() for code in blocks for line in code.splitlines() if line.strip()]
