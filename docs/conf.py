"""The site: `make docs` builds it into build/site."""

import metakern

project, author, release = "metakern", "the metakern authors", metakern.__version__
extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
myst_heading_anchors = 3
html_theme, html_title = "furo", f"metakern {release}"
default_role = "code"  # in docstrings, as `name`
autodoc_typehints = "signature"
autodoc_member_order = "bysource"
autodoc_preserve_defaults = True
python_use_unqualified_type_names = True
maximum_signature_line_length = 100


def plain(app, what, name, obj, options, lines) -> None:
    """Docstrings are plain text: a star is a star; blocks after a colon and examples are as they stand."""
    as_it_stands = False
    for i, line in enumerate(lines):
        indented = line.startswith("    ")
        if line.lstrip().startswith(">>>"):
            as_it_stands = True
        elif line.strip() and not indented:
            as_it_stands = as_it_stands and bool(lines[i - 1].strip())  # what an example gives
        if as_it_stands or (indented and line.strip()):
            continue
        opens = line.endswith(":") and lines[i + 1 : i + 2] == [""] and lines[i + 2 : i + 3][0].startswith("    ")
        lines[i] = line.replace("*", r"\*") + ":" * opens


def setup(app) -> None:
    app.connect("autodoc-process-docstring", plain)
