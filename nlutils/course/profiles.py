"""Profiles: how much work a notebook does."""

from types import SimpleNamespace

from nlutils.arguments import one_of

__all__ = ["PROFILES", "settings"]

PROFILES = ("quick", "full", "gpu")


def settings(profile: str, quick: dict | None = None, full: dict | None = None, gpu: dict | None = None):
    """The settings of one profile: `settings(profile, quick=dict(steps=2), full=dict(steps=40))`.

    Returns a namespace of the settings, and the profile's name as `.profile`. `quick` names every setting;
    `full` and `gpu` name those that they change, and a profile that is left out equals `quick`. Raises
    ValueError for a profile that is not one of "quick", "full", "gpu", and for a setting that `quick` does
    not have.
    """
    one_of("profile", profile, PROFILES)
    defaults = quick or {}
    for name, given in (("full", full), ("gpu", gpu)):
        for setting in given or {}:
            if setting not in defaults:
                known = ", ".join(defaults) or "none"
                raise ValueError(
                    f"{name} has the setting {setting!r}, which quick does not have; quick has: {known}"
                )
    chosen = {"quick": quick, "full": full, "gpu": gpu}[profile]
    return SimpleNamespace(profile=profile, **{**defaults, **(chosen or {})})
