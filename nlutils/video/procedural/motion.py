"""How a body of unit height moves: joints in three dimensions for KTH's six actions.

Body coordinates: x to the person's left, y up from the ground, z forward; the unit is the body's height.
The actions are those of Schuldt, Laptev and Caputo, "Recognizing human actions: a local SVM approach",
ICPR 2004.
"""

from dataclasses import dataclass

import numpy as np

__all__ = ["ACTIONS", "JOINTS", "POINTS", "RANGES", "Body", "Movement", "move"]

ACTIONS = ("boxing", "handclapping", "handwaving", "jogging", "running", "walking")

JOINTS = (
    "head",
    "neck",
    "pelvis",
    "left shoulder",
    "right shoulder",
    "left elbow",
    "right elbow",
    "left wrist",
    "right wrist",
    "left hip",
    "right hip",
    "left knee",
    "right knee",
    "left ankle",
    "right ankle",
)
# Points that are needed to draw a body and are not tracked as joints.
POINTS = (*JOINTS, "left toe", "right toe")
_AT = {name: index for index, name in enumerate(POINTS)}

# What a performer draws from, uniformly. Neighbouring gaits overlap in every single quantity. Angles in
# degrees, tempo in cycles a second, lengths in body heights. A cycle is two steps, two punches (one an arm),
# one clap, one wave. `view` is the angle between facing the camera (0) and facing the picture's edge (90).
RANGES = {
    "boxing": {
        "tempo": (0.9, 1.7),
        "view": (30, 90),
        "reach": (0.75, 1.0),
        "height": (-0.06, 0.06),
        "snap": (1.0, 3.5),
    },
    "handclapping": {
        "tempo": (1.1, 2.1),
        "view": (-55, 55),
        "reach": (0.18, 0.28),
        "height": (-0.07, 0.09),
        "gap": (0.22, 0.50),
    },
    "handwaving": {
        "tempo": (0.8, 1.6),
        "view": (-55, 55),
        "reach": (0.80, 0.98),
        "centre": (115, 140),
        "swing": (22, 42),
    },
    "jogging": {
        "tempo": (1.10, 1.45),
        "view": (65, 110),
        "hip": (24, 35),
        "knee": (55, 95),
        "elbow": (55, 100),
        "lean": (2, 9),
        "flight": (0.01, 0.035),
    },
    "running": {
        "tempo": (1.30, 1.75),
        "view": (65, 110),
        "hip": (31, 44),
        "knee": (80, 120),
        "elbow": (75, 115),
        "lean": (5, 15),
        "flight": (0.02, 0.06),
    },
    "walking": {
        "tempo": (0.85, 1.20),
        "view": (65, 110),
        "hip": (18, 28),
        "knee": (40, 62),
        "elbow": (8, 60),
        "lean": (0, 5),
        "flight": (0.0, 0.0),
    },
}


@dataclass(frozen=True)
class Body:
    """Lengths of a body's parts, in body heights."""

    thigh: float = 0.245
    shank: float = 0.240
    trunk: float = 0.300
    upper_arm: float = 0.175
    forearm: float = 0.150
    shoulders: float = 0.105  # half the width
    hips: float = 0.050  # half the width
    head: float = 0.085  # neck to the head's centre
    ankle: float = 0.035  # height above the ground

    @classmethod
    def random(cls, rng):
        """A body whose parts differ from the usual by up to 8 percent."""
        usual = cls()
        return cls(
            **{name: getattr(usual, name) * rng.uniform(0.92, 1.08) for name in cls.__dataclass_fields__}
        )


@dataclass(frozen=True)
class Movement:
    """`points` (T, 17, 3) in body heights, without the way walked; `way` (T,) is that way, along the view."""

    points: np.ndarray
    way: np.ndarray
    view: float  # radians


def move(action: str, body: Body, seconds, rng, *, tempo: float = 1.0) -> Movement:
    """Perform `action` at the times `seconds` (T,), with everything else drawn from `RANGES` by `rng`."""
    drawn = {name: rng.uniform(*bounds) for name, bounds in RANGES[action].items()}
    frequency = drawn.pop("tempo") * tempo
    view = np.deg2rad(drawn.pop("view"))
    phase = 2 * np.pi * (rng.uniform() + frequency * np.asarray(seconds, float))
    perform = {"boxing": _box, "handclapping": _clap, "handwaving": _wave}.get(action, _gait)
    points, stride = perform(phase, body, drawn)
    return Movement(points, stride * frequency * (np.asarray(seconds, float)), view)


