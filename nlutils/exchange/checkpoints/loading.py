"""Published checkpoints read into our networks, and our weights written by published names."""

import copy

import numpy as np

from nlutils.exchange.checkpoints.key_schemes import (
    SCHEMES,
    block_names,
    block_prefix,
    find_scheme,
    published_name,
)
from nlutils.exchange.checkpoints.reading import numbers, read_checkpoint, shape_of
from nlutils.exchange.checkpoints.report import CheckpointReport, notes
from nlutils.exchange.checkpoints.shapes import cure, ours_from, same_but_for_ones, shape_from, theirs_from
from nlutils.exchange.frameworks import as_array, to_arrays
from nlutils.exchange.published import from_published, to_published

__all__ = ["load_checkpoint", "to_checkpoint"]

_COUNT = "num_batches_tracked"
_STATISTICS = ("running_mean", "running_var")
_LAST_LAYER = ("classifier.", "logits.")


def load_checkpoint(source, model, *, scheme=None, classifier=True, report=print) -> CheckpointReport:
    """Write the weights of a published checkpoint into a PyTorch network of ours, in place.

    source      path of a file, or the dict in it, see `read_checkpoint`
    model       `C2D` or `I3D`, whose options say where non-local blocks are and how they compute, or
                `I3DInception`; of two streams each is read by itself (model.rgb, model.flow)
    scheme      one of `SCHEMES`; None: told by the names
    classifier  False leaves the model's last layer as it is: for other classes
    report      is called with the result as text; None: nobody is told

    Returns a `CheckpointReport`: what was loaded, what the file lacks or has too much, which `layout` its
    network has. A non-local block is read whole or, where the file has none at this place, listed as missing.
    Counts of batches are taken where they are, and not listed where they are not.

    Raises ValueError, and then nothing was written: for a file that cannot be read, names of no known scheme
    or of another network, and for weights that do not fit, with both shapes and what to do; for options of a
    non-local block that the published code does not have.
    """
    checkpoint = read_checkpoint(source)
    scheme, prefix = find_scheme(checkpoint.weights, scheme)
    found = {key.removeprefix(prefix): value for key, value in checkpoint.weights.items()}
    _check_pool2(scheme, found)
    state = _state(model, scheme)
    skipped = tuple(name for name in state if not classifier and name.startswith(_LAST_LAYER))

    reading = _Reading(model, scheme, found)
    for name in _outside_blocks(state):
        if name not in skipped:
            reading.add(name)
    for block, place in block_names(state).items():
        reading.add_block(block, block_prefix(scheme, place))
    reading.check()
    _write(state, reading.values)

    passed = reading.used | {published_name(name, scheme) for name in skipped}
    left = [key for key in found if key not in passed]
    ignored = [key for key in left if _is_no_weight(key, scheme)]
    result = CheckpointReport(
        scheme=scheme,
        source=checkpoint.source,
        loaded=tuple(name for name in reading.values if name not in reading.assumed),
        assumed=tuple(reading.assumed),
        missing=tuple(reading.missing),
        unexpected=tuple(key for key in left if not _is_no_weight(key, scheme)),
        ignored=(*ignored, *checkpoint.others),
        skipped=skipped,
        notes=notes(scheme, checkpoint.source, found, model, frozen=reading.frozen),
    )
    if report is not None:
        report(str(result))
    return result


def to_checkpoint(model, scheme: str) -> dict[str, np.ndarray]:
    """The weights of a PyTorch network of ours as new NumPy arrays by the names of a published code.

    scheme  one of `SCHEMES`. Where conv1 sees one frame, "mmaction2" has the 2D kernels of its C2D; "i3d_tf"
            has TensorFlow's order of axes

    Weights in bfloat16 become float32; PyTorch's counts of batches are written where the code has PyTorch.
    Raises ValueError that names what the published code has no place for: a network of another family, blocks
    that it does not have, a bias (`nlutils.exchange.fold_bias` moves that of W_z) or a gain that is not 1.
    """
    state = _state(model, scheme)
    blocks = block_names(state)
    written, homeless = {}, []
    for name in _outside_blocks(state):
        array, key = as_array(state[name]).copy(), published_name(name, scheme)
        if key is not None:
            written[key] = theirs_from(array, name, scheme, model)
        elif not name.endswith(_COUNT) and not (name.endswith("norm.weight") and (array == 1).all()):
            homeless.append(name)
    homeless += [block for block, place in blocks.items() if block_prefix(scheme, place) is None]
    if homeless:
        raise ValueError(f"scheme={scheme!r} has no place for {', '.join(homeless)}")
    for block, place in blocks.items():
        try:
            written |= to_published(model.get_submodule(block), scheme, block_prefix(scheme, place)[0])
        except ValueError as error:
            raise ValueError(f"{block}: {error}") from None
    return written


