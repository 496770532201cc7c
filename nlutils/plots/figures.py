"""Showing a figure with alternative text."""

import base64
import html
import io

import matplotlib.pyplot as plt

__all__ = ["COLOURS", "figure_html", "show", "style"]

# Okabe and Ito's palette, black and yellow left out: seven hues that stay apart for the common forms of
# colour blindness and in grey print. https://jfly.uni-koeln.de/color/
COLOURS = {
    "blue": "#0072B2",
    "orange": "#E69F00",
    "green": "#009E73",
    "red": "#D55E00",
    "sky": "#56B4E9",
    "pink": "#CC79A7",
    "grey": "#767676",
}


def style() -> None:
    """Set Matplotlib's defaults for the notebooks: the palette, small margins, no frame above and right."""
    plt.rcParams.update(
        {
            "axes.prop_cycle": plt.cycler(color=list(COLOURS.values())),
            "axes.spines.top": False,
            "axes.spines.right": False,
            "figure.dpi": 90,
            "figure.constrained_layout.use": True,
            "font.size": 10,
            "image.cmap": "cividis",
        }
    )


def figure_html(fig, alt: str) -> str:
    """The figure as one HTML `<img>` with its PNG inside and `alt` as alternative text."""
    if not alt or not alt.strip():
        raise ValueError(f"alt={alt!r} is empty; say in a sentence what a reader should notice in the figure")
    buffer = io.BytesIO()
    fig.savefig(buffer, format="png", dpi=fig.dpi, metadata={"Software": None}, pil_kwargs={"optimize": True})
    data = base64.b64encode(buffer.getvalue()).decode()
    text = html.escape(" ".join(alt.split()), quote=True)
    return f'<img alt="{text}" style="max-width:100%" src="data:image/png;base64,{data}">'


def show(fig, alt: str) -> None:
    """Show `fig` in a notebook as an image that carries `alt`, and close it.

    Screen readers and every renderer of notebooks read the `alt` of an HTML image; they do not read alt text
    kept in a cell's metadata.
    """
    from IPython.display import HTML, display

    content = figure_html(fig, alt)
    plt.close(fig)
    display(HTML(content))
