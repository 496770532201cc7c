"""The PyTorch side: each variant of a case as something that can be run, on a CPU or a GPU."""

import contextlib
import functools
import time

import torch

from benchmarks.cases import FIXED, Case
from benchmarks.measure import CpuMeter, CudaMeter, timed_in_turns
from benchmarks.peers import PEERS, peer_block
from benchmarks.plain import PlainBlock, plain_operation
from nlutils.torch import NonLocalBlock, non_local

__all__ = ["allowed", "measure_growth", "measure_memory", "measure_time"]

# A map that is too small to cost anything, to load kernels with before memory is measured.
TINY = (2, 4, 4)
# Variants compute the same function; they may differ by rounding, as a share of the largest value.
AGREEMENT = {"float32": 1e-3, "bfloat16": 1e-1}
COUNTERPART = {"timm": "nlutils_2d"}


class Variant:
    """One implementation with its input: run("forward") or run("training"), after prepare(pass).

    forward: evaluation mode, without gradients. training: training mode, forward and backward to the input
    and all weights.
    """

    def __init__(self, function, inputs, direction, module=None, autocast=None):
        self.function, self.inputs, self.direction = function, inputs, direction
        self.module, self.autocast = module, autocast or contextlib.nullcontext
        self.leaves = [*inputs, *(module.parameters() if module is not None else ())]

    def prepare(self, passed: str) -> None:
        """Set the mode and drop old gradients."""
        if self.module is not None:
            self.module.train(passed == "training")
        for leaf in self.leaves:
            leaf.grad = None

    def run(self, passed: str):
        """forward: the output; training: nothing, gradients are in the leaves."""
        if passed == "forward":
            with torch.no_grad(), self.autocast():
                return self.function(*self.inputs)
        with self.autocast():
            output = self.function(*self.inputs)
        output.backward(self.direction.to(output.dtype))
        return None


def build(case: Case, names, device="cpu", dtype="float32", size=None) -> dict:
    """{name: Variant} with the same weights and the same input for all."""
    torch.set_num_threads(1)
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    autocast = functools.partial(torch.autocast, device, torch.bfloat16) if dtype == "bfloat16" else None
    make = _operation if case.level == "operation" else _block
    return {name: make(case, name, size or case.size, torch.device(device), autocast) for name in names}


def _draw(*shape, seed, device, scale=1.0):
    # In place: a large copy that is freed here would change how the C library treats later ones.
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator).mul_(scale).to(device)


def _operation(case, name, size, device, autocast):
    count = size[0] * size[1] * size[2]
    theta, phi, g = (_draw(1, count, case.inner, seed=seed, device=device) for seed in range(3))
    w_f = None
    if case.instantiation == "concatenation":
        w_f = _draw(2 * case.inner, seed=3, device=device, scale=(2 * case.inner) ** -0.5)
    inputs = [tensor.requires_grad_() for tensor in (theta, phi, g, w_f) if tensor is not None]
    form = "sums" if case.instantiation == "concatenation" else case.instantiation

    def ours(theta, phi, g, w_f=None):
        return non_local(theta, phi, g, case.instantiation, w_f=w_f)

    def plain(theta, phi, g, w_f=None):
        return plain_operation(form, theta, phi, g, w_f=w_f)

    function = {"nlutils": ours, "materialised_sums": plain}[name]
    direction = _draw(1, count, case.inner, seed=4, device=device)
    return Variant(function, inputs, direction, autocast=autocast)


def _block(case, name, size, device, autocast):
    flat = name in ("timm", "nlutils_2d")
    module = our_block(case, ndim=2 if flat else 3)
    if name in PEERS:
        module = peer_block(name, module)
    elif name in ("materialised_pairs", "plain"):
        module = PlainBlock(module)
    frames, height, width = size
    shape = (1, case.channels, frames * height, width) if flat else (1, case.channels, *size)
    # Without theta, phi and scale the Gaussian's logits are x_i . x_j: small features keep them near 1.
    scale = 2 * case.channels**-0.5 if case.instantiation == "gaussian" else 1.0
    x = _draw(*shape, seed=1, device=device, scale=scale).requires_grad_()
    module = module.to(device)
    return Variant(module, [x], _draw(*shape, seed=2, device=device), module, autocast)


@torch.no_grad()
def our_block(case, ndim=3):
    """A NonLocalBlock whose weights are of the size that training leaves them in, and nothing is zero."""
    block = NonLocalBlock(
        case.channels,
        case.inner,
        ndim=ndim,
        instantiation=case.instantiation,
        scale=case.instantiation == "embedded_gaussian",
    )
    generator = torch.Generator().manual_seed(0)
    for name, parameter in sorted(block.named_parameters()):
        if parameter.ndim > 1 or name == "w_f":
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * parameter[0].numel() ** -0.5)
    if block.w_f is not None:
        block.w_f.mul_(block.w_f.numel() ** -0.5)
    block.norm.weight.fill_(1)
    return block