class _Reading:
    """What the weights of a file come to in one model, gathered before anything is written.

    values   array of each of our names; those in `assumed` follow from what the published code does not have
    missing  our names that the file should have
    used     keys of the file that were looked at
    frozen   there are norms without statistics
    """

    def __init__(self, model, scheme, found):
        self.model, self.scheme, self.found = model, scheme, found
        self.state = model.state_dict()
        self.values, self.assumed, self.missing, self.used = {}, [], [], set()
        self.frozen = False
        self.faults, self.cures = [], {}  # a dict for its order

    def add(self, name):
        """Look for one weight that is of no non-local block."""
        key, needed = published_name(name, self.scheme), tuple(self.state[name].shape)
        if key in self.found:
            self.used.add(key)
            array = self._numbers(key, name, needed)
            if array is not None:
                self.values[name] = array
        elif (value := self._convention(name)) is not None:
            self.values[name] = np.full(needed, value, np.float32)
            self.assumed.append(name)
        elif not name.endswith(_COUNT):
            self.missing.append(name)
        if name.endswith(".norm.bias") and f"{name.removesuffix('bias')}weight" not in self.state:
            self._drop_gain(name.removesuffix(".bias"))

    def add_block(self, name, start):
        """Read a non-local block whole; `start` as from `block_prefix`."""
        keys = [key for key in self.found if start and key.startswith("".join(start))]
        block = self.model.get_submodule(name)
        if not keys:
            self.missing += [f"{name}.{part}" for part in to_arrays(block)]
            return
        self.used.update(key for key in keys if key.endswith(_COUNT) or not _is_no_weight(key, self.scheme))
        trial = copy.deepcopy(block).cpu()
        try:
            from_published(trial, self.found | self._block_numbers(trial, start[0]), self.scheme, start[0])
        except ValueError as error:
            self.faults.append(f"{name}: {error}")
            return
        counted = any(key.endswith(_COUNT) for key in keys)
        for part, tensor in trial.state_dict().items():
            if counted or not part.endswith(_COUNT):
                self.values[f"{name}.{part}"] = as_array(tensor)
        endings = tuple(key.removeprefix("".join(start)) for key in keys)
        if self.scheme == "mmaction2" and "conv_out.conv.bias" not in endings:
            self.assumed.append(f"{name}.w_z.bias")
        elif self.scheme == "caffe2" and "bn_s" in endings and "bn_rm" not in endings:
            self.assumed += [f"{name}.norm.{kind}" for kind in _STATISTICS]

    def check(self):
        """Raise ValueError for what does not fit, and when nothing was found."""
        if self.faults:
            more = len(self.faults) - 8
            faults = "; ".join(self.faults[:8]) + (f"; and {more} more" if more > 0 else "")
            cures = "".join(f". {cure[0].upper()}{cure[1:]}" for cure in self.cures)
            raise ValueError(
                f"the weights, named as in {self.scheme!r}, do not fit the model: {faults}{cures}"
            )
        if not self.values:
            raise ValueError(f"the file has names as in {self.scheme!r}, but no weight of the model")

    def _numbers(self, key, name, needed):
        """The file's `key` for the model's `name`; None where it does not fit, which becomes a fault."""
        value = self.found[key]
        try:
            # The shape first, because a few bytes can say that they are a tensor of any size.
            shape = shape_from(shape_of(value, key), name, self.scheme)
            if same_but_for_ones(shape, needed):
                array = _in_range(numbers(value, key), key, self.state[name].dtype)
                return ours_from(array, name, self.scheme).reshape(needed)
        except ValueError as error:
            self.faults.append(str(error))
            return None
        self.faults.append(f"{key} has shape {shape}, the model's {name} {needed}")
        self.cures[cure(name, shape, needed)] = True
        return None

    def _block_numbers(self, block, prefix):
        """A non-local block's weights by the file's names, as far as their shapes fit; `block` is emptied."""
        import torch  # here and below, so that reading files and names needs no PyTorch

        for tensor in block.state_dict().values():
            tensor.zero_()  # a bias that the format does not have must be 0
        values = {}
        for key, array in to_published(block, self.scheme, prefix).items():
            if key in self.found and shape_of(self.found[key], key) == array.shape:
                dtype = getattr(torch, array.dtype.name)
                values[key] = _in_range(numbers(self.found[key], key), key, dtype)
        return values

    def _has(self, layer, kind):
        return published_name(f"{layer}.{kind}", self.scheme) in self.found

    def _convention(self, name):
        """The value of what the published network does not have; None: the file should have it."""
        layer, _, kind = name.rpartition(".")
        if not layer.endswith("norm") or not self._has(layer, "bias"):
            return None
        if kind == "weight" and published_name(name, self.scheme) is None:
            return 1.0
        has_statistics = any(self._has(layer, statistic) for statistic in _STATISTICS)
        if self.scheme != "caffe2" or kind not in _STATISTICS or has_statistics:
            return None
        # A frozen scale and shift, as in `from_published`: sqrt(variance + epsilon) is 1.
        self.frozen = True
        return 0.0 if kind == "running_mean" else 1.0 - self.model.get_submodule(layer).eps

    def _drop_gain(self, layer):
        """A model without gains computes the same only where they are 1."""
        name, needed = f"{layer}.bias", tuple(self.state[f"{layer}.bias"].shape)
        key = published_name(f"{layer}.weight", self.scheme)
        if key in self.found:
            self.used.add(key)
            array = self._numbers(key, name, needed)
            if array is not None and (array != 1).any():
                self.faults.append(f"{key} is not 1, and the model's {layer} has no gain")
                self.cures["make the model with norm_gain=True"] = True


