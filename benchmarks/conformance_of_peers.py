"""Run `nlutils.conformance.check` over other packages' non-local blocks and ours, and record the reports.

    build/peers/bin/python benchmarks/conformance_of_peers.py     # mmcv-lite, pytorchvideo, timm
    .venv/bin/python benchmarks/conformance_of_peers.py --ours    # nlutils, in PyTorch and in Keras

README.md says how to make the peers' environment. One file a block, data/results/conformance/<name>.json;
`nlutils.conformance.read_recorded` reads them. Takes a minute.
"""

import argparse
import platform
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import numpy as np
import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from benchmarks import peers  # noqa: E402
from nlutils import __version__  # noqa: E402
from nlutils.conformance import Record, check, code_digest, write_record  # noqa: E402
from nlutils.instantiations import INSTANTIATIONS  # noqa: E402
from nlutils.origin import commit  # noqa: E402

SIZES = {1: (24,), 2: (6, 8), 3: (4, 4, 6)}
WIDE_SIZES = {2: (14, 14), 3: (4, 7, 7)}
CHANNELS, WIDE = 16, 1024  # what half precision bears shows in the wide ones


@dataclass(frozen=True)
class Peer:
    """One block to check: how it is made, on which maps (channels first), and where its weights are."""

    name: str
    library: str
    module: str
    make: Callable
    arguments: dict
    ndim: int
    weights: dict | None = None
    channels: int = CHANNELS
    versions: tuple = field(default=("torch",))


def mmcv_lite():
    """NonLocal1d, 2d, 3d; four modes; sub-sampled or not; once with batch normalisation."""
    for ndim in (1, 2, 3):
        for mode in INSTANTIATIONS:
            for sub_sample in (False, True):
                yield _mmcv(ndim, {"mode": mode, "sub_sample": sub_sample})
    yield _mmcv(3, {"mode": "embedded_gaussian", "sub_sample": True, "norm_cfg": {"type": "BN3d"}})
    for mode in INSTANTIATIONS:
        yield _mmcv(3, {"mode": mode, "sub_sample": False}, WIDE)


def _mmcv(ndim, arguments, channels=CHANNELS):
    sub_sample, mode = arguments["sub_sample"], arguments["mode"]
    # Sub-sampling wraps phi and g in (layer, pool).
    inside = ".0.conv" if sub_sample else ".conv"
    weights = {"g": f"g{inside}", "w_z": "conv_out.conv"}
    if mode != "gaussian":
        weights |= {"theta": "theta.conv", "phi": f"phi{inside}"}
    if mode == "concatenation":
        weights["w_f"] = "concat_project.conv"
    if "norm_cfg" in arguments:
        weights["norm"] = "conv_out.bn"
    kind = f"NonLocal{ndim}d"
    suffix = "-subsampled" * sub_sample + "-norm" * ("norm_cfg" in arguments) + "-wide" * (channels == WIDE)
    return Peer(
        f"mmcv-{kind}-{mode}{suffix}",
        "mmcv-lite",
        f"mmcv.cnn.{kind}",
        lambda **options: getattr(peers.load_mmcv(), kind)(**options),
        {"in_channels": channels, **arguments},
        ndim,
        weights,
        channels,
    )


def pytorchvideo():
    """Softmax and dot product, with and without pooling."""
    parts = {"theta": "conv_theta", "phi": "conv_phi", "g": "conv_g", "w_z": "conv_out", "norm": "norm"}
    for instantiation in ("softmax", "dot_product"):
        for pool_size, channels in ((None, CHANNELS), ((1, 2, 2), CHANNELS), (None, WIDE)):
            suffix = "-pooled" * bool(pool_size) + "-wide" * (channels == WIDE)
            yield Peer(
                f"pytorchvideo-NonLocal-{instantiation}{suffix}",
                "pytorchvideo",
                "pytorchvideo.layers.nonlocal_net.create_nonlocal",
                lambda **options: peers.load_pytorchvideo().create_nonlocal(**options),
                {
                    "dim_in": channels,
                    "dim_inner": channels // 2,
                    "instantiation": instantiation,
                    "pool_size": pool_size,
                },
                3,
                parts,
                channels,
            )


