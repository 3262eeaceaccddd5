"""Operators of PyTorch whose implementation is a Triton kernel, and the variants of kernels that a step needs."""

import contextlib
import os
from concurrent.futures import ThreadPoolExecutor

import torch
import triton
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._pytree import tree_leaves

from .utils import TRITON_DEVICES

# What changes with the batch and the images: no reason to compile again
BATCH_SIZES = ["num_tiles", "tiles_per_program", "num_visible", "height", "width", "sites"]
_recorded = None  # launches, while `record_launches`


def define_operator(name, plain, run, fake):
    """The operator PACKAGE::name, so that a clone and an installed copy can both be imported.

    plain(*inputs): its reference in plain PyTorch, for any device, annotated.
    run(*inputs): the same by Triton kernels, where they run. fake(*inputs): empty results, for tracing.
    """
    operator = torch.library.custom_op(f"{__package__.replace('.', '_')}::{name}", plain, mutates_args=())
    operator.register_kernel(TRITON_DEVICES)(run)

    @operator.register_fake
    def _(*inputs):
        if _recorded is not None:
            run(*inputs)
        return fake(*inputs)

    return operator


def launch(kernel, grid, *tensors, **sizes):
    """Run a kernel on tensors (or None); within `record_launches` only note it. A grid of 0 programs is none to run."""
    if _recorded is not None:
        _recorded.append((kernel, tensors, sizes))
    elif all(grid):
        with torch.cuda.device_of(tensors[0]):
            kernel[grid](*tensors, **sizes)


def check_operators(calls):
    """Raise RuntimeError unless operators give the results of their references: calls are (operator, inputs)."""
    with record_launches() as launches, FakeTensorMode() as mode:
        for operator, inputs in calls:
            operator(*(mode.from_tensor(x) if isinstance(x, torch.Tensor) else x for x in inputs))
    compile_variants(name_variants(launches))
    for operator, inputs in calls:
        results, expected = tree_leaves(operator(*inputs)), tree_leaves(operator._init_fn(*inputs))
        if not all(torch.allclose(*pair, atol=0.02) for pair in zip(results, expected, strict=True)):
            raise RuntimeError(f"wrong results of {operator._opoverload} for {inputs[0].dtype}")


@contextlib.contextmanager
def record_launches():
    """A list to which the launches of operators on fake tensors within are added: (kernel, tensors, sizes)."""
    global _recorded
    _recorded = []
    try:
        yield _recorded
    finally:
        _recorded = None


def find_variants(model, imgs_shape, dtype=None):
    """What a training step of the model compiles, as `name_variants` has it.

    imgs_shape: (N, in_chans, H, W), of which N does not matter. dtype: of autocast, or None. The step is made on fake
    tensors: nothing is computed.
    """
    device = next(model.parameters()).device
    with record_launches() as launches, FakeTensorMode(allow_non_fake_inputs=True):
        with torch.autocast(device.type, dtype, enabled=dtype is not None):
            output = tree_leaves(model(torch.empty(imgs_shape, device=device)))[0]
        torch.autograd.grad(output.float().sum(), [p for p in model.parameters() if p.requires_grad], allow_unused=True)
    return name_variants(launches)


def name_variants(launches):
    """{(name of kernel, dtypes of its tensors, constants): (kernel, dtypes, sizes)} of recorded launches."""
    variants = {}
    for kernel, tensors, sizes in launches:
        dtypes = tuple(x if x is None else x.dtype for x in tensors)
        constants = {name: value for name, value in sizes.items() if name not in BATCH_SIZES}
        if "channels" in constants:  # Triton asks of a number only whether it is a multiple of 16
            constants["channels"] %= 16
        variants[kernel.__name__, dtypes, tuple(constants.items())] = kernel, dtypes, sizes
    return variants


def compile_variants(variants, threads=None):
    """Compile kernels, see `name_variants`, side by side; Triton keeps them on disk. Raises what Triton raises."""
    if triton.knobs.runtime.interpret:
        return  # the interpreter compiles nothing
    with ThreadPoolExecutor(threads or len(os.sched_getaffinity(0))) as pool, triton.AsyncCompileMode(pool):
        for kernel, dtypes, sizes in variants.values():
            kernel.warmup(*dtypes, grid=(1,), **sizes)
