"""Weights of the installed peers in our block, and back: is the output the same?

    python -m benchmarks.peers_weights

in the environment that benchmarks/README.md describes. Writes data/results/peers/weights.json; for each peer
block the largest difference between its output and ours on the same random weights, in float64 and evaluation
mode, and whether what our block writes by the peer's names equals, bit by bit, what it read.
"""

from itertools import product

import numpy as np
import torch

from benchmarks.peers import load_mmcv, load_pytorchvideo, load_timm
from benchmarks.records import provenance, write_cases
from nlutils.exchange import from_published, scale_theta, to_published
from nlutils.torch import NonLocalBlock

CHANNELS, INNER = 16, 8
SIZES = {1: (9,), 2: (6, 5), 3: (3, 6, 5)}


def mmcv_cases():
    """Four modes, three numbers of axes, with and without sub-sampling and norm."""
    modes = ("gaussian", "embedded_gaussian", "dot_product", "concatenation")
    for ndim, mode, sub_sample, norm in product((1, 2, 3), modes, (False, True), (False, True)):
        peer = getattr(load_mmcv(), f"NonLocal{ndim}d")(
            CHANNELS, sub_sample=sub_sample, norm_cfg={"type": f"BN{ndim}d"} if norm else None, mode=mode
        )
        ours = NonLocalBlock(
            CHANNELS,
            INNER,
            ndim=ndim,
            instantiation=mode,
            subsample="after" if sub_sample else None,
            scale=mode == "embedded_gaussian",  # mmcv's use_scale=True, which it looks at in this mode only
            norm=norm,
        )
        form = f"{mode}, sub_sample={sub_sample}, norm={norm}"
        yield f"mmcv.NonLocal{ndim}d", form, "mmcv", peer, ours, 1.0


def pytorchvideo_cases():
    """Two instantiations, with and without pooling and norm."""
    create = load_pytorchvideo().create_nonlocal
    names = {"softmax": "embedded_gaussian", "dot_product": "dot_product"}
    for mode, pool, norm in product(names, (False, True), (False, True)):
        peer = create(
            dim_in=CHANNELS,
            dim_inner=INNER,
            pool_size=(1, 2, 2) if pool else None,
            instantiation=mode,
            norm=torch.nn.BatchNorm3d if norm else None,
        )
        ours = NonLocalBlock(
            CHANNELS,
            INNER,
            instantiation=names[mode],
            subsample="before" if pool else None,
            scale=mode == "softmax",
            norm=norm,
        )
        form = f"{mode}, pool={pool}, norm={norm}"
        yield "pytorchvideo.NonLocal", form, "pytorchvideo", peer, ours, 1.0


def timm_cases():
    """With and without timm's own scale, in_channels to the power -1/2, which goes into W_theta."""
    channels = 128  # timm rounds the inner channels to multiples of 8
    for use_scale, ratio in product((False, True), (8, 2)):
        peer = load_timm().NonLocalAttn(channels, use_scale=use_scale, rd_ratio=1 / ratio)
        ours = NonLocalBlock(channels, channels // ratio, ndim=2)
        factor = channels**-0.5 if use_scale else 1.0
        yield "timm.NonLocalAttn", f"use_scale={use_scale}, rd_ratio=1/{ratio}", "timm", peer, ours, factor


@torch.no_grad()
def compare(layout, peer, ours, factor, seed):
    """The largest difference of the outputs, the largest |z - x|, and "exact" where the way back is."""
    peer, ours = peer.double().eval(), ours.double().eval()
    draw = torch.Generator().manual_seed(seed)
    for name, tensor in peer.state_dict().items():
        if tensor.is_floating_point():
            low = 0.5 if name.endswith("running_var") else -1.0
            tensor.copy_(low + 2 * torch.rand(tensor.shape, generator=draw, dtype=torch.float64))
        else:
            tensor.fill_(seed)  # the count of batches

    state = {name: tensor.clone() for name, tensor in peer.state_dict().items()}
    from_published(ours, state, layout)
    written = to_published(ours, layout)
    exact = written.keys() == state.keys() and all(
        np.array_equal(written[name], tensor.numpy()) for name, tensor in state.items()
    )
    peer.load_state_dict({name: torch.from_numpy(array) for name, array in written.items()}, strict=True)
    if factor != 1:
        scale_theta(ours, factor)

    channels = ours.in_channels
    x = torch.rand((2, channels, *SIZES[ours.ndim]), generator=draw, dtype=torch.float64) - 0.5
    z = peer(x)
    return {
        "difference": float((ours(x) - z).abs().max()),
        "largest_update": float((z - x).abs().max()),
        "back": "exact" if exact else "not exact",
    }


def main():
    """Run all cases, print the worst of each peer, write the record."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    cases = []
    for number, (peer_name, form, layout, *rest) in enumerate(
        (*mmcv_cases(), *pytorchvideo_cases(), *timm_cases())
    ):
        cases.append({"peer": peer_name, "form": form, **compare(layout, *rest, seed=number + 1)})
    for name in dict.fromkeys(case["peer"] for case in cases):
        of_peer = [case for case in cases if case["peer"] == name]
        worst = max(case["difference"] for case in of_peer)
        back = sum(case["back"] == "exact" for case in of_peer)
        print(
            f"{name:22} {len(of_peer):2} blocks, largest difference {worst:.1e}, {back} exact on the way back"
        )
    write_cases("weights", provenance("torch"), cases)


if __name__ == "__main__":
    main()
