"""Whether Triton's kernels run: one answer for a process, and, where several train together, for all of them."""

import functools
import importlib.util
import os
import shutil
import sysconfig
import warnings

import torch
from torch._subclasses.fake_tensor import unset_fake_temporarily

from .utils import TRITON_DEVICES

_enabled = None


def use_triton(enabled):
    """Whether models on CUDA run the Triton kernels of `models.kernels` and `models.mlp_kernels`.

    None, the default: if they work there, which is tried when they are first needed. True does not try.
    """
    global _enabled
    _enabled = enabled


def runs_in_triton(x):
    """Whether x is to be computed by Triton kernels."""
    if x.device.type not in TRITON_DEVICES:
        return False
    return _decide(x.device) if _enabled is None else _enabled


@functools.cache
def _try_and_warn(device):
    reason = triton_works(device)
    if reason:
        warnings.warn(f"Triton kernels are off, plain PyTorch runs instead: {reason}", stacklevel=2)
    return reason is None


def _decide(device):
    return _try_and_warn(device)


# torch.compile must not trace the attempt. `torch.compiler.assume_constant_result` does just this, but only after
# importing all of torch._dynamo, which takes a second.
_decide._dynamo_marked_constant = True


@functools.cache
def triton_works(device):
    """None if the Triton kernels work on a device, which is tried on a small input; else the reason why not.

    Processes that train together compare their answers and then call `use_triton` alike. Raises OutOfMemoryError, which
    is no reason.
    """
    if not importlib.util.find_spec("triton"):
        return "Triton is not installed"
    try:
        from . import kernels, launch, mlp_kernels

        device = torch.device(device)
        dtypes = [torch.float32, torch.bfloat16] if device.type == "cuda" else [torch.float32]
        # In case the first use is under torch.compile, a FakeTensorMode or autocast
        with unset_fake_temporarily(), torch.autocast(device.type, enabled=False):
            modules = kernels, mlp_kernels
            launch.check_operators([call for dtype in dtypes for m in modules for call in m.calls(device, dtype)])
    except torch.OutOfMemoryError:
        raise
    except Exception as error:
        return what_is_missing() or f"{type(error).__name__}: {error}"
    return None


def what_is_missing():
    """What Triton needs to build the launcher of its kernels and this machine lacks, with the remedy, or None."""
    if not (os.environ.get("CC") or shutil.which("gcc") or shutil.which("clang")):
        return "no C compiler (install gcc, or set CC)"
    if not os.path.exists(os.path.join(sysconfig.get_paths()["include"], "Python.h")):
        return "no Python.h (install python3-dev)"
    return None
