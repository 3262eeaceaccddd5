"""Count what a training step does on a GPU, on a machine without one: bytes, synchronizations, registers of kernels.

    python -m tools.gpu_counts                                        # base, batch of 256, bfloat16, pre-training
    python -m tools.gpu_counts --part finetune --batch_size 128
    python -m tools.gpu_counts --compile                              # what torch.compile would launch
    python -m tools.gpu_counts --kernels 80 90 100                    # registers of each kernel by compute capability

Nothing is computed or timed. Tensors are fake, of a GPU that a small C library pretends to be there (a C compiler is
needed), and every operation is asked for what it reads and writes: each input and each output once, views nothing, as
if caches held nothing. What a kernel keeps for itself (sums of its programs) is not seen.
"""

import collections
import importlib.util
import json
import math
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import flags
from flags import at_least
from models import convnextv2, fcmae
from models.triton_switch import use_triton
from utils import UserError

VERSIONS = ("2.14", "2.15")  # of torch, which run on the pretended GPU
PRETENDED = "CONVNEXTV2_PRETENDED_GPU"  # set in the process that has it
SYNCHRONIZING = ("_local_scalar_dense", "nonzero", "_unique", "masked_select", "is_nonzero")
ALLOCATING = ("empty", "new_empty", "empty_like", "empty_strided", "detach", "alias", "_unsafe_view", "lift_fresh")
READING_WHAT_THEY_GIVE = ("index_select", "gather", "index")  # of their first input
WRITING_ONLY = ("copy_", "zero_", "fill_", "index_copy_", "zeros_like", "ones_like", "full_like", "new_zeros")
SIDES = (7, 14, 28, 56)  # of the stages' maps: if one is the innermost axis, channels are not


class Traffic(TorchDispatchMode):
    """Within, counts of operations: bytes by name, and names of those that synchronize or leave tensors on the CPU."""

    def __init__(self):
        super().__init__()
        self.bytes = collections.Counter()
        self.synchronizing, self.on_cpu, self.channels_first, self.operations = set(), set(), set(), 0

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        outputs = operation(*args, **kwargs or {})
        name = operation._schema.name.split("::")[1]
        if name in SYNCHRONIZING:
            self.synchronizing.add(name)
        if any(x.device.type == "cpu" and x.numel() > 0 for x in tensors(outputs)):
            self.on_cpu.add(name)
        if any(x.numel() > 10**6 and innermost_length(x) in SIDES for x in tensors(outputs)):
            self.channels_first.add(name)
        is_view = not operation._schema.is_mutable and all(r.alias_info for r in operation._schema.returns)
        if not is_view and operation.namespace != "prim" and name not in ALLOCATING:
            self.operations += 1
            self.bytes[name] += count_bytes(name, tensors([args, kwargs]), tensors(outputs))
        return outputs


def innermost_length(x):
    """The length of the axis along which x is contiguous in memory."""
    return next((length for length, stride in zip(x.shape, x.stride(), strict=True) if stride == 1), 0)


def tensors(tree):
    return [x for x in tree_leaves(tree) if isinstance(x, torch.Tensor)]


def count_bytes(name, inputs, outputs):
    sizes = [size(x) for x in {id(x): x for x in inputs}.values()]
    written = sum(map(size, outputs))
    if sizes and name in READING_WHAT_THEY_GIVE:
        sizes[0] = min(written, sizes[0])
    if sizes and name in WRITING_ONLY:
        sizes[0] = 0
    if name == "index_copy_":  # writes what it was given, at other places
        written = sizes[-1]
    return sum(sizes) + written


def size(x):
    """Bytes of memory that a tensor touches: what is expanded counts once."""
    lengths = (length for length, stride in zip(x.shape, x.stride(), strict=True) if stride)
    return math.prod(lengths) * x.element_size()


# ---- The step


def build_step(args):
    """The model on the pretended GPU, and a function that runs forward and loss on a batch of so many images."""
    torch.nn.init.trunc_normal_ = lambda x, **_: x  # which reads numbers of fake tensors
    module = fcmae if args.part == "pretrain" else convnextv2
    options = dict(norm_pix_loss=True) if args.part == "pretrain" else {}
    size = dict(depths=args.depths) if args.depths else {}
    with torch.device("cuda"):
        model = getattr(module, args.model)(**options, **size)
        imgs, noise = torch.empty(args.batch_size, 3, 224, 224), torch.empty(args.batch_size, 49)
        targets = torch.zeros(args.batch_size, dtype=torch.long)
    call = torch.compile(model, fullgraph=True, backend=counting_backend(args)) if args.compile else model

    def compute_loss():
        with torch.autocast("cuda", torch.bfloat16, enabled=args.dtype == "bfloat16"):
            if args.part == "pretrain":
                return call(imgs, noise=noise, masked_only=True)[0]
            return torch.nn.functional.cross_entropy(call(imgs).float(), targets)

    return model, compute_loss


