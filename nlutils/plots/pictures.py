"""Pictures of arrays: matrices with their numbers, strips of frames, optical flow as colour."""

import numpy as np

__all__ = ["flow_to_rgb", "heatmap", "strip"]


def heatmap(ax, matrix, *, numbers=None, cmap="cividis", vmin=None, vmax=None):
    """Draw a 2-D array as an image on `ax`, with its numbers written in it when it is small.

    `numbers` is a format such as ".2f"; None writes none. Returns the Matplotlib image.
    """
    matrix = np.asarray(matrix)
    if matrix.ndim != 2:
        raise ValueError(f"matrix has shape {matrix.shape}; a heat map needs two axes")
    image = ax.imshow(matrix, cmap=cmap, vmin=vmin, vmax=vmax)
    ax.set_xticks(range(matrix.shape[1]) if matrix.shape[1] <= 20 else [])
    ax.set_yticks(range(matrix.shape[0]) if matrix.shape[0] <= 20 else [])
    ax.spines[:].set_visible(False)
    if numbers:
        for (row, column), value in np.ndenumerate(matrix):
            red, green, blue, _ = image.cmap(image.norm(value))
            dark = 0.299 * red + 0.587 * green + 0.114 * blue < 0.5
            ax.text(
                column,
                row,
                format(value, numbers),
                ha="center",
                va="center",
                fontsize=8,
                color="white" if dark else "black",
            )
    return image


def strip(frames, titles=None, *, width=1.6):
    """A row of pictures: `frames` is (T, H, W) or (T, H, W, 3). Returns the figure and its axes."""
    import matplotlib.pyplot as plt

    frames = np.asarray(frames)
    if frames.ndim not in (3, 4) or len(frames) == 0:
        raise ValueError(
            f"frames has shape {frames.shape}; a strip needs (T, H, W) or (T, H, W, 3), T at least 1"
        )
    height = width * frames.shape[1] / frames.shape[2] + (0.3 if titles else 0)
    fig, axes = plt.subplots(1, len(frames), figsize=(width * len(frames), height), squeeze=False)
    for index, (ax, frame) in enumerate(zip(axes[0], frames, strict=True)):
        ax.imshow(frame, cmap="gray", interpolation="nearest")
        ax.set_axis_off()
        if titles:
            ax.set_title(titles[index], fontsize=9)
    return fig, axes[0]


def flow_to_rgb(flow, largest=None) -> np.ndarray:
    """Optical flow as colour: direction is hue, speed is strength, no motion is white.

    `flow` is (..., H, W, 2) in pixels a frame, (dx, dy); `largest` is the speed with full colour (by
    default the 99th percentile). Returns uint8 (..., H, W, 3).
    """
    from matplotlib.colors import hsv_to_rgb

    flow = np.asarray(flow, dtype=float)
    speed = np.hypot(flow[..., 0], flow[..., 1])
    largest = largest or max(np.percentile(speed, 99), 1e-9)
    hue = (np.arctan2(flow[..., 1], flow[..., 0]) / (2 * np.pi)) % 1.0
    colour = np.stack([hue, np.clip(speed / largest, 0, 1), np.ones_like(hue)], axis=-1)
    return np.rint(hsv_to_rgb(colour) * 255).astype(np.uint8)
