"""Clips that are computed: six actions of a stick figure, and tasks about the relation of two far-apart places."""

from nlutils.video.procedural.actions import RATE, Actions, ProceduralClip, actions_clip_set
from nlutils.video.procedural.motion import ACTIONS, JOINTS

__all__ = [
    "ACTIONS",
    "JOINTS",
    "RATE",
    "Actions",
    "ProceduralClip",
    "actions_clip_set",
]
