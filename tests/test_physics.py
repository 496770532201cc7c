"""Simulated discs: the laws hold, collisions reflect, each is a function of its number, pictures show it."""

import numpy as np
import pytest

from nlutils.video import physics
from nlutils.video.physics import (
    COLOURS,
    RADIUS,
    SYSTEMS,
    Simulations,
    energy,
    momentum,
    render,
    simulate,
)


def discs(*states):
    return np.array(states, np.float64)


@pytest.mark.parametrize("system", SYSTEMS)
def test_states_stay_in_the_box_and_energy_is_kept(system):
    states = Simulations(system, 12, frames=40).states()
    assert states.shape == (12, 40, 3, 4)
    assert states.dtype == np.float64
    assert np.abs(states[..., :2]).max() <= 1 - RADIUS + 1e-9
    kinetic = (states[..., 2:] ** 2).sum(axis=(-2, -1)).mean() / 2
    total = energy(system, states)
    # Free flight and elastic collisions keep it to rounding; Verlet steps of 1/16 frame to a few thousandths.
    bound = {"springs": 1e-3, "gravity": 4e-3}.get(system, 1e-13)
    assert np.abs(total - total[:, :1]).max() < bound * kinetic
    assert np.ptp(states[..., :2], axis=1).max() > (0.1 if system == "drift" else 0.5)  # they do move


@pytest.mark.parametrize("system", ["springs", "gravity", "drift"])
def test_momentum_is_kept_where_there_are_no_walls(system):
    states = Simulations(system, 12, frames=40).states()
    total = momentum(states)
    assert np.abs(total - total[:, :1]).max() < 1e-14
    if system != "drift":
        assert np.abs(total).max() < 1e-14
        middle = states[..., :2].mean(axis=2)
        assert np.abs(middle - middle[:, :1]).max() < 1e-12
        assert np.abs(middle).max() <= 0.2 + 1e-12


@pytest.mark.parametrize("system", ["springs", "gravity"])
def test_half_the_step_leaves_a_quarter_of_the_error(system):
    start = Simulations(system, 4, frames=20).states()[:, 0]
    error = {}
    for substeps in (4, 8):
        total = energy(system, simulate(system, start, 20, substeps=substeps))
        error[substeps] = np.abs(total - total[:, :1]).max()
    assert error[4] / error[8] == pytest.approx(4, rel=0.15)


def test_two_discs_on_a_spring_swing_with_the_period_of_the_formula():
    """Reduced mass 1/2, stiffness 0.016: omega = sqrt(0.032), a period of 35.12 frames."""
    states = simulate("springs", discs((-0.6, 0.1, 0, 0), (0.6, 0.1, 0, 0)), 71, substeps=64)
    stretch = states[:, 1, 0] - states[:, 0, 0] - 0.8
    expected = 0.4 * np.cos(np.sqrt(0.032) * np.arange(71))
    np.testing.assert_allclose(stretch, expected, atol=2e-5)
    np.testing.assert_array_equal(states[..., 1], 0.1)


def test_gravity_pulls_two_discs_together_as_the_formula_says():
    states = simulate("gravity", discs((-0.3, 0, 0, 0), (0.1, 0.3, 0, 0)), 2)
    pull = 0.006 * np.array([0.4, 0.3]) / (0.5**2 + 0.3**2) ** 1.5  # from the first to the second disc
    np.testing.assert_allclose(states[1, 0, 2:], pull, rtol=0.1)
    np.testing.assert_allclose(states[1, 1, 2:], -states[1, 0, 2:], atol=1e-16)
    np.testing.assert_allclose(states[1, 0, :2] - states[0, 0, :2], pull / 2, rtol=0.1)


def test_drift_is_a_straight_line():
    states = Simulations("drift", 5, frames=30).states()
    expected = states[:, :1, :, :2] + np.arange(30)[:, None, None] * states[:, :1, :, 2:]
    np.testing.assert_allclose(states[..., :2], expected, atol=1e-13)
    np.testing.assert_array_equal(
        states[..., 2:], np.broadcast_to(states[:, :1, :, 2:], states[..., 2:].shape)
    )


def test_walls_reflect():
    """0.04 a frame from x = 0.7: the wall at 0.84 is met after 3.5 frames, and the way back is as long."""
    states = simulate("billiards", discs((0.7, -0.5, 0.04, 0.01)), 8)[:, 0]
    np.testing.assert_allclose(states[:, 0], [0.7, 0.74, 0.78, 0.82, 0.82, 0.78, 0.74, 0.7], atol=1e-13)
    np.testing.assert_array_equal(states[:, 2], [0.04] * 4 + [-0.04] * 4)
    np.testing.assert_allclose(states[:, 1], -0.5 + 0.01 * np.arange(8), atol=1e-13)
    corner = simulate("billiards", discs((-0.8, -0.8, -0.1, -0.1)), 2)[1, 0]
    np.testing.assert_allclose(corner, [-0.78, -0.78, 0.1, 0.1], atol=1e-13)


