"""Figures: every one carries alt text, and pictures of arrays show what they should."""

import base64
import re

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
import pytest

from nlutils import plots


def test_figure_html_carries_alt_text_and_a_png():
    fig, ax = plt.subplots()
    ax.plot([1, 2])
    markup = plots.figure_html(fig, 'A line that\n rises from "1" to 2')
    plt.close(fig)
    assert 'alt="A line that rises from &quot;1&quot; to 2"' in markup
    data = re.search(r"base64,([^\"]+)", markup).group(1)
    assert base64.b64decode(data).startswith(b"\x89PNG")


@pytest.mark.parametrize("alt", ["", "   ", None])
def test_a_figure_without_alt_text_is_refused(alt):
    fig = plt.figure()
    with pytest.raises(ValueError, match="alt="):
        plots.figure_html(fig, alt)
    plt.close(fig)


def test_show_displays_html_and_closes_the_figure(monkeypatch):
    shown = []
    monkeypatch.setattr("IPython.display.display", shown.append)
    fig = plt.figure()
    plots.show(fig, "An empty figure")
    assert "An empty figure" in shown[0].data
    assert not plt.fignum_exists(fig.number)


def test_heatmap_writes_its_numbers():
    fig, ax = plt.subplots()
    plots.heatmap(ax, [[0.25, 0.75]], numbers=".2f")
    assert [text.get_text() for text in ax.texts] == ["0.25", "0.75"]
    plt.close(fig)


def test_heatmap_needs_a_matrix():
    fig, ax = plt.subplots()
    with pytest.raises(ValueError, match=r"shape \(3,\)"):
        plots.heatmap(ax, np.zeros(3))
    plt.close(fig)


def test_strip_draws_one_axis_a_frame():
    fig, axes = plots.strip(np.zeros((3, 4, 5)), titles=["a", "b", "c"])
    assert [ax.get_title() for ax in axes] == ["a", "b", "c"]
    plt.close(fig)
    with pytest.raises(ValueError, match="a strip needs"):
        plots.strip(np.zeros((4, 5)))


def test_flow_colours_tell_directions_apart_and_leave_rest_white():
    flow = np.zeros((1, 3, 2))
    flow[0, 1] = (4, 0)
    flow[0, 2] = (-4, 0)
    rest, right, left = plots.flow_to_rgb(flow, largest=4)[0]
    assert rest.tolist() == [255, 255, 255]
    assert right.tolist() == [255, 0, 0]
    assert left.tolist() == [0, 255, 255]
