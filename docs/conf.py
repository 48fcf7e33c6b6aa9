"""The documentation site: ``make docs`` builds it into build/site, with every warning an error.

Pages with a ``kernelspec`` at their head are notebooks: their code runs at every build, and what they show is what it
printed then.
"""

from __future__ import annotations

import logging
import os
import re
from pathlib import Path

from sphinx.application import Sphinx

import deepeprop_jax

project = "deepeprop_jax"
author = "The deepeprop_jax authors"
project_copyright = author
release = deepeprop_jax.__version__
extensions = ["myst_nb", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]

# demo.md is a part of real_input.md; the tables in benchmarks/ stand in the logs; the others are folders of data.
exclude_patterns = ["demo.md", "benchmarks", "experiments", "fidelity", "tasks", "ablation"]
smartquotes = False  # which would make a dash of the -- of an option

myst_heading_anchors = 4  # so that page.md#a-heading leads there, as on the repository's pages
myst_enable_extensions = ["html_image"]  # pictures with a width

nb_execution_mode = "force"
nb_execution_raise_on_error = True
nb_execution_timeout = 300
nb_merge_streams = True
nb_output_stderr = "remove"
logging.getLogger("traitlets").setLevel(logging.WARNING)  # which says that a notebook runs

autodoc_typehints = "signature"
autodoc_preserve_defaults = True
autodoc_type_aliases = {name: name for name in ("PyTree", "DTypeLike", "SurrogateFunction", "Paths", "LossFn", "Run")}
autodoc_member_order = "bysource"
napoleon_numpy_docstring = False
napoleon_use_ivar = True
python_maximum_signature_line_length = 100

html_theme = "furo"
html_title = "deepeprop_jax"
html_copy_source = False
html_show_sphinx = False

HERE = Path(__file__).parent

# The notebooks' kernels have a profile of their own: nothing of the user's runs in them, and they only report errors.
PROFILE = HERE.parent / "build" / "ipython" / "profile_default"
PROFILE.mkdir(parents=True, exist_ok=True)
(PROFILE / "ipython_kernel_config.py").write_text("get_config().IPKernelApp.log_level = 'ERROR'\n")
os.environ["IPYTHONDIR"] = str(PROFILE.parent)

PAGES_OF = {
    "experiments/README.md": "programs.md",
    "CHANGELOG.md": "changelog.md",
    "CONTRIBUTING.md": "contributing.md",
}
"""Files of the repository outside docs/, and the pages that include them."""


def within_the_site(text: str, folder: Path) -> str:
    """A page's text whose links lead to pages of the site, where they led to files outside docs/, or from one."""

    def led(link: re.Match[str]) -> str:
        target = (folder / link[1]).resolve()
        if not target.exists() or not target.is_relative_to(HERE.parent):
            return link[0]
        name = str(target.relative_to(HERE.parent))
        return f"](/{PAGES_OF.get(name, name.removeprefix('docs/'))}{link[2]})"

    return re.sub(r"\]\(([^)#:\s]+)((?:#[^)\s]*)?)\)", led, text)


def page_read(app: Sphinx, name: str, source: list[str]) -> None:
    """Pages link to files beside docs/, as they are read on the repository's pages too."""
    source[0] = within_the_site(source[0], Path(app.env.doc2path(name)).parent)


def file_included(app: Sphinx, path: Path, page: str, source: list[str]) -> None:
    """Files beside docs/ link from where they lie."""
    source[0] = within_the_site(source[0], (HERE / path).resolve().parent)


def equations_as_written(app: Sphinx, what: str, name: str, thing: object, options: object, lines: list[str]) -> None:
    """In docstrings a block indented by four is an equation, kept line by line, and a bar is a bar."""
    written: list[str] = []
    equation = False
    for line in lines:
        if line.strip():
            indented = line.startswith("    ")
            if indented and not equation and written and not written[-1].strip():
                written += ["::", ""]
                equation = True
            equation = equation and indented
        written.append(line if equation else re.sub(r"\|(?=[^`]*(?:``[^`]*``[^`]*)*$)", r"\\|", line))
    lines[:] = written


def setup(app: Sphinx) -> None:
    """Called by Sphinx."""
    app.connect("source-read", page_read)
    app.connect("include-read", file_included)
    app.connect("autodoc-process-docstring", equations_as_written, priority=100)
