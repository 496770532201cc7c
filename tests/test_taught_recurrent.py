"""What notebook 12 builds is what `nlutils` has: the cells, the per-frame network, the five poolings."""

import inspect

import pytest
import torch
from torch import nn

from nlutils.course.sources import lift
from nlutils.study import seeded
from nlutils.torch import create_model
from nlutils.torch.models.recurrent import LRCN, BeyondShortSnippets, PeepholeLSTM


def taught(name):
    return lift("cnn_rnn", name)


def noise(*shape, seed=0, dtype=torch.float64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def close(a, b):
    torch.testing.assert_close(a, b, rtol=0, atol=1e-10)


@pytest.mark.parametrize("library", [nn.LSTM, PeepholeLSTM])
def test_lstm_by_hand_has_the_librarys_states_and_gradients(library):
    with seeded(0):
        layer = (library(5, 4, batch_first=True) if library is nn.LSTM else library(5, 4)).double()
    weights = [getattr(layer, f"{name}_l0") for name in ("weight_ih", "weight_hh", "bias_ih", "bias_hh")]
    x, direction = noise(3, 7, 5), noise(3, 7, 4, seed=1)
    W_x, W_h, b_x, b_h = weights
    results = []
    for h in (taught("lstm")(x, W_x, W_h, b_x + b_h), layer(x)[0]):
        results.append((h, *torch.autograd.grad((h * direction).sum(), weights)))
    for mine, theirs in zip(*results, strict=True):
        close(mine, theirs)


def test_rnn_by_hand_is_the_librarys():
    layer = nn.RNN(5, 4, batch_first=True).double()
    W_x, W_h, b_x, b_h = layer.all_weights[0]
    x = noise(3, 7, 5)
    close(taught("rnn")(x, W_x, W_h, b_x + b_h), layer(x)[0])


def pair():
    """The taught network and nlutils' `cnn_rnn`, with the same weights."""
    with seeded(0):
        library = create_model("cnn_rnn", 6, input="flow", hidden=64, dropout=0.0).double()
    ours = taught("CNNLSTM")(taught("encoder")(2), 128, 64, 6, dropout=0.0).double()
    ours.load_state_dict(library.state_dict())  # strict: the same names and shapes
    return ours, library


@pytest.mark.parametrize("training", [True, False])
def test_the_taught_network_is_cnn_rnn(training):
    x, label = noise(3, 2, 5, 22, 30), torch.tensor([0, 5, 2])
    results = []
    for model in pair():
        loss = model.train(training).loss(x, label)
        loss.backward()
        gradients = {name: weight.grad for name, weight in model.named_parameters()}
        results.append({"loss": loss, "steps": model.steps(x), "scores": model(x), **gradients})
    assert results[0].keys() == results[1].keys()
    for name, value in results[0].items():
        close(value, results[1][name])


def test_the_taught_network_around_lrcns_cnn_is_lrcn():
    with seeded(0):
        lrcn = LRCN(3, width=8, fc6=16, hidden=8, size=64).double().eval()
    cnn = nn.Sequential(lrcn.encoder, nn.Flatten(), lrcn.fc6, nn.ReLU())
    ours = taught("CNNLSTM")(cnn, 16, 8, 3).double().eval()
    ours.rnn.load_state_dict(lrcn.lstm.state_dict())
    ours.classifier.load_state_dict(lrcn.classifier.state_dict())
    x, label = noise(2, 3, 4, 64, 64), torch.tensor([0, 2])
    close(ours(x), lrcn(x))
    close(ours.loss(x, label), lrcn.loss(x, label))


@pytest.mark.parametrize("pooling", ["conv", "late", "slow", "local", "time_domain"])
def test_the_taught_poolings_are_the_librarys(pooling):
    with seeded(0):
        options = {"encoder": nn.Identity(), "fc": (7, 6), "size": (2, 4), "frames": 25}
        model = BeyondShortSnippets(5, pooling=pooling, **options).double().eval()
    maps = noise(2, 25, 3, 2, 4)
    function = taught(f"{pooling}_pooling")
    conv = {"conv": model.over_time} if "conv" in inspect.signature(function).parameters else {}
    joined = function(maps, model.fc[1], model.fc[2], **conv)
    close(model.classifier(joined), model(maps.transpose(1, 2)))


def test_the_marked_thing_is_in_the_first_frame_alone():
    x, thing = taught("recall")(50, torch.Generator().manual_seed(0))
    assert x.shape == (50, 20, 5)
    assert torch.equal(x[:, 0, :4].argmax(dim=1), thing)
    assert torch.equal(x[:, :, 4].sum(dim=1), torch.ones(50))
    assert (x[:, :, :4].sum(dim=2) == 1).all()
    assert set(thing.tolist()) == {0, 1, 2, 3}


def test_a_forget_bias_is_set_once():
    layer = taught("forget_bias")(nn.LSTM(3, 4, batch_first=True), 3.0)
    total = layer.bias_ih_l0 + layer.bias_hh_l0
    assert torch.equal(total[4:8], torch.full((4,), 3.0))
    assert not (total[:4] == 3).any()


def test_the_reader_reads_with_what_it_is_given():
    reader = taught("Reader")
    x, _ = taught("recall")(2, torch.Generator().manual_seed(0))
    assert isinstance(reader(0.0).lstm, nn.LSTM)
    assert reader(None).lstm is None
    assert reader(0.0)(x).shape == reader(None)(x).shape == (2, 4)