def timm():
    """NonLocalAttn with its default width (an eighth), with and without scale."""
    cases = ((64, True, ""), (64, False, "-unscaled"), (WIDE, True, "-wide"))
    parts = {"theta": "t", "phi": "p", "g": "g", "w_z": "z", "norm": "norm"}
    for channels, use_scale, suffix in cases:
        yield Peer(
            f"timm-NonLocalAttn{suffix}",
            "timm",
            "timm.layers.NonLocalAttn",
            lambda **options: peers.load_timm().NonLocalAttn(**options),
            {"in_channels": channels, "use_scale": use_scale},
            2,
            parts,
            channels,
        )


def ours():
    """nlutils.torch.NonLocalBlock and nlutils.keras.NonLocalBlock, each instantiation, sub-sampled or not."""
    import keras

    import nlutils.keras
    import nlutils.torch

    def in_keras(**options):
        return nlutils.keras.NonLocalBlock(**options)

    for framework, make in (("torch", nlutils.torch.NonLocalBlock), ("keras", in_keras)):
        for instantiation in INSTANTIATIONS:
            for subsample, channels in ((None, CHANNELS), ("before", CHANNELS), (None, WIDE)):
                suffix = "-before" * bool(subsample) + "-wide" * (channels == WIDE)
                yield Peer(
                    f"nlutils-{framework}-{instantiation}{suffix}",
                    "nlutils",
                    f"nlutils.{framework}.NonLocalBlock",
                    make,
                    {"in_channels": channels, "instantiation": instantiation, "subsample": subsample},
                    3,
                    channels=channels,
                    versions=("torch",) if framework == "torch" else ("keras", _backend_package(keras)),
                )


def _backend_package(keras):
    return {"tensorflow": "tensorflow-cpu"}.get(keras.backend.backend(), keras.backend.backend())


def example(peer: Peer) -> np.ndarray:
    """Maps that `peer` takes."""
    size = (WIDE_SIZES if peer.channels == WIDE else SIZES)[peer.ndim]
    if peer.module.startswith("nlutils.keras"):
        return np.zeros((2, *size, peer.channels), np.float32)
    return np.zeros((2, peer.channels, *size), np.float32)


def record(peer: Peer) -> Record:
    """Make the block, check it, and say where the report comes from."""
    torch.manual_seed(0)
    maps = example(peer)
    report = check(peer.make(**peer.arguments), maps, peer.weights)
    return Record(
        peer.name,
        peer.library,
        __version__ if peer.library == "nlutils" else version(peer.library),
        peer.module,
        peer.arguments,
        maps.shape,
        report,
        provenance(peer),
    )


def provenance(peer: Peer) -> dict:
    """Date, our commit and whether the package differed from it, the suite's digest, versions."""
    versions = {"python": platform.python_version(), "numpy": np.__version__}
    for name in peer.versions:
        try:
            versions[name] = version(name)
        except PackageNotFoundError:
            versions[name] = None
    return {
        "date": datetime.now(UTC).date().isoformat(),
        **commit("nlutils"),
        "code": code_digest(),
        "versions": versions,
    }


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--ours", action="store_true", help="our blocks instead of the peers'")
    parser.add_argument("--out", help="folder to write to; default: data/results/conformance")
    parser.add_argument("--print", action="store_true", help="print every report whole")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    groups = (ours,) if arguments.ours else (mmcv_lite, pytorchvideo, timm)
    for peer in (peer for group in groups for peer in group()):
        done = record(peer)
        write_record(done, arguments.out)
        faults = "; ".join(done.report.faults) or "nothing wrong"
        print(done.report if arguments.print else f"{peer.name}: {faults}", flush=True)


if __name__ == "__main__":
    main()