def _state(model, scheme):
    """The model's tensors by name; ValueError when the scheme is of other networks."""
    state = model.state_dict()
    if not any(published_name(name, scheme) for name in state if not name.startswith(_LAST_LAYER)):
        networks = {"resnet": "a C2D or I3D", "inception": "an I3DInception, or of one stream"}
        raise ValueError(
            f"the names of {scheme!r} are those of {networks[SCHEMES[scheme].network]}; "
            f"the model is a {type(model).__name__}"
        )
    if any(tensor.is_meta for tensor in state.values()):
        raise ValueError('the model is on the device "meta", where it has no numbers; make it on "cpu"')
    return state


def _outside_blocks(state):
    """The names that are of no non-local block."""
    blocks = tuple(f"{block}." for block in block_names(state))
    return [name for name in state if not name.startswith(blocks)]


def _check_pool2(scheme, found):
    """pytorchvideo counts the pool behind res2 among its blocks, and its Slow networks have none."""
    if scheme == "pytorchvideo" and any(key.startswith("blocks.2.") for key in found):
        raise ValueError(
            "the file is of a network without a pool behind res2, as pytorchvideo's slow_r50: blocks.2 has "
            "weights. C2D and I3D compute something else; take the file of c2d_r50 or i3d_r50"
        )


def _is_no_weight(key, scheme):
    keys = SCHEMES[scheme]
    return key in keys.no_weights or key.endswith(keys.ending)


def _in_range(array, key, dtype):
    """`array`, or ValueError when rounding to `dtype`, the model's, would make other numbers of it."""
    import torch

    limits = torch.finfo(dtype) if dtype.is_floating_point else torch.iinfo(dtype)
    if array.size and not limits.min <= array.min().item() <= array.max().item() <= limits.max:
        raise ValueError(f"{key} has numbers too large for the model's {dtype}")
    if not dtype.is_floating_point and (array != np.trunc(array)).any():
        raise ValueError(f"{key} is a count, and has fractions")
    return array


def _write(state, values):
    """Into the model's own memory, which `state` shares."""
    import torch

    # All of them first: a fault in one must leave the others unwritten.
    tensors = {name: torch.tensor(value) for name, value in values.items()}
    with torch.no_grad():
        for name, tensor in tensors.items():
            state[name].copy_(tensor)