def test_discs_exchange_their_velocities_head_on():
    """Gap 0.6 - 0.32 = 0.28, closing at 0.08 a frame: contact after 3.5 frames, whatever the step."""
    for substeps in (1, 3, 16):
        states = simulate(
            "billiards", discs((-0.3, 0.2, 0.06, 0), (0.3, 0.2, -0.02, 0)), 8, substeps=substeps
        )
        np.testing.assert_allclose(states[3:5, :, 2], [[0.06, -0.02], [-0.02, 0.06]], atol=1e-15)
        contact = np.array([-0.3 + 3.5 * 0.06, 0.3 - 3.5 * 0.02])
        np.testing.assert_allclose(states[7, :, 0], contact + 3.5 * np.array([-0.02, 0.06]), atol=1e-13)
        np.testing.assert_array_equal(states[..., 3], 0)


def test_an_oblique_collision_turns_only_the_part_along_the_centres():
    """A disc comes along x and touches one at rest whose centre is higher by RADIUS: normal at 30 degrees."""
    speed, angle = 0.05, np.arcsin(RADIUS / (2 * RADIUS))
    states = simulate("billiards", discs((-0.5, 0, speed, 0), (0, RADIUS, 0, 0)), 16)
    normal = np.array([np.cos(angle), np.sin(angle)])
    pushed = speed * normal[0] * normal
    np.testing.assert_allclose(states[-1, 1, 2:], pushed, atol=1e-14)
    np.testing.assert_allclose(states[-1, 0, 2:], np.array([speed, 0]) - pushed, atol=1e-14)
    np.testing.assert_allclose(momentum(states), np.broadcast_to([speed, 0], (16, 2)), atol=1e-15)


def test_billiards_do_not_overlap():
    states = Simulations("billiards", 20, discs=4, frames=60).states()
    first, second = np.triu_indices(4, k=1)
    apart = np.linalg.norm(states[:, :, first, :2] - states[:, :, second, :2], axis=-1)
    assert apart.min() > 0.95 * 2 * RADIUS
    assert (apart.min(axis=(1, 2)) < 2.2 * RADIUS).mean() > 0.5  # most of them do meet


@pytest.mark.parametrize("system", SYSTEMS)
def test_each_depends_on_seed_and_number_alone(system):
    many = Simulations(system, 8, frames=24, seed=5)
    few = Simulations(system, 4, frames=24, seed=5)
    everything = many.states()
    np.testing.assert_array_equal(few.states(), everything[:4])
    np.testing.assert_array_equal(many.states([6, 2])[1], everything[2])
    np.testing.assert_array_equal(many[6].states, everything[6])
    np.testing.assert_array_equal(many[6].frames, many[6].frames)
    assert (Simulations(system, 8, frames=24, seed=6).states() != everything).any(axis=(1, 2, 3)).all()
    assert len({everything[i].tobytes() for i in range(8)}) == 8


def test_pictures_show_discs_where_the_states_say():
    states = Simulations("billiards", 1, frames=12).states()[0]
    for size in (32, 48):
        frames = render(states, size)
        assert frames.shape == (12, size, size, 3)
        assert frames.dtype == np.uint8
        middle = (2 * np.arange(size) + 1) / size - 1
        for disc in range(3):
            alone = render(states[:, disc : disc + 1], size).astype(float)
            share = alone.max(axis=-1) / COLOURS[0].max()
            area = share.sum(axis=(1, 2))
            np.testing.assert_allclose(area * (2 / size) ** 2, np.pi * RADIUS**2, rtol=0.05)
            seen = np.stack(
                [(share * middle).sum(axis=(1, 2)), (share * middle[:, None]).sum(axis=(1, 2))], axis=1
            )
            np.testing.assert_allclose(seen / area[:, None], states[:, disc, :2], atol=0.1 * 2 / size)
            column, row = np.rint((states[:, disc, :2] + 1) * size / 2 - 0.5).astype(int).T
            np.testing.assert_array_equal(frames[np.arange(12), row, column], np.tile(COLOURS[disc], (12, 1)))


def test_y_points_down_and_the_later_disc_is_in_front():
    frame = render(discs((0, 0.75, 0, 0), (0.1, 0.75, 0, 0))[None])[0]
    assert frame[:16].max() == 0
    assert tuple(frame[27, 17]) == tuple(COLOURS[1])


