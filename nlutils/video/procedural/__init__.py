"""Clips that are computed: six actions of a stick figure, and tasks about the relation of two places."""

from nlutils.video.procedural.actions import Actions, ProceduralClip, actions_clip_set
from nlutils.video.procedural.motion import ACTIONS, JOINTS
from nlutils.video.procedural.relations import RelationalClip, SameAction, SamePattern, relation_clip_set
from nlutils.video.procedural.scene import RATE

__all__ = [
    "ACTIONS",
    "JOINTS",
    "RATE",
    "Actions",
    "ProceduralClip",
    "RelationalClip",
    "SameAction",
    "SamePattern",
    "actions_clip_set",
    "relation_clip_set",
]