def _vector(x, y, z):
    return np.stack(np.broadcast_arrays(x, y, z), axis=-1).astype(float)


def _empty(phase):
    return np.full((len(phase), len(POINTS), 3), np.nan)


def _pulse(phase, sharpness):
    """1 once a cycle, near 0 between, smooth: the larger `sharpness`, the shorter the pulse."""
    return np.exp(sharpness * (np.cos(phase) - 1))


def _bend(start, end, first, second, pole):
    """The middle joint and the end of a two-bone limb from `start` towards `end`, bent towards `pole`."""
    towards = end - start
    distance = np.linalg.norm(towards, axis=-1, keepdims=True)
    axis = towards / np.maximum(distance, 1e-9)
    distance = np.clip(distance, abs(first - second) + 1e-3, (first + second) * 0.999)
    along = (first**2 - second**2 + distance**2) / (2 * distance)
    side = pole - (pole * axis).sum(-1, keepdims=True) * axis
    side = side / np.maximum(np.linalg.norm(side, axis=-1, keepdims=True), 1e-9)
    middle = start + along * axis + np.sqrt(np.maximum(first**2 - along**2, 0)) * side
    return middle, start + distance * axis


def _upper_body(points, body, pelvis, lean, twist):
    """Neck, head, shoulders and hips over `pelvis` (T, 3); `lean` forward and shoulder `twist` in radians."""
    up = _vector(0 * twist, np.cos(lean), np.sin(lean))
    neck = pelvis + body.trunk * up
    points[:, _AT["pelvis"]] = pelvis
    points[:, _AT["neck"]] = neck
    points[:, _AT["head"]] = neck + body.head * _vector(0 * twist, np.cos(lean / 2), np.sin(lean / 2))
    for side, sign in (("left", 1), ("right", -1)):
        across = sign * body.shoulders * _vector(np.cos(twist), 0, -np.sin(twist))
        points[:, _AT[f"{side} shoulder"]] = neck - 0.025 * up + across
        points[:, _AT[f"{side} hip"]] = pelvis + sign * body.hips * _vector(
            np.cos(0.4 * twist), 0, np.sin(0.4 * twist)
        )


def _stand(points, body, pelvis, step):
    """Legs of a standing body: feet fixed, one `step` before the other, knees bent as the pelvis asks."""
    for side, sign in (("left", 1), ("right", -1)):
        ankle = _vector(sign * 1.5 * body.hips, body.ankle, sign * step / 2) + 0 * pelvis
        knee, ankle = _bend(
            points[:, _AT[f"{side} hip"]], ankle, body.thigh, body.shank, np.array([0.0, 0.0, 1.0])
        )
        points[:, _AT[f"{side} knee"]] = knee
        points[:, _AT[f"{side} ankle"]] = ankle
        points[:, _AT[f"{side} toe"]] = ankle + np.array([sign * 0.025, -0.015, 0.075])


def _reach(points, body, side, wrist, pole):
    elbow, wrist = _bend(
        points[:, _AT[f"{side} shoulder"]], wrist, body.upper_arm, body.forearm, np.asarray(pole, float)
    )
    points[:, _AT[f"{side} elbow"]] = elbow
    points[:, _AT[f"{side} wrist"]] = wrist


def _pelvis(body, phase, dip, bounce):
    height = body.ankle + (body.thigh + body.shank) * (1 - dip) + bounce * np.cos(phase)
    return _vector(0 * phase, height, 0)


def _box(phase, body, drawn):
    """Left and right fist in turn from the chin straight forward and back."""
    points = _empty(phase)
    punch = {"left": _pulse(phase, drawn["snap"]), "right": _pulse(phase + np.pi, drawn["snap"])}
    pelvis = _pelvis(body, 2 * phase, 0.05, 0.008)
    _upper_body(points, body, pelvis, np.deg2rad(5.0), 0.5 * (punch["right"] - punch["left"]))
    _stand(points, body, pelvis, 0.22)
    arm = body.upper_arm + body.forearm
    for side, sign in (("left", 1), ("right", -1)):
        shoulder = points[:, _AT[f"{side} shoulder"]]
        guard = shoulder + np.array([-0.035 * sign, 0.0, 0.13])
        target = shoulder + np.array([-0.05 * sign, drawn["height"], drawn["reach"] * arm])
        amount = punch[side][:, None]
        _reach(points, body, side, guard + amount * (target - guard), (0.6 * sign, -1.0, -0.2))
    return points, 0.0


