"""Poolings over time in small: what each computes, literally, and what it can see."""

import pytest
import torch

from nlutils.study import seeded
from nlutils.torch import create_model

torch.set_num_threads(1)
POOLINGS = ("conv", "late", "slow", "local", "time_domain")


def made(pooling, frames=8, **options):
    with seeded(0):
        model = create_model("pooling_small", 4, pooling=pooling, frames=frames, **options).eval()
        x = torch.randn(2, 3, frames, 24, 32)
    return model, x


@torch.no_grad()
def features(model, x):
    """What each pooling hands to the classifier, frame by frame."""
    maps = [model.encoder(frame) for frame in x.unbind(2)]
    if model.pooling == "conv":
        return torch.stack(maps).amax(0).mean((2, 3))
    if model.pooling == "late":
        return torch.stack([one.mean((2, 3)) for one in maps]).amax(0)
    if model.pooling == "time_domain":
        kernel = model.over_time.weight
        moments = []
        for start in range(0, len(maps) - model.window + 1, model.stride):
            parts = [
                torch.nn.functional.conv2d(maps[start + step], kernel[:, :, step], padding=1)
                for step in range(model.window)
            ]
            moments.append((sum(parts) + model.over_time.bias[:, None, None]).relu())
        return torch.stack(moments).amax(0).mean((2, 3))
    starts = range(0, len(maps) - model.window + model.stride, model.stride)
    windows = [torch.stack(maps[start : start + model.window]).amax(0).mean((2, 3)) for start in starts]
    return torch.stack(windows).amax(0) if model.pooling == "slow" else torch.cat(windows, 1)


@pytest.mark.parametrize("pooling", POOLINGS)
def test_each_pooling_is_what_it_says(pooling):
    model, x = made(pooling)
    _, linear = model.classifier
    torch.testing.assert_close(model(x), linear(features(model, x)))


@pytest.mark.parametrize("pooling", POOLINGS)
def test_who_knows_the_order_of_frames(pooling):
    model, x = made(pooling)
    knows = pooling not in ("conv", "late")
    torn = x[:, :, [5, 2, 7, 0, 3, 6, 1, 4]]
    assert torch.allclose(model(x), model(torn), atol=1e-5) is not knows


@pytest.mark.parametrize("pooling", POOLINGS)
def test_dropout_stands_before_the_classifier(pooling):
    model, x = made(pooling, dropout=1.0)
    model.train()
    torch.testing.assert_close(model(x), model.classifier[1].bias.expand(2, -1))


def test_a_trained_encoder_of_frame_averaging_fits():
    model, _ = made("time_domain")
    with seeded(1):
        flat = create_model("frame_average", 4)
    kept = {key: w for key, w in flat.state_dict().items() if key.startswith("encoder.")}
    result = model.load_state_dict(kept, strict=False)
    assert result.unexpected_keys == []
    assert all(not key.startswith("encoder.") for key in result.missing_keys)


def test_options_of_other_poolings_are_refused():
    for pooling, option, value in (("conv", "window", 10), ("late", "stride", 1), ("slow", "kernels", 8)):
        with pytest.raises(ValueError, match=rf"{option}={value} is an option of .*pooling={pooling!r}"):
            create_model("pooling_small", 4, pooling=pooling, **{option: value})
    with pytest.raises(ValueError, match=r"pooling='lstm' is not known.*'time_domain'$"):
        create_model("pooling_small", 4, pooling="lstm")
    with pytest.raises(ValueError, match=r"stride=5 must be at most window=4"):
        create_model("pooling_small", 4, pooling="slow", stride=5)


def test_clips_of_another_length():
    _, longer = made("conv", frames=12)
    for pooling in ("conv", "late", "slow", "time_domain"):
        assert made(pooling)[0](longer).shape == (2, 4)
    with pytest.raises(ValueError, match="clips of 12 frames have 5 windows"):
        made("local")[0](longer)
