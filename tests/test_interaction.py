"""The Visual Interaction Network: counts, literal sums, what cores and codes see, that it learns."""

import pytest
import torch
import torch.nn.functional as F

from nlutils.study import seeded
from nlutils.torch import non_local
from nlutils.torch.models.interaction import (
    Dynamics,
    InteractionCore,
    VisualEncoder,
    VisualInteractionNetwork,
    mlp,
)
from nlutils.video.physics import Simulations

torch.set_num_threads(1)


def numbers(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def count(module):
    return sum(parameter.numel() for parameter in module.parameters())


@pytest.fixture
def core():
    with seeded(0):
        return InteractionCore(6).double()


@pytest.fixture
def dynamics():
    with seeded(0):
        return Dynamics(6).double()


def test_parameters_of_the_published_size():
    """By hand, width by width; the same figures follow from a public reimplementation's layers."""

    def layer(before, after, kernel=1):
        return before * kernel**2 * after + after

    model = VisualInteractionNetwork(3)
    branches = layer(6, 4, 10) + layer(4, 4, 10) + layer(6, 16, 3) + layer(16, 16, 3)
    joint = layer(20, 16, 3) + layer(16, 16, 3)
    pooled = layer(18, 16, 3) + 2 * layer(16, 16, 3) + layer(16, 32, 3) + layer(32, 32, 3)
    encoder = model.encoder
    convolutions = sum(count(part) for part in (encoder.large, encoder.small, encoder.joint, encoder.pooled))
    assert convolutions == branches + joint + pooled == 33_560
    assert count(encoder.pair_code) == layer(32, 3 * 64) == 6_336
    assert count(encoder.triplet) == layer(128, 64) + layer(64, 64) == 12_416
    core = 2 * layer(64, 64) + (layer(128, 64) + 2 * layer(64, 64)) + 3 * layer(64, 64)
    core += layer(128, 64) + layer(64, 64)
    assert [count(c) for c in model.dynamics.cores] == [core] * 3 == [49_792] * 3
    assert count(model.dynamics.aggregator) == layer(192, 64) + layer(64, 64) == 16_512
    assert count(model.decoder) == layer(64, 4) == 260
    assert count(model) == 33_560 + 6_336 + 12_416 + 149_376 + 16_512 + 260 == 218_460


def test_shapes_of_clips_and_of_states():
    model = VisualInteractionNetwork(3, width=8, channels=4)
    clips = torch.rand(2, 3, 6, 32, 32)
    assert model.input == "rgb"
    assert model.expects is None  # of no published size
    published = VisualInteractionNetwork(3).expects
    assert (published.frames, published.size) == (6, (32, 32))
    assert VisualInteractionNetwork(3, input="states").expects is None
    assert VisualInteractionNetwork(3, offsets=(1, 8)).expects is None
    assert model.codes(clips).shape == (2, 4, 3, 8)
    assert model(clips).shape == (2, 8, 3, 4)
    assert model.rollout(clips, 50).shape == (2, 50, 3, 4)
    assert model.loss(clips, torch.rand(2, 12, 3, 4)).shape == ()
    assert model.codes(torch.rand(1, 3, 9, 48, 40)).shape == (1, 7, 3, 8)
    states = VisualInteractionNetwork(5, input="states", width=8)
    assert states.rollout(torch.rand(2, 4, 5, 4), 11).shape == (2, 11, 5, 4)
    assert VisualInteractionNetwork(1, input="states", width=8)(torch.rand(2, 4, 1, 4)).shape == (2, 8, 1, 4)


def test_the_core_is_the_sum_written_out(core):
    s = numbers(2, 4, 6)
    result = core(s)
    for b in range(2):
        for i in range(4):
            update = core.self_dynamics(s[b, i])
            for j in range(4):
                if j != i:
                    update = update + core.relation(torch.cat([s[b, i], s[b, j]]))
            expected = core.output(torch.cat([s[b, i], core.affector(update)]))
            torch.testing.assert_close(result[b, i], expected, rtol=0, atol=1e-14)
    effects = core.effects(s)
    assert effects.shape == (2, 4, 3, 6)
    torch.testing.assert_close(
        effects[1, 2, 1], core.relation(torch.cat([s[1, 2], s[1, 1]])), rtol=0, atol=1e-14
    )
    torch.testing.assert_close(
        effects[1, 2, 2], core.relation(torch.cat([s[1, 2], s[1, 3]])), rtol=0, atol=1e-14
    )


def test_the_core_contains_the_concatenation_form_of_equation_1(core):
    """With g constant: f = ReLU(w_f [theta_i, phi_j]) is neuron 0, and the layers behind make f g of it.

    The packaged operation divides by N and has the term j = i; the core does neither.
    """
    N, d = 5, 6
    x, theta, phi, w_f, g = numbers(2, N, d), numbers(3, d), numbers(3, d, seed=1), numbers(6), numbers(d)
    with torch.no_grad():
        for parameter in core.relation.parameters():
            parameter.zero_()
        core.relation[0].weight[0] = torch.cat([w_f[:3] @ theta, w_f[3:] @ phi])
        core.relation[2].weight[0, 0] = 1
        core.relation[4].weight[:, 0] = g
    theta_x, phi_x = x @ theta.T, x @ phi.T
    y = non_local(theta_x, phi_x, g.expand(2, N, d), "concatenation", w_f=w_f)
    itself = torch.relu(theta_x @ w_f[:3] + phi_x @ w_f[3:]).unsqueeze(2) * g
    torch.testing.assert_close(core.effects(x).sum(dim=2), N * y - itself, rtol=0, atol=1e-12)
    assert itself.abs().max() > 0.1
    assert y.abs().max() > 0.1


def test_objects_have_no_order(core, dynamics):
    order = torch.tensor([2, 0, 3, 1])
    s, codes = numbers(2, 4, 6), numbers(2, 4, 4, 6)
    torch.testing.assert_close(core(s[:, order]), core(s)[:, order], rtol=0, atol=1e-14)
    torch.testing.assert_close(dynamics(codes[:, :, order]), dynamics(codes)[:, order], rtol=0, atol=1e-14)
    model = VisualInteractionNetwork(4, input="states", width=6).double()
    states = numbers(2, 4, 4, 4)
    torch.testing.assert_close(
        model.rollout(states[:, :, order], 7), model.rollout(states, 7)[:, :, order], rtol=0, atol=1e-13
    )
    assert (core(s) - core(s)[:, order]).abs().min(dim=1).values.max() > 1e-4  # the objects do differ


def test_an_object_learns_of_others_by_relations_alone():
    s, moved = numbers(1, 3, 6), numbers(1, 3, 6)
    moved[0, 2] += 1
    for relations in (True, False):
        with seeded(1):
            core = InteractionCore(6, relations=relations).double()
        change = (core(moved) - core(s)).abs().amax(dim=-1)[0]
        assert change[2] > 1e-3
        assert bool((change[:2] > 1e-6).all()) == relations
        assert bool((change[:2] == 0).all()) != relations
    with pytest.raises(ValueError, match="relations=False"):
        core.effects(s)


def test_each_core_sees_the_code_of_its_offset_and_no_other(dynamics):
    seen = {}
    for offset, core in zip(dynamics.offsets, dynamics.cores, strict=True):
        core.register_forward_hook(lambda _, inputs, output, offset=offset: seen.update({offset: output}))
    codes = numbers(1, 5, 3, 6).requires_grad_()
    next_code = dynamics(codes)
    before = dict(seen)
    next_code.sum().backward()
    touched = (codes.grad.abs().amax(dim=(0, 2, 3)) > 0).tolist()
    assert touched == [
        False,
        True,
        False,
        True,
        True,
    ]  # S_{t-4} no, S_{t-3} yes, S_{t-2} no, S_{t-1}, S_t yes
    for back, offset in ((3, 4), (1, 2), (0, 1)):
        changed = codes.detach().clone()
        changed[:, -1 - back] += 1
        assert not torch.equal(dynamics(changed), next_code)
        assert [k for k in seen if not torch.equal(seen[k], before[k])] == [offset]
    with torch.no_grad():  # S_{t-3} comes in through core 4, the last third of the aggregator's input, alone
        dynamics.aggregator[0].weight[:, 12:] = 0
        changed = codes.detach().clone()
        changed[:, -4] += 1
        assert torch.equal(dynamics(changed), dynamics(codes))


def test_a_rollout_feeds_each_prediction_back():
    model = VisualInteractionNetwork(3, input="states", width=6).double()
    states = numbers(2, 4, 3, 4)
    window = list(model.encoder(states).unbind(1))
    predicted = []
    for _ in range(6):
        window.append(model.dynamics(torch.stack(window[-4:], dim=1)))
        predicted.append(model.decoder(window[-1]))
    rollout = model.rollout(states, 6)
    torch.testing.assert_close(rollout, torch.stack(predicted, dim=1), rtol=0, atol=1e-14)
    torch.testing.assert_close(model.rollout(states, 2), rollout[:, :2], rtol=0, atol=0)
    earlier = torch.cat([numbers(2, 2, 3, 4, seed=3), states], dim=1)  # older states change nothing
    torch.testing.assert_close(model.rollout(earlier, 6), rollout, rtol=0, atol=1e-14)


def test_a_code_is_made_of_three_frames():
    encoder = VisualEncoder(2, 6, channels=8)
    clip = torch.rand(1, 3, 6, 32, 32, generator=torch.Generator().manual_seed(0))
    codes = encoder(clip)
    for frame in range(6):
        changed = clip.clone()
        changed[:, :, frame] = 1 - changed[:, :, frame]
        difference = (encoder(changed) - codes).abs().amax(dim=(0, 2, 3))
        assert (difference > 1e-7).tolist() == [k <= frame <= k + 2 for k in range(4)]


def test_the_encoder_is_its_layers_written_out():
    encoder = VisualEncoder(2, 6, channels=8).double()
    clip = numbers(1, 3, 3, 32, 32)

    def conv(x, layer):
        low, high = (layer.kernel_size[0] - 1) // 2, layer.kernel_size[0] // 2
        return torch.relu(F.conv2d(F.pad(x, (low, high, low, high)), layer.weight, layer.bias))

    pair_codes = []
    for t in (0, 1):
        pair = torch.cat([clip[:, :, t], clip[:, :, t + 1]], dim=1)
        large = conv(conv(pair, encoder.large[1]), encoder.large[4])
        small = conv(conv(pair, encoder.small[1]), encoder.small[4])
        assert (large.shape[1:], small.shape[1:]) == ((2, 32, 32), (8, 32, 32))
        x = conv(conv(torch.cat([large, small], dim=1), encoder.joint[1]), encoder.joint[4])
        middle = torch.linspace(-1, 1, 32, dtype=torch.float64)
        y_map, x_map = torch.meshgrid(middle, middle, indexing="ij")
        x = torch.cat([x, x_map[None, None], y_map[None, None]], dim=1)
        for number in range(5):
            x = F.max_pool2d(conv(x, encoder.pooled[4 * number + 1]), 2)
        assert x.shape == (1, 16, 1, 1)
        pair_codes.append(encoder.pair_code(x.flatten(1)).reshape(2, 6))
    expected = torch.stack([encoder.triplet(torch.cat([pair_codes[0][n], pair_codes[1][n]])) for n in (0, 1)])
    torch.testing.assert_close(encoder(clip)[0, 0], expected, rtol=0, atol=1e-12)


def test_the_loss_is_its_two_terms():
    model = VisualInteractionNetwork(2, input="states", width=6).double()
    states = numbers(3, 4 + 5, 2, 4)
    encoded = ((model.decoder(model.encoder(states[:, :4])) - states[:, :4]) ** 2).mean()
    each = ((model.rollout(states[:, :4], 5) - states[:, 4:]) ** 2).mean(dim=(0, 2, 3))
    loss = model.loss(states[:, :4], states)
    torch.testing.assert_close(loss, encoded + each.mean(), rtol=0, atol=1e-14)
    discounted = sum(0.8 ** (k + 1) * each[k] for k in range(5)) / 5
    loss = model.loss(states[:, :4], states, discount=0.8)
    torch.testing.assert_close(loss, encoded + discounted, rtol=0, atol=1e-14)


def test_an_mlp_ends_without_a_relu():
    layers = mlp(3, 5, 4, 2)
    assert [type(layer).__name__ for layer in layers] == ["Linear", "ReLU", "Linear", "ReLU", "Linear"]
    assert [layer.out_features for layer in layers[::2]] == [5, 4, 2]


def test_wrong_arguments_and_shapes_are_named():
    with pytest.raises(ValueError, match=r"input='flow'.*'rgb', 'states'"):
        VisualInteractionNetwork(3, input="flow")
    with pytest.raises(ValueError, match="num_objects=0"):
        VisualInteractionNetwork(0)
    with pytest.raises(ValueError, match=r"offsets=\(2, 1\)"):
        VisualInteractionNetwork(3, offsets=(2, 1))
    with pytest.raises(ValueError, match=r"offsets=\(\)"):
        VisualInteractionNetwork(3, offsets=())
    with pytest.raises(ValueError, match="channels=6 must be a multiple of 4"):
        VisualInteractionNetwork(3, channels=6)
    model = VisualInteractionNetwork(3, width=8, channels=4)
    with pytest.raises(ValueError, match=r"\(1, 3, 2, 32, 32\).*T 3 or more"):
        model(torch.zeros(1, 3, 2, 32, 32))
    with pytest.raises(ValueError, match=r"64 x 32 pixels; use 32 to 63"):
        model(torch.zeros(1, 3, 6, 64, 32))
    with pytest.raises(ValueError, match=r"3 codes.*offset 4 needs 4; give 1 more frames"):
        model(torch.zeros(1, 3, 5, 32, 32))
    with pytest.raises(ValueError, match="steps=0"):
        model.rollout(torch.zeros(1, 3, 6, 32, 32), 0)
    seeing_states = VisualInteractionNetwork(3, input="states", width=8)
    for wrong in ((2, 14, 3, 1), (1, 14, 3, 4), (2, 14, 1, 4)):  # these would be broadcast
        with pytest.raises(ValueError, match=r"states has shape .*; x needs \(2, 14, 3, 4\)"):
            seeing_states.loss(torch.rand(2, 6, 3, 4), torch.rand(wrong))
    with pytest.raises(ValueError, match="relations='no' is not known"):
        VisualInteractionNetwork(3, relations="no")
    with pytest.raises(ValueError, match="states has 4 frames, 4 of them for x; give 5 or more"):
        model.loss(torch.zeros(1, 3, 6, 32, 32), torch.zeros(1, 4, 3, 4))
    states = VisualInteractionNetwork(3, input="states", width=8)
    with pytest.raises(ValueError, match=r"\(1, 4, 2, 4\); they must be \(B, T, 3, 4\)"):
        states(torch.zeros(1, 4, 2, 4))


def learn(model, x, states, steps, lr):
    """Train on one batch; the prediction's mean distance to the true places, before and after."""
    optimiser = torch.optim.Adam(model.parameters(), lr=lr)
    future = states[:, 4:]

    def distance():
        with torch.no_grad():
            return (model.rollout(x, future.shape[1]) - future)[..., :2].norm(dim=-1).mean().item()

    before = distance()
    for _ in range(steps):
        optimiser.zero_grad()
        model.loss(x, states).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimiser.step()
    return before, distance()


UNITS = torch.tensor([1.0, 1.0, 10.0, 10.0])  # velocities of ten frames: as large as places


@pytest.mark.parametrize("system", ["springs", "billiards"])
def test_it_learns_eight_sequences_of_states_by_heart(system):
    states = torch.tensor(Simulations(system, 8, frames=10).states()).float() * UNITS
    with seeded(0):
        model = VisualInteractionNetwork(3, input="states", width=32)
    before, after = learn(model, states[:, :4], states, steps=80, lr=5e-3)
    assert before > 0.4, (before, after)
    assert after < 0.3 * before


def test_it_learns_eight_clips_by_heart():
    simulations = Simulations("springs", 8, frames=8)
    states = torch.tensor(simulations.states())[:, 2:].float() * UNITS
    clips = torch.stack([torch.tensor(simulations[i].frames[:6]) for i in range(8)]).permute(0, 4, 1, 2, 3)
    with seeded(0):
        model = VisualInteractionNetwork(3, width=32, channels=8)
    before, after = learn(model, (clips / 255 - 0.5) / 0.25, states, steps=80, lr=5e-3)
    assert before > 0.4, (before, after)
    assert after < 0.4 * before
