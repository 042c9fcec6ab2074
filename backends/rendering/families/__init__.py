"""Hand-written renderers of model families, from the package `renderers`; an optional dependency.

They serve families whose chat template or tool markup `TemplateRenderer` and our parsers cannot handle.
"""

from backends.rendering.families.naming import family_names, family_of
from backends.rendering.families.renderer import FamilyRenderer, make_family_renderer

__all__ = ["FamilyRenderer", "family_names", "family_of", "make_family_renderer"]