def count_eager(args):
    """Bytes, operations and what should not happen in a step: forward, loss, backward, AdamW."""
    model, compute_loss = build_step(args)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
    optimizer.zero_grad()
    phases = {}
    with Traffic() as phases["forward"]:
        loss = compute_loss()
    with Traffic() as phases["backward"]:
        loss.backward()
    with Traffic() as phases["optimizer"], torch.device("cuda"):
        optimizer.step()
    report = summarize({name: traffic.bytes for name, traffic in phases.items()}, args)
    report["operations"] = sum(traffic.operations for traffic in phases.values())
    report["dtypes_of_gradients"] = sorted({str(p.grad.dtype).removeprefix("torch.") for p in model.parameters()})
    for name in ("synchronizing", "on_cpu", "channels_first"):
        report[name] = sorted(set().union(*(getattr(traffic, name) for traffic in phases.values())))
    return report


def summarize(phases, args):
    """Megabytes an image, by phase and operation, from {phase: {operation: bytes}}."""
    table = {
        phase: {name: round(count / args.batch_size / 1e6, 2) for name, count in counter.most_common()}
        for phase, counter in phases.items()
    }
    total = sum(sum(counter.values()) for counter in phases.values()) / args.batch_size / 1e6
    return dict(megabytes_an_image=round(total, 1), by_operation=table)


# ---- The compiled step


class Counted(BaseException):
    """Ends the compilation of a graph: its kernels are planned, and need not be written."""


COUNTS = {}  # {"forward" or "backward": {kind of kernel: bytes}}


def counting_backend(args):
    """A backend of torch.compile that plans what Inductor would launch, adds it to COUNTS, and runs the graph."""
    from functorch.compile import make_boxed_func, min_cut_rematerialization_partition
    from torch._dynamo.backends.common import aot_autograd
    from torch._inductor import compile_fx, config, graph

    config.force_disable_caches, config.compile_threads = True, 1
    config.triton.autotune_at_compile_time = False
    torch._functorch.config.donated_buffer = False

    def plan(self):
        self.init_wrapper_code()
        self._update_scheduler()
        counter = collections.Counter()
        for node in self.scheduler.nodes:
            counter[kind_of(node)] += node.get_read_write_buffers_sizes()
        raise Counted(counter)

    graph.GraphLowering.codegen = plan

    def compiler(phase):
        def compile(module, inputs):
            try:
                compile_fx.compile_fx_inner(module, inputs, is_backward=phase == "backward")
            except Counted as counted:
                COUNTS[phase] = counted.args[0]
            return make_boxed_func(module.forward)

        return compile

    return aot_autograd(
        fw_compiler=compiler("forward"),
        bw_compiler=compiler("backward"),
        partition_fn=min_cut_rematerialization_partition,
        decompositions=compile_fx.select_decomp_table(),
    )


def kind_of(node):
    """What a planned kernel is: an operator or library call by its name, else one that Inductor writes."""
    inner = getattr(node, "node", None)
    name = getattr(inner, "python_kernel_name", None) or getattr(inner, "op_overload", None)
    return str(name).split(".")[-2 if "default" in str(name) else -1] if name else "written by Inductor"


def count_compiled(args):
    """Bytes of the forward and backward graphs as Inductor would launch them; the optimizer is not compiled."""
    _, compute_loss = build_step(args)
    compute_loss().backward()
    return summarize(COUNTS, args)


# ---- Registers of kernels


