"""What the Triton kernels promise: submanifold and dense depthwise convolution and their derivatives, and no more.

On a machine with CUDA they run there. Elsewhere Triton's interpreter runs them on the CPU: it must be chosen before
Triton is imported, so one test here runs this file once more, in a process of its own. The reference is written down
from the definition: sites in a dictionary of places, PyTorch's own convolution of float64, its own derivatives.
"""

import os
import subprocess
import sys
import textwrap
from collections import Counter
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from conftest import gap, randomise
from functorch.compile import make_boxed_func
from torch._dynamo.backends.common import aot_autograd
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._pytree import tree_leaves

from models import passes, triton_switch
from models.convnextv2 import Block
from models.convnextv2_sparse import SparseBlock
from models.depthwise import depthwise_conv, sparse_depthwise_conv
from models.fcmae import FCMAE
from models.sites import active_sites, patch_slots
from models.triton_switch import triton_works, use_triton

triton = pytest.importorskip("triton")
from models import kernels, launch, mlp_kernels  # noqa: E402, imports Triton

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cuda" if torch.cuda.is_available() and not INTERPRETED else "cpu"
needs_kernels = pytest.mark.skipif(not INTERPRETED and DEVICE == "cpu", reason="see test_kernels_in_the_interpreter")
on_the_host = pytest.mark.skipif(INTERPRETED, reason="runs without the interpreter")

pytestmark = pytest.mark.usefixtures("seed_and_one_thread")
TINY = {"depths": (1, 1, 1, 1), "dims": (8, 16, 24, 32)}
# Largest error relative to the largest value: sums are float32, results rounded (by the interpreter towards zero)
TOLERANCE = {torch.float64: 1e-14, torch.float32: 1e-6, torch.float16: 2**-10, torch.bfloat16: 2**-7}


@pytest.fixture(autouse=True)
def switch_and_blocks(monkeypatch):
    """The switch is off before each test, automatic after it. Larger blocks are fewer: the interpreter is faster."""
    if INTERPRETED:
        monkeypatch.setattr(kernels, "BLOCK", 8192)
    torch.backends.cudnn.allow_tf32 = False  # the reference is of float32
    use_triton(False)
    yield
    use_triton(None)


@on_the_host
@pytest.mark.skipif(DEVICE == "cuda", reason="the kernels run on the GPU here")
def test_kernels_in_the_interpreter():
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", __file__]
    result = subprocess.run(command, env=os.environ | {"TRITON_INTERPRET": "1"}, capture_output=True, text=True)
    print(result.stdout)
    assert result.returncode == 0


# ---- The reference


