"""The course: profiles and exercise checks, and the tools that build, check and run the notebooks.

A notebook needs three names: ``from nlutils.course import check, difference, settings``. The tools
(``sources``, ``contract``, ``runner``, …) are imported when first named.
"""

from importlib import import_module as _import_module

from nlutils.course.exercises import check, difference
from nlutils.course.frameworks import import_keras
from nlutils.course.profiles import PROFILES, settings

_TOOLS = ("contract", "doctor", "environment", "runner", "solutions", "sources")

__all__ = ["PROFILES", "check", "difference", "import_keras", "settings"]


def __getattr__(name):
    if name in _TOOLS:
        return _import_module(f"{__name__}.{name}")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