def compile_ahead(kernel, dtypes, sizes, capability):
    """Compile a kernel variant, see `launch.find_variants`, for a compute capability such as 90.

    Returns registers a thread, bytes that it spills, bytes of shared memory a program.
    """
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    names = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32", torch.float64: "fp64"}
    names |= {torch.int32: "i32", torch.int64: "i64"}
    values = dict(zip(kernel.arg_names, dtypes, strict=False)) | sizes
    options = {name: values.pop(name) for name in ("num_warps", "num_stages")}
    constexprs = {p.name for p in kernel.params if p.is_constexpr}
    signature, constants, attributes = {}, {}, {}
    for index, name in enumerate(kernel.arg_names):
        value = values[name]
        if value is None or name in constexprs:
            signature[name], constants[name] = "constexpr", value
            continue
        signature[name] = f"*{names[value]}" if isinstance(value, torch.dtype) else "i32"
        if isinstance(value, torch.dtype) or (value % 16 == 0 and name == "channels"):
            attributes[(index,)] = [["tt.divisibility", 16]]
    source = ASTSource(kernel, signature, constants, attributes)
    compiled = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)
    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as binary:
        Path(binary.name).write_bytes(compiled.asm["cubin"])
        command = [tool, "--dump-resource-usage", binary.name]
        usage = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    found = {name: int(re.search(rf"{name}:(\d+)", usage)[1]) for name in ("REG", "STACK", "LOCAL")}
    return dict(registers=found["REG"], spilled=found["STACK"] + found["LOCAL"], shared=compiled.metadata.shared)


def count_kernels(args):
    """Registers, spills and shared memory of all kernels of a step, by compute capability."""
    from models.launch import find_variants

    model, _ = build_step(args)
    dtype = torch.bfloat16 if args.dtype == "bfloat16" else None
    rows = []
    for (name, *_), (kernel, dtypes, sizes) in find_variants(model, (2, 3, 224, 224), dtype).items():
        for capability in args.kernels:
            row = dict(kernel=name, dtypes=[str(x).removeprefix("torch.") for x in dtypes], capability=capability)
            constants = {key: value for key, value in sizes.items() if key.isupper()}
            rows.append(row | dict(constants=constants) | compile_ahead(kernel, dtypes, sizes, capability))
    return dict(kernels=rows)


# ---- The pretended GPU


def run_pretending(command, folder):
    """Run a command in whose process torch and Triton see an H100. Raises UserError where there is no C compiler."""
    include = Path(importlib.util.find_spec("triton").origin).parent / "backends/nvidia/include"
    source = Path(__file__).with_name("pretended_gpu.c")
    build = ["cc", "-shared", "-fPIC", "-w", f"-I{include}", source]
    try:
        subprocess.run([*build, "-DRUNTIME", "-o", f"{folder}/runtime.so"], check=True)
        subprocess.run([*build, "-Wl,-soname,libcuda.so.1", "-o", f"{folder}/libcuda.so.1"], check=True)
    except FileNotFoundError:
        raise UserError("no C compiler: install gcc, which this count needs") from None
    paths = ":".join(filter(None, [str(folder), os.environ.get("LD_LIBRARY_PATH")]))
    env = os.environ | {"LD_PRELOAD": f"{folder}/runtime.so", "LD_LIBRARY_PATH": paths, PRETENDED: "1"}
    return subprocess.run(command, env=env).returncode


def get_args_parser():
    parser = flags.FlagParser(add_help=False)
    add = parser.add_argument_group("what to count").add_argument
    add("--model", default="convnextv2_base", choices=convnextv2.SIZES, metavar="NAME", help="which model")
    add("--part", default="pretrain", choices=("pretrain", "finetune"), help="the step of which training")
    add("--depths", nargs=4, type=at_least(1), help="blocks of the four stages; None: those of the model")
    add("--batch_size", default=256, type=at_least(1), help="images of the step")
    add("--dtype", default="bfloat16", choices=("float32", "bfloat16"), help="float32, or autocast")
    add("--compile", default=False, action=flags.Switch, help="count what torch.compile would launch")
    add("--triton", default=True, action=flags.Switch, help="with the Triton kernels")
    add("--kernels", nargs="+", type=at_least(75), help="compile the kernels for these compute capabilities instead")
    return parser


def main(args):
    if PRETENDED not in os.environ:
        with tempfile.TemporaryDirectory() as folder:
            sys.stdout.flush()
            status = run_pretending([sys.executable, "-m", "tools.gpu_counts", *sys.argv[1:]], folder)
            if status < 0:
                accepted = f"accepted are {' and '.join(VERSIONS)}, with which it was tried"
                raise UserError(
                    f"torch {torch.__version__} crashes on the pretended GPU (signal {-status}); {accepted}"
                )
            sys.exit(status)
    from torch._subclasses.fake_tensor import FakeTensorMode

    use_triton(args.triton)
    with FakeTensorMode(allow_non_fake_inputs=True):
        count = count_kernels if args.kernels else count_compiled if args.compile else count_eager
        report = count(args)
    print(json.dumps(dict(torch=torch.__version__) | report, indent=1))


if __name__ == "__main__":
    flags.run_script(main, get_args_parser(), __doc__)
