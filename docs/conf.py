"""Configuration of the documentation."""

from mlo.version import __version__

project = "mlo"
author = "The mlo developers"
copyright = "2026, The mlo developers"
release = version = __version__
extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "sphinx.ext.viewcode"]
myst_enable_extensions = ["dollarmath", "colon_fence"]
autodoc_member_order = "bysource"
autodoc_typehints = "description"
autodoc_default_options = {"members": True, "show-inheritance": False}
exclude_patterns = ["_build"]
html_theme = "furo"
html_title = f"mlo {__version__}"
nitpicky = False