def places(patch, grid_width, k):
    """Row and column of each site of a patch, in Z-order by its definition: quarter by quarter."""
    if k == 1:
        return [divmod(patch, grid_width)]
    return [(2 * y + dy, 2 * x + dx) for y, x in places(patch, grid_width, k // 2) for dy in (0, 1) for dx in (0, 1)]


def reference(x, weight, bias, visible, grid, k):
    """Submanifold sparse convolution of rows (N, S, C): dense on a canvas of zeros, the active sites read back."""
    at = [[place for patch in patches for place in places(patch, grid[1], k)] for patches in visible.tolist()]
    rows, columns = torch.tensor(at, device=x.device).permute(2, 0, 1)  # (N, S) each
    images = torch.arange(len(x), device=x.device)[:, None].expand_as(rows)
    canvas = x.new_zeros(len(x), grid[0] * k, grid[1] * k, x.shape[-1])
    canvas = canvas.index_put((images, rows, columns), x).permute(0, 3, 1, 2)
    y = F.conv2d(canvas, weight, bias, padding=3, groups=len(weight))
    return y.permute(0, 2, 3, 1)[images, rows, columns]


def dense_reference(x, weight, bias):
    return F.conv2d(x, weight, bias, padding=3, groups=len(weight))


def outputs_and_grads(function, *inputs):
    """The output of function(*inputs), and the gradients of a fixed random projection of it for each input."""
    inputs = [x.detach().requires_grad_() for x in inputs]
    y = function(*inputs)
    projection = torch.randn(y.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    # Values that every type holds, so that types can be compared
    projection = projection.bfloat16().to(y)
    return [y, *torch.autograd.grad(y, inputs, projection)]


def assert_close(results, expected, tolerance):
    gaps = [gap(a.double(), b.double()) for a, b in zip(results, expected, strict=True)]
    assert max(gaps) <= tolerance, gaps


def as_module(weight, bias):
    """The convolution of a block with these weights."""
    conv = torch.nn.Conv2d(len(weight), len(weight), 7, padding=3, groups=len(weight), device="meta")
    conv.register_parameter("weight", None), conv.register_parameter("bias", None)
    conv._parameters.update(weight=weight, bias=bias)
    return conv


def dense(x, weight, bias):
    return depthwise_conv(x, as_module(weight, bias))[0]


def packed(x, weight, bias, sites):
    return sparse_depthwise_conv(x, as_module(weight, bias), sites)[0]


def random_inputs(*shape, dtype=torch.float64):
    """x of that shape, channels first or last by its length, with weight and bias; values of the type."""
    channels = shape[1] if len(shape) == 4 else shape[2]
    shapes = shape, (channels, 1, 7, 7), (channels,)
    return [torch.randn(shape, dtype=torch.float64).to(DEVICE, dtype) for shape in shapes]


def random_visible(n, grid, num_visible):
    """Numbers (n, num_visible) of visible patches, in order, in each image others."""
    patches = [torch.randperm(grid[0] * grid[1])[:num_visible].sort().values for _ in range(n)]
    return torch.stack(patches).to(DEVICE)


def check_packed(n, grid, num_visible, k, channels, dtype=torch.float64):
    use_triton(True)
    visible = random_visible(n, grid, num_visible)
    sites = active_sites(visible, grid, k)
    inputs = random_inputs(n, num_visible * k * k, channels, dtype=dtype)
    results = outputs_and_grads(lambda *inputs: packed(*inputs, sites), *inputs)
    assert [result.dtype for result in results] == [dtype] * 4
    inputs = [x.double() for x in inputs]
    assert_close(results, outputs_and_grads(lambda *x: reference(*x, visible, grid, k), *inputs), TOLERANCE[dtype])


def check_dense(*shape, dtype=torch.float64):
    use_triton(True)
    x, weight, bias = random_inputs(*shape, dtype=dtype)
    results = outputs_and_grads(dense, x.contiguous(memory_format=torch.channels_last), weight, bias)
    assert [result.dtype for result in results] == [dtype] * 4
    assert_close(
        results, outputs_and_grads(dense_reference, *(x.double() for x in (x, weight, bias))), TOLERANCE[dtype]
    )


# ---- The kernels compute the convolution


@needs_kernels
@pytest.mark.parametrize(
    ("k", "n", "grid", "num_visible"),
    [
        (8, 1, (2, 2), 3),
        (4, 2, (2, 3), 3),
        (2, 2, (3, 4), 5),
        (2, 1, (5, 5), 10),
        (1, 3, (4, 5), 8),
        (1, 2, (8, 9), 30),
    ],
)
def test_packed_convolution_and_gradients_of_each_stage(k, n, grid, num_visible):
    check_packed(n, grid, num_visible, k, channels=40)


@needs_kernels
@pytest.mark.parametrize("k", [4, 1])
@pytest.mark.parametrize("num_visible", [1, 6], ids=["one visible", "all visible"])
def test_packed_convolution_of_one_or_all_patches(k, num_visible):
    check_packed(2, (2, 3), num_visible, k, channels=8)


@needs_kernels
@pytest.mark.parametrize("size", [(1, 2), (9, 13)], ids=str)
def test_dense_convolution_and_gradients(size):
    check_dense(2, 40, *size)


@needs_kernels
@pytest.mark.parametrize("channels", [1, 88])
def test_channels_need_not_fill_the_blocks(channels):
    check_packed(2, (3, 3), 4, 1, channels)


@needs_kernels
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_results_are_of_the_inputs_type_and_as_close_as_it_allows(dtype):
    check_packed(2, (4, 4), 6, 2, 16, dtype)


@needs_kernels
def test_programs_may_walk_over_many_tiles(monkeypatch):
    monkeypatch.setattr(kernels, "BLOCK", 256)
    monkeypatch.setattr(kernels, "CONV_PROGRAMS", 2)
    monkeypatch.setattr(kernels, "WEIGHT_GRAD_PROGRAMS", 2)
    check_packed(3, (3, 3), 7, 2, channels=8)  # 21 tiles in blocks of 8: one program does two of these, one the rest


@needs_kernels
def test_sums_are_not_of_float16():
    use_triton(True)
    x = torch.full((1, 1, 8, 8), 200.0, device=DEVICE, dtype=torch.float16)
    weight = torch.tensor([-16.0] * 28 + [16.0] * 21).view(1, 1, 7, 7).to(x)  # up to -89600, then back to -22400
    expected = dense_reference(x.double(), weight.double(), x.new_zeros(1).double())
    assert torch.equal(dense(x, weight, x.new_zeros(1)), expected.half())


@needs_kernels
def test_results_are_the_same_bits_each_time():
    use_triton(True)
    sites = active_sites(random_visible(4, (3, 3), 5), (3, 3), 2)
    inputs = random_inputs(4, 20, 40, dtype=torch.float32)
    first, second = (outputs_and_grads(lambda *x: packed(*x, sites), *inputs) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@needs_kernels
def test_autocast_sets_the_type_of_the_result_and_leaves_the_weight_gradient_float32():
    use_triton(True)
    x, weight, bias = (x.requires_grad_() for x in random_inputs(2, 8, 5, 5, dtype=torch.float32))
    with torch.autocast(DEVICE, torch.bfloat16):
        y = dense(x, weight, bias)
    grads = torch.autograd.grad(y.float().square().sum(), (x, weight, bias))
    assert y.dtype == torch.bfloat16 and {grad.dtype for grad in grads} == {torch.float32}
    expected = dense_reference(x, weight, bias)
    expected = [expected, *torch.autograd.grad(expected.square().sum(), (x, weight, bias))]
    assert_close([y, *grads], expected, 2**-6)


# ---- The passes of the MLP


def random_passes(n, sites, channels, dtype):
    """h and a gradient (N, S, 4C) of the dtype, scale and factor (N, 1, 4C) of the dtype of sums."""
    h, grad = torch.randn(2, n, sites, channels, dtype=torch.float64).to(DEVICE, dtype)
    scale, factor = torch.randn(2, n, 1, channels, dtype=torch.float64).to(DEVICE, passes.sum_type(h))
    return h, grad, scale, factor


def passes_by_definition(h, grad, scale, factor):
    """Norm, y, dot and the gradients of h with and without a scale, by PyTorch's derivative of GELU."""
    h.requires_grad_()
    a = F.gelu(h)
    results = [a.norm(dim=1, keepdim=True), scale * a, (grad * a).sum(1, keepdim=True)]
    for grad_a in (scale * grad + factor * a, grad + factor * a):
        (grad_h,) = torch.autograd.grad(a, h, grad_a.detach(), retain_graph=True)
        results += [grad_h, grad_h.sum((0, 1))]
    return [a, *results]


@needs_kernels
@pytest.mark.parametrize(
    ("n", "sites", "channels", "dtype"),
    [
        (2, 1, 1, torch.float64),
        (2, 33, 65, torch.float64),
        (1, 600, 16, torch.float64),  # three programs an image
        (2, 40, 80, torch.float32),
        (2, 40, 80, torch.float16),
        (2, 40, 80, torch.bfloat16),
    ],
    ids=str,
)
def test_passes_of_the_mlp(n, sites, channels, dtype):
    h, grad, scale, factor = random_passes(n, sites, channels, dtype)
    a, norm = mlp_kernels.gelu_norm(h, True)
    results = [a, norm, mlp_kernels.scaled_gelu(h, None, scale), mlp_kernels.gelu_dot(h, None, grad)]
    for choice in (scale, None):
        results += mlp_kernels.gelu_grad(h, None, grad, choice, factor)
    assert {x.dtype for x in results} == {dtype, passes.sum_type(h)}
    assert mlp_kernels.gelu_norm(h, False)[0].numel() == 0
    expected = passes_by_definition(*(x.double() for x in (h, grad, scale, factor)))
    assert_close(results, [x.detach() for x in expected], TOLERANCE[dtype])


@needs_kernels
def test_passes_of_an_empty_batch():
    h, grad, scale, factor = random_passes(0, 4, 8, torch.float32)
    assert mlp_kernels.gelu_grad(h, None, grad, scale, factor)[0].shape == (0, 4, 8)


# ---- They are operators of PyTorch


def operators(packed):
    """The two operators with small arguments, float64 with gradients, and all that the first can give."""
    visible = torch.tensor([[0, 3], [1, 2]], device=DEVICE)
    tables = [visible.int(), patch_slots(visible, (2, 2))] if packed else [None, None]
    x, grad = torch.randn(2, *((2, 8, 3) if packed else (2, 3, 2, 3)), dtype=torch.float64, device=DEVICE)
    taps, bias, added, shift = torch.randn(49, 3).to(x), torch.randn(3).to(x), torch.randn_like(x), torch.randn(3).to(x)
    for tensor in (x, grad, taps, bias, added, shift):
        tensor.requires_grad_()
    return (kernels._conv, (x, taps, bias, added, shift, True, *tables)), (kernels._weight_grad, (x, grad, *tables))


PACKED = pytest.mark.parametrize("packed", [False, True], ids=["dense", "packed"])


@on_the_host
def test_operators_pass_the_checks_of_pytorch():
    """In a process of its own: they start threads of autograd, after which no other test could fork runs."""
    code = """
        import sys
        sys.path.append("tests")
        import test_kernels, torch
        for packed in (False, True):
            for operator, inputs in test_kernels.operators(packed):
                torch.library.opcheck(operator, inputs)
    """
    subprocess.run([sys.executable, "-c", textwrap.dedent(code)], check=True, cwd=Path(__file__).parents[1])


@on_the_host
@PACKED
def test_operators_have_the_derivatives_of_finite_differences_and_those_too(packed):
    for operator, inputs in operators(packed):
        assert torch.autograd.gradcheck(operator, inputs, fast_mode=True)
        assert torch.autograd.gradgradcheck(operator, inputs, fast_mode=True)


@needs_kernels
def test_kernels_change_no_input_and_give_what_tracing_expects():
    for operator, inputs in operators(packed=True):
        torch.library.opcheck(operator, inputs, test_utils=("test_schema", "test_faketensor"))


@needs_kernels
@PACKED
def test_kernel_equals_the_reference_beside_it(packed):
    for operator, inputs in operators(packed):
        results, expected = (tree_leaves(f(*inputs)) for f in (operator, operator._init_fn))
        assert_close(results, expected, 1e-14)


class Failing:
    """A kernel that raises."""

    __name__ = "failing"

    def __init__(self, error):
        self.error = error

    def __getitem__(self, grid):
        raise self.error

    def warmup(self, *dtypes, **sizes):
        raise self.error


@pytest.fixture
def nothing_tried():
    """As at the start of a process: nothing is known of any device."""
    caches = triton_switch.triton_works, triton_switch._try_and_warn
    for cache in caches:
        cache.cache_clear()
    yield
    for cache in caches:
        cache.cache_clear()


@needs_kernels
def test_kernels_run_by_default_where_they_work(nothing_tried, monkeypatch):
    calls = []
    monkeypatch.setattr(kernels, "depthwise_conv", lambda x, *_, **__: calls.append(1) or (x, x))
    use_triton(None)
    assert triton_works(DEVICE) is None
    dense(*random_inputs(2, 8, 4, 4))
    assert calls


@needs_kernels
def test_kernels_are_tried_in_their_own_dtypes_whatever_those_of_the_first_use(nothing_tried):
    with torch.autocast(DEVICE, torch.bfloat16):
        assert triton_works(DEVICE) is None
    triton_works.cache_clear()
    torch.set_default_dtype(torch.float64)
    try:
        assert triton_works(DEVICE) is None
    finally:
        torch.set_default_dtype(torch.float32)


@needs_kernels
def test_all_kernels_to_be_tried_are_compiled_at_once(nothing_tried, monkeypatch):
    compiled = []
    monkeypatch.setattr(launch, "compile_variants", lambda variants: compiled.extend(name for name, *_ in variants))
    assert triton_works(DEVICE) is None
    dtypes = 2 if DEVICE == "cuda" else 1
    of_mlp = ["_gelu_norm_kernel", "_scaled_gelu_kernel", "_gelu_dot_kernel", "_gelu_grad_kernel"]
    assert compiled == dtypes * ["_conv_kernel", "_conv_kernel", "_weight_grad_kernel", *of_mlp]


@needs_kernels
def test_kernels_that_fail_are_given_up_once_for_the_process(nothing_tried, monkeypatch):
    use_triton(None)
    monkeypatch.setattr(kernels, "_weight_grad_kernel", Failing(RuntimeError("no such GPU")))
    inputs = random_inputs(2, 8, 4, 4)
    with pytest.warns(
        UserWarning, match="Triton kernels are off, plain PyTorch runs instead: RuntimeError: no such GPU"
    ) as warned:
        results = outputs_and_grads(dense, *inputs)
        outputs_and_grads(dense, *inputs)
    assert len(warned) == 1
    assert_close(results, outputs_and_grads(dense_reference, *inputs), 1e-14)
    assert "no such GPU" in triton_works(torch.device(DEVICE))


@needs_kernels
def test_a_full_memory_is_no_reason_to_give_kernels_up(nothing_tried, monkeypatch):
    monkeypatch.setattr(kernels, "_conv_kernel", Failing(torch.OutOfMemoryError("full")))
    with pytest.raises(torch.OutOfMemoryError, match="full"):
        triton_works(DEVICE)


@needs_kernels
def test_wrong_results_are_a_reason_to_give_kernels_up(nothing_tried, monkeypatch):
    class Nothing:
        __name__ = "nothing"

        def __getitem__(self, grid):
            return lambda *inputs, **sizes: inputs[5].zero_()

        def warmup(self, *dtypes, **sizes):
            pass

    monkeypatch.setattr(kernels, "_conv_kernel", Nothing())
    assert "wrong results" in triton_works(DEVICE)


@needs_kernels
def test_a_kernel_that_fails_later_fails_loudly(monkeypatch):
    use_triton(True)
    monkeypatch.setattr(kernels, "_conv_kernel", Failing(RuntimeError("no such GPU")))
    with pytest.raises(RuntimeError, match="no such GPU"):
        dense(*random_inputs(2, 8, 4, 4))


def test_second_derivatives_are_those_of_pytorch():
    """A product with the Hessian."""
    visible = random_visible(2, (2, 2), 3)
    sites = active_sites(visible, (2, 2), 1)
    inputs = random_inputs(2, 3, 4)
    direction = [torch.randn_like(x) for x in inputs]

    def hessian_times_direction(function):
        copies = [x.clone().requires_grad_() for x in inputs]
        grads = torch.autograd.grad(function(*copies).pow(3).sum(), copies, create_graph=True)
        return torch.autograd.grad(grads, copies, direction)

    use_triton(True)
    results = hessian_times_direction(lambda *x: packed(*x, sites))
    assert_close(results, hessian_times_direction(lambda *x: reference(*x, visible, (2, 2), 1)), 1e-13)


def make_fcmae(**options):
    model = FCMAE(16, patch_size=8, decoder_embed_dim=16, norm_pix_loss=True, **TINY | options)
    return randomise(model).to(DEVICE)


def fcmae_step(model):
    """Loss, prediction and all gradients for fixed images."""
    generator = torch.Generator().manual_seed(2)
    imgs, noise = torch.randn(2, 3, 16, 16, generator=generator), torch.rand(2, 4, generator=generator)
    loss, pred, _ = model(imgs.to(DEVICE), mask_ratio=0.5, noise=noise.to(DEVICE))
    return [loss, pred, *torch.autograd.grad(loss, list(model.parameters()))]


@needs_kernels
def test_compiled_pretraining_step_keeps_the_kernels_and_is_that_of_plain_pytorch():
    model, operators = make_fcmae(depths=(1, 0, 0, 0)), Counter()
    plain = fcmae_step(model)

    def keep(graph, inputs):
        operators.update(str(node.target) for node in graph.graph.nodes)
        return make_boxed_func(graph)

    use_triton(None)  # decided while tracing
    # The backend "aot_eager", but that it shows its graphs, forward and backward
    compiled = torch.compile(model, fullgraph=True, backend=aot_autograd(fw_compiler=keep, bw_compiler=keep))
    assert_close(fcmae_step(compiled), plain, 1e-5)
    # A block in the encoder, one in the decoder; each convolution once forward and once backward
    assert operators["models.depthwise_conv.default"] == 4
    assert operators["models.depthwise_conv_weight_grad.default"] == 2


@needs_kernels
@pytest.mark.parametrize("block", [Block, SparseBlock])
def test_block_is_that_of_plain_pytorch(block):
    block = randomise(block(8)).to(DEVICE)
    sites = [active_sites(random_visible(2, (3, 3), 5), (3, 3), 1)] if isinstance(block, SparseBlock) else []
    x = torch.randn((2, 5, 8) if sites else (2, 8, 3, 4), device=DEVICE, requires_grad=True)

    def step():
        y = block(x, *sites)
        return [y, *torch.autograd.grad(y.square().sum(), [x, *block.parameters()])]

    plain = step()
    use_triton(True)
    assert_close(step(), plain, 1e-5)


@needs_kernels
def test_a_block_with_another_mlp_calls_it():
    class Mine(Block):
        def mlp(self, x):
            return 0 * x

    use_triton(True)
    block, x = randomise(Mine(8)).to(DEVICE), torch.randn(2, 8, 3, 4, device=DEVICE)
    assert torch.equal(block(x), x)
    block = randomise(Block(8)).to(DEVICE)
    block.mlp = lambda x: 0 * x
    assert torch.equal(block(x), x)


@needs_kernels
def test_an_empty_batch_has_gradients_of_zero():
    use_triton(True)
    block, x = Block(8).to(DEVICE), torch.zeros(0, 8, 3, 4, device=DEVICE, requires_grad=True)
    block(x).sum().backward()
    assert x.grad.shape == x.shape and not block.dwconv.weight.grad.any() and not block.pwconv2.bias.grad.any()


@needs_kernels
def test_a_shortcut_without_gradients_costs_no_convolution(monkeypatch):
    """Nor is anything else lost: the last layer's and GRN's parameters are frozen, and x is an image."""
    use_triton(True)
    block, x = randomise(Block(8)).to(DEVICE), torch.randn(2, 8, 3, 4, device=DEVICE)
    for parameter in (*block.pwconv2.parameters(), *block.grn.parameters()):
        parameter.requires_grad_(False)
    y = block(x)
    monkeypatch.setattr(kernels, "_conv", lambda *_: pytest.fail("a convolution of no use"))
    y.sum().backward()
    assert block.dwconv.weight.grad.any()


# ---- Where they run


@on_the_host
def test_kernels_are_for_7x7_on_cuda(nothing_tried, monkeypatch):
    with FakeTensorMode():
        cpu, cuda = (torch.empty(1, 8, 4, 4, device=device) for device in ("cpu", "cuda"))
        assert not triton_switch.runs_in_triton(cuda)
        use_triton(True)
        assert triton_switch.runs_in_triton(cuda) and not triton_switch.runs_in_triton(cpu)
        with torch.device("cuda"):
            conv = torch.nn.Conv2d(8, 8, 5, padding=2, groups=8)
        monkeypatch.setattr(kernels, "depthwise_conv", lambda *_, **__: pytest.fail("a kernel for 5x5"))
        depthwise_conv(cuda, conv)
    use_triton(None)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.warns(UserWarning, match="Triton is not installed"):
        assert not triton_switch.runs_in_triton(cuda)


@on_the_host
def test_what_is_missing_is_named(nothing_tried, monkeypatch):
    """Where the trial fails, of a likely reason its remedy is told; else the error."""
    monkeypatch.setattr(kernels, "calls", lambda *_: 1 / 0)
    assert "ZeroDivisionError" in triton_works("cuda:7")
    triton_works.cache_clear()
    monkeypatch.delenv("CC", raising=False)
    monkeypatch.setattr("shutil.which", lambda name: None)
    assert triton_works("cuda:7") == "no C compiler (install gcc, or set CC)"


@on_the_host
def test_on_the_cpu_the_switch_changes_no_bit():
    model = make_fcmae().cpu()
    off = fcmae_step(model)
    use_triton(True)
    assert all(torch.equal(a, b) for a, b in zip(fcmae_step(model), off, strict=True))


@on_the_host
def test_models_do_without_triton():
    code = """
        import sys
        sys.modules["triton"] = None  # its import fails
        import torch
        from models import triton_switch, fcmae
        triton_switch.use_triton(True)
        fcmae.FCMAE(32, depths=(1, 1, 1, 1), dims=(8, 8, 8, 8))(torch.zeros(1, 3, 64, 64))
        assert "models.kernels" not in sys.modules
    """
    subprocess.run([sys.executable, "-c", textwrap.dedent(code)], check=True, cwd=Path(__file__).parents[1])
