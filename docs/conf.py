"""Sphinx configuration: `make docs` builds the pages into build/docs."""

from __future__ import annotations

import ast
import functools
from pathlib import Path
from typing import Any

import shmring

ROOT = Path(__file__).resolve().parents[1]

project = "shmring"
author = "the shmring authors"
copyright = author  # noqa: A001  (its name in Sphinx)
version = release = shmring.__version__

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "sphinx_copybutton"]
exclude_patterns = ["model"]
html_theme = "furo"
html_title = f"shmring {version}"
html_static_path = ["static"]
html_css_files = ["site.css"]
html_copy_source = False
html_show_sphinx = False
templates_path: list[str] = []

myst_enable_extensions = ["colon_fence", "fieldlist"]
myst_heading_anchors = 4

napoleon_use_ivar = True
autodoc_member_order = "bysource"
autodoc_typehints = "signature"
autodoc_preserve_defaults = True
python_use_unqualified_type_names = True
python_maximum_signature_line_length = 88
default_role = "code"
copybutton_prompt_text = r">>> |\.\.\. |\$ "
copybutton_prompt_is_regexp = True

# Attributes of two classes may have one name.
suppress_warnings = ["ref.python"]
# Every reference to something of shmring's must resolve; other packages are not linked.
nitpicky = True
nitpick_ignore_regex = [(r"py:.*", r"(?!shmring).*|.*\.([TR]|Words|TaskWords|Employer)")]


@functools.cache
def stubs() -> dict[str, ast.FunctionDef]:
    """The methods of the compiled classes, by class and name, from their stubs."""
    found = {}
    for path in sorted((ROOT / "src" / "shmring" / "_core").glob("*.pyi")):
        for kind in ast.parse(path.read_text(encoding="utf-8")).body:
            if isinstance(kind, ast.ClassDef):
                for each in kind.body:
                    if isinstance(each, ast.FunctionDef):
                        found[f"{kind.name}.{each.name}"] = each
    return found


def signature_from_stub(
    app: Any, what: str, name: str, obj: Any, options: Any, signature: Any, returns: Any
) -> tuple[str, str] | None:
    """A compiled method has no annotations: take those of its stub."""
    stub = stubs().get(getattr(obj, "__qualname__", ""))
    if what != "method" or stub is None or hasattr(obj, "__code__"):
        return None
    del stub.args.args[:1]
    arguments = ast.unparse(stub.args)
    stub.args.args.insert(0, ast.arg("self"))
    return f"({arguments})", ast.unparse(stub.returns) if stub.returns else "None"


def setup(app: Any) -> None:
    app.connect("autodoc-process-signature", signature_from_stub)
