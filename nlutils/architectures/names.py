"""Names of layers: PyTorch's path of a module, and what Keras can call the same layer.

Keras on the PyTorch backend takes no dot in a layer's name. The names of modules are Python names, which have
no hyphen; so the hyphen stands for the dot, and the way back is unique: "stages.0.1.a.conv" is the layer
"stages-0-1-a-conv".
"""

__all__ = ["to_layer_name", "to_module_path"]


def to_layer_name(path: str) -> str:
    """The name of the Keras layer for the PyTorch module at `path`."""
    return path.replace(".", "-")


def to_module_path(name: str) -> str:
    """The way back from `to_layer_name`."""
    return name.replace("-", ".")