def _clap(phase, body, drawn):
    """Both hands before the chest, together once a cycle."""
    points = _empty(phase)
    pelvis = _pelvis(body, phase, 0.02, 0.003)
    _upper_body(points, body, pelvis, np.deg2rad(2.0), 0 * phase)
    _stand(points, body, pelvis, 0.0)
    half_gap = 0.02 + drawn["gap"] / 2 * (1 - np.cos(phase)) / 2
    middle = points[:, _AT["neck"]] + np.array([0.0, drawn["height"] - 0.09, drawn["reach"]])
    for side, sign in (("left", 1), ("right", -1)):
        _reach(points, body, side, middle + _vector(sign * half_gap, 0, 0), (0.5 * sign, -1.0, -0.2))
    return points, 0.0


def _wave(phase, body, drawn):
    """Both arms out to the sides and up over the head, to and fro."""
    points = _empty(phase)
    pelvis = _pelvis(body, phase, 0.02, 0.004)
    _upper_body(points, body, pelvis, np.deg2rad(1.0), 0 * phase)
    _stand(points, body, pelvis, 0.0)
    angle = np.deg2rad(drawn["centre"] + drawn["swing"] * np.cos(phase))  # 0: arms hang, 180: arms up
    reach = drawn["reach"] * (body.upper_arm + body.forearm)
    for side, sign in (("left", 1), ("right", -1)):
        out = _vector(sign * np.sin(angle), -np.cos(angle), 0.15)
        _reach(points, body, side, points[:, _AT[f"{side} shoulder"]] + reach * out, (sign, -0.5, -0.3))
    return points, 0.0


def _gait(phase, body, drawn):
    """Walking, jogging, running: legs swing against each other, arms against the legs.

    Returns the points and the way of one cycle (two steps), so that the foot on the ground hardly slips.
    """
    points = _empty(phase)
    swing = np.deg2rad(drawn["hip"])
    legs = {"left": phase, "right": phase + np.pi}
    hip, shank, extent = {}, {}, []
    for side, own in legs.items():
        # The thigh goes forward more than back. The knee folds while the leg swings forward
        # (own phase between pi and 2 pi), and gives a little under the body's weight.
        hip[side] = swing * np.cos(own) + 0.25 * swing
        fold = np.deg2rad(6) + np.deg2rad(drawn["knee"]) * _pulse(own - 1.40 * np.pi, 2.2)
        fold += 0.18 * np.deg2rad(drawn["knee"]) * _pulse(own - 0.45 * np.pi, 2.0)
        shank[side] = hip[side] - fold
        extent.append(body.thigh * np.cos(hip[side]) + body.shank * np.cos(shank[side]))
    # The longer leg carries the body (a smooth maximum); runners leave the ground when their legs are widest.
    height = body.ankle + np.logaddexp(60 * extent[0], 60 * extent[1]) / 60 - np.log(2) / 120
    height = height + drawn["flight"] * (1 + np.cos(2 * phase)) / 2
    pelvis = _vector(0 * phase, height, 0)
    _upper_body(points, body, pelvis, np.deg2rad(drawn["lean"]), 0.25 * np.cos(phase))
    for side, sign in (("left", 1), ("right", -1)):
        knee = points[:, _AT[f"{side} hip"]] + body.thigh * _vector(0, -np.cos(hip[side]), np.sin(hip[side]))
        ankle = knee + body.shank * _vector(0, -np.cos(shank[side]), np.sin(shank[side]))
        sole = shank[side] + np.deg2rad(10)
        points[:, _AT[f"{side} knee"]] = knee
        points[:, _AT[f"{side} ankle"]] = ankle
        points[:, _AT[f"{side} toe"]] = ankle + 0.085 * _vector(0, np.sin(sole) - 0.15, np.cos(sole))
        upper = -0.9 * swing * np.cos(legs[side]) - np.deg2rad(4)
        fore = upper + np.deg2rad(drawn["elbow"]) * (1 - 0.2 * np.cos(legs[side]))
        elbow = points[:, _AT[f"{side} shoulder"]] + body.upper_arm * _vector(
            0.12 * sign, -np.cos(upper), np.sin(upper)
        )
        wrist = elbow + body.forearm * _vector(-0.15 * sign, -np.cos(fore), np.sin(fore))
        points[:, _AT[f"{side} elbow"]] = elbow
        points[:, _AT[f"{side} wrist"]] = wrist
    stride = 4 * np.sin(swing) * (body.thigh + body.shank) * (1 + 6 * drawn["flight"])
    return points, stride
