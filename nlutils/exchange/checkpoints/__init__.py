"""Published checkpoints of whole networks, read into ours and written by their names.

    from nlutils.exchange.checkpoints import load_checkpoint
    model = create_model("i3d", 400, layout="released", clip="8x8", non_local=5)
    load_checkpoint("i3d_nonlocal_8x8_IN_pretrain_400k.pkl", model)

It prints what was loaded, what the file lacked or had too much, and which `layout` the file is for.
`PUBLISHED` lists the files, with the options of the network that reads each. No code in a file runs.

2D weights by published names, as of video-nonlocal-net's ImageNet files, are inflated into a 3D network by

    names = {published_name(name, "caffe2"): name for name in model.state_dict()}
    weights = read_checkpoint("r50_pretrain_c2_model_iter450450_clean.pkl").weights
    inflate_weights(weights, model, rename=lambda key: names.get(key, key), skip=["classifier"])
"""

from nlutils.exchange.checkpoints.key_schemes import SCHEMES, find_scheme, published_name
from nlutils.exchange.checkpoints.loading import load_checkpoint, to_checkpoint
from nlutils.exchange.checkpoints.reading import Checkpoint, read_checkpoint
from nlutils.exchange.checkpoints.report import CheckpointReport
from nlutils.exchange.checkpoints.zoo import PUBLISHED, PublishedFile

__all__ = [
    "PUBLISHED",
    "SCHEMES",
    "Checkpoint",
    "CheckpointReport",
    "PublishedFile",
    "find_scheme",
    "load_checkpoint",
    "published_name",
    "read_checkpoint",
    "to_checkpoint",
]
