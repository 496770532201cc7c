"""Operators that torch.compile and torch.export take as one piece and do not look into.

What an operator decides by size (how many rows at once, which samples together) it decides when it runs, also
in an exported program whose sizes are open. `torch.library.custom_op` is the shorter way to write this, but
its first call imports the compiler, which costs an eager user seconds and 70 MiB.
"""

import torch

__all__ = ["operator"]

_LIBRARY = torch.library.Library("nlutils", "FRAGMENT")


def operator(schema: str, *, fake, backward=None, keep=None):
    """Register the decorated function as torch.ops.nlutils.<name>, and return that operator.

    schema    "name(Tensor x, float scale) -> Tensor", as in torch.library.define
    fake      makes empty results of the right shapes, layouts and dtypes
    backward  (ctx, *gradients of the results) -> gradients of the arguments; keep(ctx, inputs, output) stores
              what it needs
    """
    name = schema.partition("(")[0]

    def register(function):
        _LIBRARY.define(schema)
        torch.library.impl(f"nlutils::{name}", "default", function, lib=_LIBRARY)
        torch.library.register_fake(f"nlutils::{name}", fake, lib=_LIBRARY)
        if backward is not None:
            torch.library.register_autograd(f"nlutils::{name}", backward, setup_context=keep, lib=_LIBRARY)
        return getattr(torch.ops.nlutils, name)

    return register