def test_backgrounds_are_smooth_and_stand_still():
    simulations = Simulations("drift", 3, frames=5, seed=2)
    background = simulations.background(1)
    clip = simulations[1]
    assert clip.frames.shape == (5, 32, 32, 3)
    covered = render(clip.states, background=np.zeros((32, 32, 3))).any(axis=(0, 3))
    expected = np.tile(background[~covered], (5, 1, 1))
    assert np.abs(clip.frames[:, ~covered] - expected).max() < 1  # rounding, and the rim of a disc
    assert (~covered).sum() > 500
    assert 5 < background.std() < 60
    assert np.abs(np.diff(background, axis=0)).mean() < background.std()
    assert not np.array_equal(background, simulations.background(2))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"system": "magnets"}, "system='magnets'.*'springs'"),
        ({"count": 0}, "count=0"),
        ({"discs": 7}, "discs=7.*1 to 6"),
        ({"frames": 0}, "frames=0"),
        ({"size": 8}, "size=8.*16 pixels"),
        ({"seed": -1}, "seed=-1"),
        ({"seed": 0.5}, "seed=0.5"),
    ],
)
def test_wrong_arguments_are_named(arguments, message):
    with pytest.raises(ValueError, match=message):
        Simulations(**{"system": "drift", "count": 1, **arguments})


def test_wrong_numbers_and_shapes_are_named():
    simulations = Simulations("drift", 2, frames=3)
    with pytest.raises(IndexError, match=r"index=2.*0 to 1"):
        simulations[2]
    with pytest.raises(IndexError, match=r"index=-1"):
        simulations.states([-1])
    for index in (0.7, 1.0, True, "1"):
        with pytest.raises(ValueError, match=rf"index={index!r} must be a whole number, 0 to 1"):
            simulations.states([index])
    assert np.array_equal(simulations.states(np.array([1])), simulations.states([1]))
    with pytest.raises(ValueError, match=r"start has shape \(3, 2\)"):
        simulate("drift", np.zeros((3, 2)), 4)
    with pytest.raises(ValueError, match=r"substeps=0"):
        simulate("drift", np.zeros((3, 4)), 4, substeps=0)
    with pytest.raises(ValueError, match=r"states has shape \(3, 4\)"):
        render(np.zeros((3, 4)))
    with pytest.raises(ValueError, match=r"background has shape \(16, 16, 3\)"):
        render(np.zeros((2, 3, 4)), 32, background=np.zeros((16, 16, 3)))


def test_no_simulations_is_no_error_and_one_disc_moves_alone():
    assert Simulations("springs", 3, frames=4).states([]).shape == (0, 4, 3, 4)
    states = Simulations("springs", 2, discs=1, frames=10).states()
    np.testing.assert_allclose(states[..., 2:], 0, atol=1e-18)  # total momentum 0, and nothing pulls


@pytest.mark.parametrize("wrong", [np.nan, np.inf])
def test_states_that_are_no_numbers_are_refused(wrong):
    states = np.zeros((2, 3, 4))
    states[1, 2, 0] = wrong
    message = rf"\[1, 2, 0\]={wrong} must be a finite number"
    for call in (
        lambda: simulate("drift", states, 4),
        lambda: energy("springs", states),
        lambda: momentum(states),
        lambda: render(states),
    ):
        with pytest.raises(ValueError, match=message):
            call()


@pytest.mark.parametrize("count", [1, 40])
def test_a_box_that_no_start_stays_in_is_named(count):
    """Drifting discs meet a wall within 2000 frames; it takes a second or so to say this of 1000 starts."""
    with pytest.raises(
        ValueError,
        match="system='drift', discs=3, frames=2000: of 1000 starts of simulation 0 a disc left the box",
    ):
        Simulations("drift", count, frames=2000).states()


def test_few_starts_that_stay_are_found():
    """Six discs that attract each other stay in the box for 64 frames in one start of a hundred."""
    states = Simulations("gravity", 1, discs=6).states()
    assert np.abs(states[..., :2]).max() <= 1 - RADIUS + 1e-9


@pytest.mark.parametrize("system", ["springs", "gravity", "drift"])
def test_the_first_start_that_stays_is_taken(system):
    """Drawn and followed one after another, as the numbers of notebooks and records were."""
    simulations = Simulations(system, 6, frames=30, seed=4)
    for index, states in enumerate(simulations.states()):
        rng = simulations._generator(index, 1)
        inside = False
        while not inside:
            one = simulate(system, physics._start(system, 3, rng), 30)
            inside = np.abs(one[..., :2]).max() <= 1 - RADIUS + 1e-9
        np.testing.assert_array_equal(states, one)


def test_the_numbers_of_today_stay():
    """Records and notebooks were made with these starts."""
    sums = {system: Simulations(system, 3, frames=64).states().sum() for system in SYSTEMS}
    assert sums == pytest.approx(
        {"springs": -75.405062, "billiards": 12.189794, "gravity": -17.966459, "drift": -92.515348}, abs=1e-5
    )
