"""Non-local blocks put into a Keras model that somebody else wrote.

Wang, Girshick, Gupta, He: Non-local Neural Networks, CVPR 2018, section 3.3: a block can stand after any
layer, because it starts as the identity.
"""

from collections.abc import Sequence

import keras

from nlutils.insertions import Insertion, Insertions, check_names
from nlutils.keras.blocks import NonLocalBlock

__all__ = ["insert_non_local"]


def insert_non_local(
    model: keras.Model, after: Sequence[str], **block_options
) -> tuple[keras.Model, Insertions]:
    """A model with a `NonLocalBlock` after each layer of `model` that `after` names.

    model          a functional or a Sequential model; one that is written as a class has no graph to insert
                   into
    after          names as in [layer.name for layer in model.layers]
    block_options  go to `NonLocalBlock`; ndim and in_channels come from the layer's output

    Keras' models do not change after they are made, so a new one is returned. Its layers, but for the blocks
    ("<name>_non_local"), are those of `model`: training one trains the other. With the default options it
    computes at first what `model` does. Compile it before training.

    Returns (the new model, the insertions in the order of `after`); printed, the insertions are a table.
    Raises ValueError for a name that matches nothing or is named twice, a layer whose output is not one map
    (B, *size, C), or a model without a graph.
    """
    if not isinstance(model, keras.Sequential) and not getattr(model, "inputs", None):
        raise ValueError(
            f"model {model.name!r} is a {type(model).__name__} without a graph of layers; insert into a "
            "functional or Sequential model, or call NonLocalBlock where the class calls its layers"
        )
    graph = _functional(model)
    layers = {layer.name: layer for layer in graph.layers if not isinstance(layer, keras.layers.InputLayer)}
    names = check_names(after, layers, where="[layer.name for layer in model.layers]")
    blocks = {name: _block(layers[name], block_options) for name in names}

    def call(layer, *arguments, **keywords):
        output = layer(*arguments, **keywords)
        return blocks[layer.name](output) if layer.name in blocks else output

    result = keras.models.clone_model(graph, clone_function=lambda layer: layer, call_function=call)
    for name, block in blocks.items():
        if block not in result.layers:
            raise ValueError(f"after: the block behind {name!r} is not part of the new model; leave it out")
    return result, Insertions(
        Insertion(name, block.in_channels, tuple(layers[name].output.shape[1:-1]), block.count_params())
        for name, block in blocks.items()
    )


def _functional(model):
    if not isinstance(model, keras.Sequential):
        return model
    if not model.built:
        raise ValueError(
            f"model {model.name!r} does not know its input yet; begin it with keras.Input, or call it once"
        )
    return keras.Model(model.inputs, model.outputs, name=model.name)


def _block(layer, options):
    fixed = {"in_channels", "ndim", "name"} & set(options)
    if fixed:
        raise ValueError(f"{sorted(fixed)[0]} is set for the layer {layer.name!r}; leave it out")
    output = layer.output
    if isinstance(output, list | tuple) or not 3 <= len(output.shape) <= 5 or output.shape[-1] is None:
        shape = [one.shape for one in output] if isinstance(output, list | tuple) else output.shape
        raise ValueError(
            f"after: the layer {layer.name!r} returns {shape}; a block needs one map of the axes (B, N, C), "
            "(B, H, W, C) or (B, T, H, W, C)"
        )
    block = NonLocalBlock(
        output.shape[-1], ndim=len(output.shape) - 2, name=f"{layer.name}_non_local", **options
    )
    block.build(output.shape)
    return block
