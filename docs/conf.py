"""Settings of the documentation's website; `make docs` builds it."""

import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parent / "src"), str(HERE)]

from pages import break_long_names, link_within_site, write_generated  # noqa: E402

project = "tracklight"
copyright = "the authors of tracklight, MIT license"
extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
exclude_patterns = ["_build"]
html_theme = "furo"
html_title = "tracklight"
html_static_path = ["static"]
html_css_files = ["site.css"]
html_copy_source = False
add_module_names = False
toc_object_entries_show_parents = "hide"
autodoc_preserve_defaults = True  # no path of the machine that builds
pygments_style = "friendly"
pygments_dark_style = "github-dark"

napoleon_use_ivar = True  # an attribute is one line
default_role = "literal"  # docstrings write `code`, as Markdown does
autodoc_typehints = "signature"
autodoc_inherit_docstrings = False  # a hook of Lightning is explained there
autodoc_member_order = "bysource"
autodoc_default_options = {"members": True}
myst_heading_anchors = 3
myst_enable_extensions = ["colon_fence"]
suppress_warnings = ["myst.header"]  # pages of one's own choice begin at any level


def setup(app):
    """Write the generated pages before any page is read."""
    app.connect("builder-inited", lambda app: write_generated(HERE / "generated"))
    app.connect("source-read", link_within_site)
    app.connect("html-page-context", break_long_names)
