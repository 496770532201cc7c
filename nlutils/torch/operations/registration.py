"""Operators that torch.compile and torch.export take as one piece and do not look into.

What an operator decides by size (how many rows at once, which samples together) it decides when it runs, also
in an exported program whose sizes are open. `torch.library.custom_op` is the shorter way to write this, but
its first call imports the compiler, which costs an eager user seconds and 70 MiB.
"""

import torch
from torch.utils.flop_counter import register_flop_formula

__all__ = ["operator"]

_LIBRARY = torch.library.Library("nlutils", "FRAGMENT")


def operator(schema: str, *, fake, backward=None, keep=None, flops=None):
    """Register the decorated function as torch.ops.nlutils.<name>, and return that operator.

    schema    "name(Tensor x, float scale) -> Tensor", as in torch.library.define
    fake      makes empty results of the right shapes, layouts and dtypes
    backward  (ctx, *gradients of the results) -> gradients of the arguments; keep(ctx, inputs, output) stores
              what it needs. None: an operator that is a backward pass itself; differentiating it is an error
    flops     (*arguments, tensors as shapes) -> the operations of its matrix products, two a multiply-add,
              for torch.utils.flop_counter, which sees none of them inside. None: it has no matrix product
    """
    name = schema.partition("(")[0]

    def once(ctx, *gradients):
        raise RuntimeError(
            f"nlutils::{name} is a gradient, and has none itself. What can be differentiated twice is "
            "'dot_product' and, in float32 or float64 with a map of at most 32 MiB, the two softmax forms"
        )

    def register(function):
        _LIBRARY.define(schema)
        torch.library.impl(f"nlutils::{name}", "default", function, lib=_LIBRARY)
        torch.library.register_fake(f"nlutils::{name}", fake, lib=_LIBRARY)
        # Without a formula, a second derivative would be taken of the loops inside, tile by tile kept.
        torch.library.register_autograd(
            f"nlutils::{name}", backward or once, setup_context=keep, lib=_LIBRARY
        )
        registered = getattr(torch.ops.nlutils, name)
        if flops is not None:
            register_flop_formula(registered)(lambda *arguments, out_shape=None: flops(*arguments))
        return registered

    return register
