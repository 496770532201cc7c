"""Clips: data sets, decoding, sampling, procedural actions, optical flow, point tracks and descriptors.

`import nlutils.video` imports no video library: a name is imported when it is first used.
"""

from importlib import import_module as _import_module

# name -> the module that defines it
_HOMES = {
    "CATALOGUE": "catalogue",
    "DataSet": "catalogue",
    "describe_source": "catalogue",
    "open_clips": "catalogue",
    "cached_array": "cache",
    "file_digest": "cache",
    "is_cached": "cache",
    "Clip": "clips",
    "ClipSet": "clips",
    "Fault": "clips",
    "ClipError": "decoding",
    "Decoded": "decoding",
    "decode": "decoding",
    "decode_timed": "decoding",
    "read_cached": "decoding",
    "describe": "descriptors",
    "improved_trajectories": "descriptors",
    "DownloadError": "download",
    "fetch": "download",
    "FisherEncoder": "fisher",
    "TrajectoryClassifier": "fisher",
    "fisher_vector": "fisher",
    "flow_cached": "flow",
    "optical_flow": "flow",
    "check_folder": "folder",
    "open_folder": "folder",
    "report_folder": "folder",
    "verify": "jhmdb",
    "sample_indices": "sampling",
    "sample_windows": "sampling",
    "segment_indices": "sampling",
    "Limits": "tracks",
    "Tracks": "tracks",
    "dense_tracks": "tracks",
    "motion_levels": "tracks",
}
_MODULES = ("procedural",)

__all__ = [*_HOMES, *_MODULES]


def __getattr__(name):
    if name in _MODULES:
        return _import_module(f"{__name__}.{name}")
    if name in _HOMES:
        return getattr(_import_module(f"{__name__}.{_HOMES[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__():
    return sorted(__all__)
