"""Sphinx configuration: `make docs` writes docs/build/html. The build downloads nothing."""

from __future__ import annotations

import re

from docutils.nodes import SkipNode, math_block
from docutils.utils.math.latex2mathml import tex2mathml
from sphinx.addnodes import pending_xref

import knowsam_monai

project = "knowsam_monai"
author = "The developers of knowsam_monai"
copyright = author
version = release = knowsam_monai.__version__

extensions = [
    "sphinx.ext.autodoc",
    "sphinx.ext.napoleon",
    "sphinx.ext.viewcode",
    "myst_nb",  # Markdown pages and the notebook
]

# Markdown
myst_enable_extensions = ["colon_fence", "deflist", "dollarmath", "tasklist"]
myst_heading_anchors = 3
nb_execution_mode = "off"  # pages show the notebook's stored outputs; a test executes it

# docstrings
default_role = "code"
autodoc_member_order = "bysource"
autodoc_inherit_docstrings = False  # torch's text on `forward` does not describe ours
autodoc_typehints = "description"
autodoc_typehints_description_target = "documented"
autodoc_typehints_format = "short"
napoleon_google_docstring = True
napoleon_numpy_docstring = False
napoleon_use_rtype = False
napoleon_custom_sections = ["Shape"]

# classes of other packages are documented elsewhere; without downloads they cannot be linked
nitpicky = True
nitpick_ignore_regex = [
    (r"py:.*", r"(torch|nn|monai|ignite|numpy|np|collections|os|pathlib|typing)\b.*"),
    (r"py:.*", r"Tensor|Optimizer|Engine|Dataset|Evaluator|Inferer|CheckpointSaver|KeysCollection|RemovableHandle"),
    (r"py:.*", r"Spacing|Scaler|Selection|Rows|Weight"),  # our own names for unions of types
]
suppress_warnings = ["myst.header"]  # the Model Zoo's README template leaves heading levels out
# files of the repository that pages link to, and the pages that include them
PAGES = {
    "docs/fidelity.md": "fidelity",
    "docs/source/own_data.md": "own_data",
    "benchmarks/accuracy.md": "results",
    "benchmarks/speed.md": "results",
    "bundles/knowsam_acdc/docs/README.md": "bundle_acdc",
    "bundles/knowsam_la/docs/README.md": "bundle_la",
}

html_math_renderer = "mathml"  # works in every browser, and offline
html_theme = "furo"
html_title = f"knowsam_monai {release}"
html_static_path = ["_static"]
html_css_files = ["knowsam.css"]
html_show_sourcelink = False
html_theme_options = {"navigation_with_keys": True}


def escape_stars(app, what, name, obj, options, lines: list[str]) -> None:
    """Escape the star of `(B, C, *spatial)` and `*.json`, which outside of literals would start an emphasis."""
    for i, line in enumerate(lines):
        parts = re.split(r"(``.+?``|`[^`]+`)", line)
        parts[::2] = [re.sub(r"(?<!\\)\*(?=spatial|size|\.\w)", r"\\*", part) for part in parts[::2]]
        lines[i] = "".join(parts)


def skip_fields(app, what, name, item, skip, options) -> bool | None:
    """Skip the fields of named tuples ("Alias for field number 0"); they are documented as arguments."""
    return True if (getattr(item, "__doc__", None) or "").startswith("Alias for field number") else None


def link_pages(app, doctree) -> None:
    """Redirect links between the repository's files to the pages that include these files."""
    for link in doctree.findall(pending_xref):
        link["reftarget"] = PAGES.get(link["reftarget"], link["reftarget"])


def visit_math(translator, node) -> None:
    """Write an equation as MathML; docutils converts its LaTeX."""
    mathml = tex2mathml(node.astext())
    if isinstance(node, math_block):
        mathml = mathml.replace("<math", '<math display="block"', 1)
        mathml = f'<div class="equation">{mathml}</div>'
    translator.body.append(mathml)
    raise SkipNode


def setup(app) -> None:
    app.add_html_math_renderer("mathml", (visit_math, None), (visit_math, None))
    app.connect("autodoc-skip-member", skip_fields)
    app.connect("doctree-read", link_pages)
    app.connect("autodoc-process-docstring", escape_stars)
