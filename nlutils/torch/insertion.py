"""Non-local blocks put into a network that somebody else wrote.

Wang, Girshick, Gupta, He: Non-local Neural Networks, CVPR 2018, section 3.3: a block can stand after any
layer, because it starts as the identity.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from nlutils.insertions import Insertion, Insertions, check_names
from nlutils.torch.blocks import NonLocalBlock

__all__ = ["insert_non_local"]

_CHILD = "non_local"


def insert_non_local(model: nn.Module, example_input, after: Sequence[str], **block_options) -> Insertions:
    """Put a `NonLocalBlock` after each module of `model` that `after` names; the model is changed in place.

    example_input  what model(...) takes: a tensor, or a tuple of arguments. The model runs twice on it, in
                   evaluation mode and without gradients: to see the channels and sizes of the maps, and to
                   see that the blocks run
    after          names as in model.named_modules(): "layer2.1"
    block_options  go to `NonLocalBlock`; ndim and in_channels come from the maps

    The block becomes the child "non_local" of the module, called on what the module returns. The keys of the
    weights that were there stay as they were, so a state_dict of the old model still loads with
    strict=False, and the block's keys begin with "layer2.1.non_local.". With the default options the model
    computes at first what it did before. The parameters are new: give them to the optimiser.

    Returns the insertions, in the order of `after`; printed, they are a table. Raises ValueError for a name
    that matches nothing, that is named twice, that has a block already, that does not run, or whose output is
    not a map (B, C, N), (B, C, H, W) or (B, C, T, H, W), or which calls its children in a loop of its own;
    then nothing was inserted.
    """
    modules = _find(model, after)
    outputs = _record(model, example_input, modules)
    maps = {name: _one_map(name, output) for name, output in outputs.items()}
    blocks = {name: _block(name, maps[name], block_options) for name in modules}
    hooks = []
    for name, module in modules.items():
        module.register_module(_CHILD, blocks[name].train(module.training))
        if not _calls_its_children(module):
            hooks.append(module.register_forward_hook(_apply))
    try:
        _check_runs(model, example_input, modules, blocks, outputs)
    except BaseException:
        for hook in hooks:
            hook.remove()
        for module in modules.values():
            delattr(module, _CHILD)
        raise
    return Insertions(
        Insertion(
            name,
            block.in_channels,
            tuple(maps[name].shape[2:]),
            sum(parameter.numel() for parameter in block.parameters()),
        )
        for name, block in blocks.items()
    )


def _apply(module, arguments, output):
    """The forward hook: a function of the module alone, so copies and saved models keep working."""
    return getattr(module, _CHILD)(output)


def _calls_its_children(module):
    """A Sequential does, one after the other; not one of its subclasses that has a forward of its own."""
    return type(module).forward is nn.Sequential.forward and "forward" not in vars(module)


def _check_runs(model, example_input, modules, blocks, outputs):
    """Run the model again: each block must run as often as its module did."""
    try:
        runs = _record(model, example_input, blocks)
    except Exception as error:
        raise ValueError(f"after: with its blocks the model does not run any more: {error}") from error
    for name, module in modules.items():
        if len(runs[name]) != len(outputs[name]):
            raise ValueError(
                f"after: {name!r} ran {len(outputs[name])} times, but its block {len(runs[name])} times: "
                f"{type(module).__name__} calls its children in its own way; name one of them"
            )


def _find(model, after):
    modules = dict(model.named_modules(remove_duplicate=False))
    found = {name: modules[name] for name in check_names(after, modules, where="model.named_modules()")}
    for name, module in found.items():
        if hasattr(module, _CHILD):
            raise ValueError(f"after: {name!r} has a child {_CHILD!r} already; leave it out")
    if len({id(module) for module in found.values()}) < len(found):
        raise ValueError(f"after={list(found)}: two of these names are one shared module; name it once")
    return found


def _record(model, example_input, modules):
    """What each module returns when the model runs once on the example."""
    outputs = {name: [] for name in modules}
    hooks = [
        module.register_forward_hook(lambda _, __, output, name=name: outputs[name].append(output))
        for name, module in modules.items()
    ]
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        with torch.no_grad():
            model(*example_input) if isinstance(example_input, tuple) else model(example_input)
    finally:
        for hook in hooks:
            hook.remove()
        for module in training:
            module.training = True
    return outputs


def _one_map(name, outputs):
    if not outputs:
        raise ValueError(f"after: {name!r} did not run when the model was given example_input; leave it out")
    for output in outputs:
        if not isinstance(output, Tensor) or not 3 <= output.ndim <= 5 or not output.is_floating_point():
            what = tuple(output.shape) if isinstance(output, Tensor) else type(output).__name__
            raise ValueError(
                f"after: {name!r} returns {what}; a block needs one map of the axes (B, C, N), (B, C, H, W) "
                "or (B, C, T, H, W)"
            )
        if output.shape[1] != outputs[0].shape[1] or output.ndim != outputs[0].ndim:
            raise ValueError(
                f"after: {name!r} runs {len(outputs)} times, with maps "
                f"{[tuple(one.shape) for one in outputs]}; one block cannot follow them all"
            )
    return outputs[0]


def _block(name, output, options):
    fixed = {"in_channels", "ndim"} & set(options)
    if fixed:
        raise ValueError(f"{sorted(fixed)[0]} is read off the map behind {name!r}; leave it out")
    block = NonLocalBlock(output.shape[1], ndim=output.ndim - 2, **options)
    return block.to(device=output.device, dtype=output.dtype)
