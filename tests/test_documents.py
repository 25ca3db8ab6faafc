"""The examples in the documents and docstrings run as they stand."""

import doctest
import importlib
import importlib.util
import pkgutil
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
DOCUMENTS = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
BLOCK = re.compile(r"^```python\n(.*?)^```$", re.MULTILINE | re.DOTALL)
HAS_BETTY = importlib.util.find_spec("betty") is not None  # .ci/run installs it
WITH_CODE = [path for path in DOCUMENTS if BLOCK.search(path.read_text(encoding="utf-8"))]


@pytest.mark.parametrize("path", WITH_CODE, ids=lambda path: path.name)
def test_the_code_of_a_document_runs(path, tmp_path):
    """All blocks of a document, in order, as one script in an empty folder, with warnings as errors."""
    if path.name == "betty.md":
        pytest.importorskip("betty", reason="an optional peer; .ci/run installs it")
    script = tmp_path / "script.py"
    script.write_text("\n".join(BLOCK.findall(path.read_text(encoding="utf-8"))), encoding="utf-8")
    done = subprocess.run(
        [sys.executable, "-W", "error", str(script)], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr


def test_the_readme_has_a_problem_in_about_fifteen_lines():
    code = BLOCK.findall((ROOT / "README.md").read_text(encoding="utf-8"))[0]
    statements = [line for line in code.splitlines() if line.strip() and not line.startswith(("import", "from"))]
    assert len(statements) <= 25


def modules():
    for package in ("mlo", "problems"):
        yield package
        for info in pkgutil.walk_packages(importlib.import_module(package).__path__, f"{package}."):
            if HAS_BETTY or info.name != "mlo.interop.betty_problems":
                yield info.name


@pytest.mark.parametrize("name", list(modules()))
def test_docstring_examples(name):
    module = importlib.import_module(name)
    assert module.__doc__, f"{name} has no docstring"
    assert doctest.testmod(module).failed == 0


def test_links_between_documents_exist():
    for path in DOCUMENTS:
        for target in re.findall(r"\]\((?!https?://)([^)#]+)\)", path.read_text(encoding="utf-8")):
            assert (path.parent / target).exists(), f"{path.name} links to {target}"