def measure_time(case: Case, device="cpu", dtype="float32") -> dict:
    """Time all variants in turns: {"values", "ours", "agreement", "raised", "left_out"}."""
    meter = CudaMeter() if device == "cuda" else CpuMeter()
    names, left_out = _present(case, device)
    variants = build(case, names, device, dtype)
    ours = {name: COUNTERPART.get(name, "nlutils") for name in names if not name.startswith("nlutils")}
    agreement, raised = _agreement(case, variants, ours, dtype)
    values = {name: {} for name in names}
    for passed in case.passes:
        calls = {
            name: lambda variant=variant, passed=passed: variant.run(passed)
            for name, variant in variants.items()
            if (name, passed) not in raised
        }
        seconds = timed_in_turns(
            calls, case.repeats, meter, lambda name, passed=passed: variants[name].prepare(passed)
        )
        for name, numbers in seconds.items():
            values[name][passed] = numbers
    raised = {f"{name} {passed}": error for (name, passed), error in raised.items()}
    return {
        "values": values,
        "ours": ours,
        "agreement": agreement,
        "raised": raised,
        "left_out": left_out,
    }


def _present(case, device):
    """The variants that can run here. On a CPU all must; on a GPU a peer may be missing, and is reported."""
    if device == "cpu":
        return list(case.variants), {}
    names, left_out = [], {}
    probe = our_block(case, ndim=3)
    for name in case.variants:
        try:
            if name in PEERS:
                peer_block(name, our_block(case, ndim=2) if name == "timm" else probe)
            names.append(name)
        except ModuleNotFoundError as error:
            left_out[name] = str(error)
    if case.level == "block":
        names.append("plain")
    return names, left_out


def _agreement(case, variants, ours, dtype):
    """Run each variant once, which warms it up too; how far it is from ours (root mean square).

    Gradients are compared for every input: x of a block; theta, phi, g and w_f of the operation. Those of a
    block's weights, which each peer lays out in its own way, must be there and finite. Raises RuntimeError
    when a variant computes something else, or does not raise what it is known to raise.
    """
    outputs, gradients, raised = {}, {}, {}
    for name, variant in variants.items():
        variant.prepare("forward")
        outputs[name] = [variant.run("forward").flatten(2).float()]
        variant.prepare("training")
        try:
            variant.run("training")
        except RuntimeError as error:
            if name not in case.raises:
                raise
            raised[name, "training"] = f"{type(error).__name__}: {str(error).splitlines()[0]}"
        else:
            if name in case.raises:
                raise RuntimeError(f"{name} was known to raise an error in its backward pass, and did not")
            if not all(leaf.grad is not None and leaf.grad.isfinite().all() for leaf in variant.leaves):
                raise RuntimeError(f"{name} leaves an input or a weight without a finite gradient")
            gradients[name] = [leaf.grad.float() for leaf in variant.inputs]
        variant.prepare("training")
    found = {}
    for name, mine in ours.items():
        pairs = {"forward": outputs, "training": gradients}
        found[name] = {
            passed: max(_distance(a, b) for a, b in zip(values[name], values[mine], strict=True))
            for passed, values in pairs.items()
            if name in values
        }
        if max(found[name].values()) > allowed(case, dtype):
            raise RuntimeError(f"{name} computes something else than nlutils: {found[name]}")
    return found, raised


def allowed(case, dtype) -> float:
    """How far two variants may be apart, in the root mean square.

    Where a_i + b_j is 0 to rounding, one side counts the pair and the other does not. dL/da_i, a sum of about
    N/2 terms of random sign, then moves by one of them, sqrt(2/N) of its size. When this meets a share r of
    the N^2 pairs, the root mean square is sqrt(2 r): 3e-3 for r = 5e-6, some dozen roundings of float32.
    """
    return max(AGREEMENT[dtype], 3e-3) if case.instantiation == "concatenation" else AGREEMENT[dtype]


def _distance(a, b) -> float:
    # The root mean square, not the largest entry, which a single pair at the kink of the ReLU would make.
    return float(f"{((a - b).norm() / b.norm()).item():.1e}")


def measure_memory(case: Case, variant: str, device="cpu", dtype="float32") -> dict:
    """The peak of one variant in this process: {pass: [MiB]}, and the seconds on the wall."""
    meter = CudaMeter() if device == "cuda" else CpuMeter()
    variant = variant.removesuffix(FIXED)
    small = build(case, [variant], device, dtype, size=TINY)[variant]
    (case_variant,) = build(case, [variant], device, dtype).values()
    values = {}
    start = time.perf_counter()
    for passed in case.passes:
        small.prepare(passed)
        small.run(passed)
        case_variant.prepare(passed)
        values[passed] = [round(meter.peak(lambda passed=passed: case_variant.run(passed)), 1)]
        if passed == "training" and not case_variant.inputs[0].grad.isfinite().all():
            raise RuntimeError(f"{case.name}: {variant} left gradients that are not finite")
    return {"values": values, "wall": round(time.perf_counter() - start, 1)}


def measure_growth(case: Case, device="cpu", dtype="float32") -> dict:
    """Time ours on the base and on the larger map in turns: {"values": {"base", "nlutils"}}."""
    meter = CudaMeter() if device == "cuda" else CpuMeter()
    sizes = {"base": case.base, "nlutils": case.size}
    variants = {
        name: build(case, ["nlutils"], device, dtype, size)["nlutils"] for name, size in sizes.items()
    }
    values = {name: {} for name in sizes}
    for passed in case.passes:
        for variant in variants.values():
            variant.prepare(passed)
            variant.run(passed)
        calls = {
            name: lambda variant=variant, passed=passed: variant.run(passed)
            for name, variant in variants.items()
        }
        seconds = timed_in_turns(
            calls, case.repeats, meter, lambda name, passed=passed: variants[name].prepare(passed)
        )
        for name, numbers in seconds.items():
            values[name][passed] = numbers
    return {"values": values}
