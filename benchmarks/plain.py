"""The operation as it is written everywhere, every matrix materialised: what short forms are compared to."""

import torch
from torch import nn

__all__ = ["PlainBlock", "plain_operation"]


class PlainBlock(nn.Module):
    """Our block's layers around an N x N map, as textbooks and the peers have it.

    Its concatenation builds the (2d, N, N) features of all pairs and takes w_f through them, as mmcv does,
    but divides by N out of place, so that it can be trained: "materialised pairs".
    """

    def __init__(self, ours):
        super().__init__()
        self.ours = ours

    def forward(self, x):
        """(B, C, *size) -> (B, C, *size)."""
        ours = self.ours
        theta, phi, g = (layer(x).flatten(2) for layer in (ours.theta, ours.phi, ours.g))
        form = "pairs" if ours.instantiation == "concatenation" else ours.instantiation
        scale = theta.shape[1] ** -0.5 if ours.scale else 1.0
        y = plain_operation(form, *(v.transpose(1, 2) for v in (theta, phi, g)), w_f=ours.w_f, scale=scale)
        y = y.transpose(1, 2).reshape(x.shape[0], -1, *x.shape[2:])
        return x + ours.norm(ours.w_z(y))


def plain_operation(form, theta, phi, g, *, w_f=None, scale=1.0):
    """(B, N, d), (B, N, d), (B, N, c) -> (B, N, c) through a materialised map.

    form: "gaussian", "embedded_gaussian", "dot_product", "pairs" (the features of all pairs), "sums" (the
    concatenation as ReLU(a_i + b_j)).
    """
    count, width = phi.shape[1:]
    if form in ("gaussian", "embedded_gaussian"):
        return torch.softmax((theta @ phi.transpose(1, 2)) * scale, dim=2) @ g
    if form == "dot_product":
        return (theta @ phi.transpose(1, 2)) / count @ g
    if form == "sums":
        a, b = theta @ w_f[:width], phi @ w_f[width:]
        return torch.relu(a[:, :, None] + b[:, None, :]) / count @ g
    if form == "pairs":
        # Channels before the two positions: a convolution of size 1 takes w_f through them, as in the peers.
        rows = theta.transpose(1, 2)[:, :, :, None].expand(-1, -1, -1, count)
        columns = phi.transpose(1, 2)[:, :, None, :].expand(-1, -1, theta.shape[1], -1)
        features = torch.cat([rows, columns], dim=1)
        logits = nn.functional.conv2d(features, w_f[None, :, None, None])
        return torch.relu(logits)[:, 0] / count @ g
    raise ValueError(f"form={form!r} is not known")
