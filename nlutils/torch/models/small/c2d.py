"""C2D-style: frame averaging whose maps keep their time axis, so that blocks can stand between the frames.

Wang et al., Non-local Neural Networks, CVPR 2018, section 3.3: a 2D network runs on every frame, and only
pooling brings frames together, until non-local blocks do. (The paper's C2D also pools over time between its
stages; here only the mean at the end does, so that without blocks the network is `FrameAverage`.)
"""

from nlutils.torch.models.small.c3d import C3DSmall

__all__ = ["C2DSmall"]


class C2DSmall(C3DSmall):
    """(B, C, T, H, W) -> (B, num_classes): `C3DSmall` with 1x3x3 kernels and 1x2x2 pooling; options as there.

    Without blocks it computes what `FrameAverage` computes with the same weights, which
    `inflate_weights(trained.state_dict(), model, rename=model.place_of)` brings in, and it starts from the
    same random ones. Only the blocks that `non_local`, `kind` and `block` put in look from frame to frame.
    Those of kind "non_local", "compact_generalized", "uniform" and "constant" do not know the order of
    frames, so with them the network does not either.
    """

    TIME = 1
    TIME_POOL = 1
