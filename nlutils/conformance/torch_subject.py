"""A PyTorch block as the checks see it: NumPy arrays in, NumPy arrays out, on a copy."""

import contextlib
import copy

import numpy as np
import torch
from torch import nn

from nlutils.conformance.subject import ROLES, NotRunnable, Subject, one_line

__all__ = ["TorchSubject"]


class TorchSubject(Subject):
    """A deep copy of a `torch.nn.Module` on the CPU in float64; in float32 where the block insists on it."""

    framework = "PyTorch"
    channels_last = False

    def __init__(self, block, example):
        self.original = block
        try:
            self.module = copy.deepcopy(block).cpu().double().eval()
        except RuntimeError as error:
            raise ValueError(
                f"{type(block).__name__} cannot be copied: {one_line(error)}; does it keep a tensor of its "
                "last forward pass? Give a fresh block"
            ) from error
        self.dtype = torch.float64
        self.take_example(np.asarray(torch.as_tensor(example).detach().cpu()))
        self._as_given = self._snapshot()
        self._settle_precision()

    def _settle_precision(self):
        x, errors = self.random_input(), []
        for self.dtype in (torch.float64, torch.float32):
            self.module.to(self.dtype)
            try:
                self.forward(x)
            except Exception as error:
                errors.append(error)
            else:
                break
        if len(errors) == 2:
            self.broken = f"raises {type(errors[0]).__name__}: {one_line(errors[0])}"
        self.module.load_state_dict(self._as_given)
        self._as_given = self._snapshot()

    @property
    def precision(self):
        return "float64" if self.dtype == torch.float64 else "float32"

    def _snapshot(self):
        return {name: tensor.detach().clone() for name, tensor in self.module.state_dict().items()}

    def reset(self):
        self.module.load_state_dict(self._as_given)

    def _tensors(self):
        return {
            name: tensor
            for name, tensor in self.module.state_dict(keep_vars=True).items()
            if torch.is_tensor(tensor) and tensor.is_floating_point()
        }

    def parameters(self):
        return [name for name, parameter in self.module.named_parameters() if parameter.requires_grad]

    def frozen(self):
        return [name for name, parameter in self.module.named_parameters() if not parameter.requires_grad]

    def running_means(self):
        return [name for name in self._tensors() if name.rpartition(".")[2] == "running_mean"]

    def variance_of(self, key):
        return key.removesuffix("mean") + "var"

    def get(self, key):
        return self._tensors()[key].detach().numpy().astype(np.float64)

    def set(self, arrays):
        tensors = self._tensors()
        with torch.no_grad():
            for key, array in arrays.items():
                tensors[key].copy_(torch.as_tensor(np.asarray(array), dtype=tensors[key].dtype))

    def forward(self, x, training=False):
        with torch.no_grad(), self._mode(training):
            return self._out(self.module(torch.tensor(x, dtype=self.dtype)))

    def alters_input(self, x):
        given = torch.tensor(x, dtype=self.dtype)
        with torch.no_grad(), self._mode(False):
            self.module(given)
        return not np.array_equal(given.numpy(), np.asarray(x).astype(given.numpy().dtype))

    def vjp(self, x, direction, training=False):
        named = {n: p for n, p in self.module.named_parameters() if p.requires_grad}
        # A clone is no leaf, as inside a network.
        leaf = torch.tensor(x, dtype=self.dtype, requires_grad=True)
        with self._mode(training), torch.enable_grad():
            z = self.module(leaf.clone())
            total = (self._tensor(z) * torch.tensor(direction, dtype=self.dtype)).sum()
            dx, *slopes = torch.autograd.grad(total, [leaf, *named.values()], allow_unused=True)
        arrays = (None if slope is None else slope.numpy().astype(np.float64) for slope in slopes)
        dx = np.zeros_like(x) if dx is None else dx.numpy().astype(np.float64)
        return dx, dict(zip(named, arrays, strict=True))

    def half(self, x):
        self.reset()
        try:
            self.module.half()
            with torch.no_grad(), self._mode(False):
                return self._out(self.module(torch.tensor(x, dtype=torch.float16)))
        except RuntimeError as error:
            if "not implemented for" in str(error):
                raise NotRunnable(f"PyTorch cannot run it in float16 here: {one_line(error)}") from error
            raise
        finally:
            self.module.to(self.dtype)
            self.reset()

    @contextlib.contextmanager
    def _mode(self, training):
        self.module.train(training)
        try:
            yield
        finally:
            self.module.eval()

    def _tensor(self, z):
        if not torch.is_tensor(z):
            raise TypeError(f"the block returns {type(z).__name__}, not one tensor")
        return z

    def _out(self, z):
        return self._tensor(z).detach().numpy().astype(np.float64)

    def norm_epsilon(self, role):
        return getattr(self._part(role), "eps", None)

    def call_norm(self, maps):
        with torch.no_grad():
            return self._part("norm")(torch.tensor(maps, dtype=self.dtype)).numpy().astype(np.float64)

    def _part(self, role):
        return self.module.get_submodule(self.places[role])

    # Where theta, phi, g, W_z are -----------------------------------------------------------------------

    def keys_of(self, role, value):
        path = self._path(role, value)
        tensors = self._tensors()
        if path in tensors:
            return path, {"weight": self._first_name(tensors, path)}
        try:
            part = self.module.get_submodule(path)
        except AttributeError:
            known = [name for name, _ in self.module.named_modules() if name] + list(tensors)
            raise self.no_such_place(role, path, known) from None
        inside = [
            (name, module)
            for name, module in part.named_modules()
            if isinstance(getattr(module, "weight", None), torch.Tensor)
            or isinstance(getattr(module, "running_mean", None), torch.Tensor)
        ]
        if len(inside) > 1:
            names = ", ".join(f"{path}.{name}" for name, _ in inside)
            raise ValueError(f"weights[{role!r}]={path!r} holds several layers; name one of {names}")
        if not inside:
            return path, {}
        place = ".".join(word for word in (path, inside[0][0]) if word)
        names = ("weight", "bias", "running_mean", "running_var")
        found = {name: f"{place}.{name}" for name in names if f"{place}.{name}" in tensors}
        return place, {name: self._first_name(tensors, key) for name, key in found.items()}

    def _first_name(self, tensors, key):
        """A shared tensor has several names; `named_parameters` knows the first."""
        return next(name for name, tensor in tensors.items() if tensor is tensors[key])

    def _path(self, role, value):
        if isinstance(value, str):
            return value
        if isinstance(value, nn.Parameter | torch.Tensor):
            found = [name for name, tensor in self.original.named_parameters() if tensor is value]
        elif isinstance(value, nn.Module):
            found = [name for name, module in self.original.named_modules() if module is value]
        else:
            raise TypeError(
                f"weights[{role!r}] is {type(value).__name__}; give a dotted path ('conv_out.conv'), "
                "a module or a parameter of the block"
            )
        if not found:
            raise ValueError(f"weights[{role!r}] is a {type(value).__name__} that is not in the block")
        return found[0]

    def own_places(self):
        parts = dict(self.module.named_children()) | dict(self.module.named_parameters(recurse=False))
        return {role: role for role in ROLES if role in parts}
