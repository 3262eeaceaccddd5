"""Every submodule is called as a module, so that other people's tools work on the models: adapters, hooks, tracers.

Each tool is the real one. References are the same weights in a copy that leaves all fast paths out.
"""

import copy
import os
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from conftest import free_port, gap, randomise
from torch import nn
from torch.nn.utils import prune

from models import utils
from models.convnextv2 import Block, ConvNeXtV2, convnextv2_atto
from models.convnextv2_sparse import SparseConvNeXtV2
from models.fcmae import FCMAE
from models.mlp import can_fuse
from models.sites import pack, unpack
from models.utils import GRN, LayerNorm, Stage

pytestmark = [
    pytest.mark.usefixtures("seed_and_one_thread"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning"),
]
# At 128 x 128 GRN is fused in the first two stages: 1024 and 256 sites for 8 and 16 channels
TINY = {"depths": (1, 1, 1, 1), "dims": (8, 16, 24, 32)}
IMGS = torch.randn(2, 3, 128, 128, generator=torch.Generator().manual_seed(1))
MASK = torch.tensor([[0.0, 1.0] * 8, [1.0, 0.0] * 8])


class Encoder(nn.Module):
    """The sparse encoder as a function of images alone."""

    def __init__(self, encoder):
        super().__init__()
        self.encoder = encoder

    def forward(self, imgs):
        return self.encoder(imgs, MASK)


def dense():
    return randomise(ConvNeXtV2(num_classes=5, **TINY))


def sparse():
    return randomise(Encoder(SparseConvNeXtV2(**TINY)))


BOTH = pytest.mark.parametrize("build", [dense, sparse])


def trunk(model):
    """The network with `stages` and `downsample_layers`."""
    return getattr(model, "encoder", model)


def replace(model, name, change):
    """Put change(module) in the place of each submodule of that name."""
    for parent in list(model.modules()):
        if isinstance(getattr(parent, name, None), nn.Module):
            setattr(parent, name, change(getattr(parent, name)))
    return model


def step(model, imgs=IMGS):
    """Output and gradient of every parameter that takes one."""
    y = model(imgs)
    named = {name: p for name, p in model.named_parameters() if p.requires_grad}
    grads = torch.autograd.grad(y.square().sum(), list(named.values()), allow_unused=True)
    return {"output": y} | dict(zip(named, grads, strict=True))


def plain_step(model, monkeypatch):
    """`step` with all fast paths off: modules are called, and compute by plain operations."""
    with monkeypatch.context() as patch:
        patch.setattr(utils, "can_use_functions", lambda *_: False)
        return step(model)


def assert_same(results, expected, tolerance=1e-5):
    assert results.keys() == expected.keys()
    missing = [name for name, value in results.items() if value is None]
    assert not missing, missing
    gaps = {name: gap(value, expected[name]) for name, value in results.items()}
    assert not (wrong := {name: value for name, value in gaps.items() if not value <= tolerance}), wrong


# ---- The fast paths


@BOTH
def test_fast_paths_give_the_results_of_modules_that_are_called(build, monkeypatch):
    model = build()
    assert_same(step(model), plain_step(model, monkeypatch))


def test_nothing_but_what_is_plain_is_fused():
    x, block = torch.randn(2, 64, 8), Block(8)
    layers = [block.norm, block.pwconv1, block.act, block.grn, block.pwconv2]

    def fuses(x=x, **others):
        names = ["norm", "linear1", "act", "grn", "linear2"]
        return can_fuse(x, *(dict(zip(names, layers, strict=True)) | others).values())

    assert fuses() and not fuses(x.double()) and not fuses(x.bfloat16())
    for index, name in ((1, "linear1"), (4, "linear2")):
        linear = layers[index]
        subclass = type("Linear", (nn.Linear,), {})(linear.in_features, linear.out_features)
        patched, hooked, parametrized = (copy.deepcopy(linear) for _ in range(3))
        patched.forward = lambda x: x
        hooked.register_full_backward_hook(lambda *_: None)
        nn.utils.parametrizations.weight_norm(parametrized)
        others = patched, hooked, parametrized, nn.Linear(linear.in_features, linear.out_features, bias=False)
        for other in (subclass, *others, copy.deepcopy(linear).double()):
            assert not fuses(**{name: other}), other
    others = dict(act=nn.GELU("tanh")), dict(act=nn.ReLU()), dict(norm=nn.LayerNorm(8)), dict(grn=nn.Identity())
    for other in (*others, dict(norm=LayerNorm(8, data_format="channels_first"))):
        assert not fuses(**other), other
    handle = nn.modules.module.register_module_forward_hook(lambda *_: None)
    assert not fuses()
    handle.remove()
    with torch.autocast("cpu", torch.bfloat16):
        assert fuses(x.bfloat16()) and fuses() and not fuses(x.double())
    block.bfloat16()
    assert fuses(x.bfloat16()) and not fuses()


# ---- Modules of other kinds put in


class OtherGRN(GRN):
    def forward(self, x):
        return 2 * super().forward(x)


class OtherLinear(nn.Linear):
    def forward(self, x):
        return 2 * super().forward(x)


@BOTH
def test_subclasses_are_called(build, monkeypatch):
    def as_class(cls):
        def change(module):
            module.__class__ = cls
            return module

        return change

    for name, cls in (("grn", OtherGRN), ("pwconv2", OtherLinear)):
        model = build()
        before = model(IMGS)
        replace(model, name, as_class(cls))
        results = step(model)
        assert gap(results["output"], before) > 0.01
        assert_same(results, plain_step(model, monkeypatch))


@BOTH
@pytest.mark.parametrize(
    "options",
    [
        dict(kernel_size=7, padding=6, dilation=2),
        dict(kernel_size=7, padding=3, padding_mode="circular"),
        dict(kernel_size=7, padding=3, bias=False),
        dict(kernel_size=(1, 7), padding=(0, 3)),
        dict(kernel_size=3, padding=1),
    ],
    ids=["dilated", "circular", "no bias", "1x7", "3x3"],
)
def test_another_depthwise_convolution_is_the_convolution_it_says(build, options, monkeypatch):
    torch.manual_seed(0)
    model = build()
    for block in (block for block in model.modules() if isinstance(block, Block)):
        dim = block.dwconv.in_channels
        block.dwconv = nn.Conv2d(dim, dim, groups=dim, **options)
    randomise(model)
    if build is dense:
        assert_same(step(model), plain_step(model, monkeypatch))
    else:  # the reference masks each canvas by hand
        block = model.encoder.stages[0][0]
        calls = []
        handle = block.register_forward_hook(lambda block, inputs, output: calls.append((inputs, output)))
        assert_same(step(model), plain_step(model, monkeypatch))
        handle.remove()
        (rows, sites), y = calls[0]
        expected = rows + block.mlp(pack(block.dwconv(unpack(rows, sites)), sites))
        assert gap(y, expected) < 1e-6


@BOTH
def test_an_overlapping_stem_and_downsampling_run_as_they_are(build, monkeypatch):
    model = build()
    layers = trunk(model).downsample_layers
    layers[0][0] = nn.Conv2d(3, 8, kernel_size=7, stride=4, padding=3)
    layers[2][1] = nn.Conv2d(16, 24, kernel_size=3, stride=2, padding=1)
    layers[1][0] = nn.BatchNorm2d(8)
    randomise(model.eval())
    results = step(model)
    assert_same(results, plain_step(model, monkeypatch))
    if build is sparse:
        everything = copy.deepcopy(model.encoder)
        latent = everything(IMGS, torch.zeros(2, 16))
        x = IMGS
        for layer, stage in zip(layers, model.encoder.stages, strict=True):
            x = nn.Sequential.forward(layer, x)
            for block in stage:
                x = dense_block(block)(x)
        assert gap(latent, x) < 1e-5


def dense_block(sparse_block):
    block = Block(sparse_block.dwconv.in_channels)
    block.load_state_dict(sparse_block.state_dict())
    return block


# ---- Adapters, pruning, parametrizations


ADAPTERS = {
    "LoraConfig": dict(target_modules=r".*pwconv2", r=2, init_lora_weights=False),
    "IA3Config": dict(target_modules=r".*(pwconv2|dwconv)", feedforward_modules=r".*pwconv2"),
}


@BOTH
@pytest.mark.parametrize("config", ADAPTERS)
def test_adapters_are_trained_at_any_size_and_merge_into_the_weights(build, config):
    peft = pytest.importorskip("peft")
    adapted = peft.get_peft_model(build(), getattr(peft, config)(**ADAPTERS[config]))
    optimizer = torch.optim.SGD([p for p in adapted.parameters() if p.requires_grad], lr=1e-2)
    results = step(adapted)
    assert not [name for name, grad in results.items() if grad is None or grad.abs().max() == 0]
    adapted(IMGS).square().mean().backward()
    optimizer.step()
    expected = adapted(IMGS)
    merged = adapted.merge_and_unload()
    assert not [name for name, _ in merged.named_parameters() if "lora" in name or "ia3" in name]
    assert gap(merged(IMGS), expected) < 1e-4


@BOTH
def test_a_checkpoint_of_a_pruned_network_is_evaluated_as_it_was_trained(build):
    def pruned(model):
        for module in model.modules():
            if isinstance(module, nn.Linear | nn.Conv2d):
                prune.random_unstructured(module, "weight", 0.5)
        return model

    trained, loaded = pruned(build()), pruned(build())
    with torch.no_grad():
        for p in trained.parameters():
            p.add_(0.1)
    loaded.load_state_dict(trained.state_dict())
    assert gap(loaded.eval()(IMGS), trained.eval()(IMGS)) < 1e-6


@BOTH
def test_old_spectral_norm_is_applied_in_each_forward(build, monkeypatch):
    model = build()
    replace(model, "pwconv2", nn.utils.spectral_norm)
    replace(model, "dwconv", nn.utils.spectral_norm)
    expected = model.train()(IMGS)  # a power iteration
    assert gap(model.eval()(IMGS), expected) < 1e-5
    assert gap(step(model)["output"], plain_step(model, monkeypatch)["output"]) < 1e-5


@pytest.mark.filterwarnings("ignore:Unwrapped parameters")
def test_structured_pruning_of_torch_pruning():
    pruning = pytest.importorskip("torch_pruning")
    model = dense().eval()
    pruner = pruning.pruner.BasePruner(
        model,
        IMGS[:1],
        importance=pruning.importance.MagnitudeImportance(p=1),
        pruning_ratio=0.5,
        ignored_layers=[model.head],
    )
    pruner.step()
    block = model.stages[0][0]
    assert (block.dwconv.out_channels, block.grn.gamma.shape[-1], block.pwconv2.in_features) == (4, 16, 16)
    assert model(IMGS).isfinite().all()


# ---- Hooks


@BOTH
def test_hooks_of_every_submodule_are_called(build, monkeypatch):
    model, called = build(), set()
    expected = plain_step(model, monkeypatch)
    names = [name for name, module in model.named_modules() if not isinstance(module, nn.ModuleList)]
    for name in names:
        module = model.get_submodule(name)
        module.register_forward_hook(lambda *_, name=name: called.add(name))
        module.register_full_backward_hook(lambda *_, name=name: called.add(f"{name}, backward"))
    results = step(model)
    model(IMGS.clone().requires_grad_()).sum().backward()
    assert called == {f"{name}{when}" for name in names for when in ("", ", backward")}
    assert_same(results, expected)


@BOTH
def test_hooks_of_all_modules_are_called(build):
    model, called = build(), set()
    handle = nn.modules.module.register_module_forward_hook(lambda module, *_: called.add(module))
    model(IMGS)
    handle.remove()
    assert called >= {module for module in model.modules() if not isinstance(module, nn.ModuleList | nn.Sequential)}
    assert called >= {module for module in model.modules() if isinstance(module, Stage)}


def test_checkpoint_wrapper_on_stages_saves_memory_and_changes_no_gradient():
    from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

    for build in (dense, sparse):
        model = build()
        kept, results = [], []
        for wrapped in (False, True):
            if wrapped:
                stages = trunk(model).stages
                for i, stage in enumerate(stages):
                    stages[i] = checkpoint_wrapper(stage)
            sizes = []
            with torch.autograd.graph.saved_tensors_hooks(lambda x, to=sizes: to.append(x.nbytes) or x, lambda x: x):
                y = model(IMGS)
            kept.append(sum(sizes))
            grads = torch.autograd.grad(y.square().sum(), list(model.parameters()))
            results.append(dict(enumerate(grads)))
        assert kept[1] < 0.5 * kept[0]
        assert_same(*results, 0)


def test_a_class_activation_map_of_the_last_stage():
    model, maps = dense(), {}
    stage = model.stages[-1]
    stage.register_forward_hook(lambda _, inputs, output: maps.update(features=output))
    stage.register_full_backward_hook(lambda _, grad_in, grad_out: maps.update(grad=grad_out[0]))
    model(IMGS)[:, 1].sum().backward()
    cam = (maps["features"] * maps["grad"].mean((2, 3), keepdim=True)).sum(1).relu()
    assert cam.shape == (2, 4, 4) and cam.max() > 0


# ---- Counting, optimizing


def test_multiply_adds_by_other_counters():
    fvcore = pytest.importorskip("fvcore.nn")
    thop = pytest.importorskip("thop")
    model, imgs = convnextv2_atto(), torch.zeros(1, 3, 224, 224)
    counted = fvcore.FlopCountAnalysis(model, imgs).unsupported_ops_warnings(False).uncalled_modules_warnings(False)
    by_operator = counted.by_operator()
    assert (by_operator["conv"] + by_operator["linear"]) / 1e9 == pytest.approx(0.55, abs=0.005)
    assert (
        not counted.uncalled_modules()
        - {"downsample_layers", "stages"}
        - {name for name, module in model.named_modules() if isinstance(module, nn.Identity)}
    )
    assert thop.profile(model, (imgs,), verbose=False)[0] / 1e9 == pytest.approx(0.55, abs=0.005)


@pytest.mark.parametrize("model", [dense(), FCMAE(64, decoder_embed_dim=16, **TINY)])
def test_timm_decays_weights_of_convolutions_and_linear_layers_only(model):
    from timm.optim import create_optimizer_v2

    names = {id(p): name for name, p in model.named_parameters()}
    groups = create_optimizer_v2(model, "adamw", weight_decay=0.05).param_groups
    decayed = {names[id(p)] for group in groups if group["weight_decay"] for p in group["params"]}
    layers = {name for name, module in model.named_modules() if isinstance(module, nn.Linear | nn.Conv2d)}
    assert decayed == {f"{name}.weight" for name in layers}


# ---- Dtypes, devices, shards, quantization


@BOTH
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_a_model_of_half_precision_trains(build, dtype):
    model = build()
    exact = step(model)
    half = step(copy.deepcopy(model).to(dtype), IMGS.to(dtype))
    assert {value.dtype for value in half.values()} == {dtype}
    exact, half = (torch.cat([value.float().flatten() for value in r.values()]) for r in (exact, half))
    assert F.cosine_similarity(exact, half, dim=0) > 0.99


FSDP = """
    import copy, sys, torch, torch.distributed as dist
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
    from torch import nn
    from models.convnextv2 import ConvNeXtV2
    from models.fcmae import FCMAE

    torch.set_num_threads(1)
    dist.init_process_group("gloo", rank=0, world_size=1, init_method=f"tcp://127.0.0.1:{sys.argv[1]}")
    network = dict(depths=(1, 1, 1, 1), dims=(8, 16, 24, 32))
    imgs, noise = torch.randn(2, 3, 128, 128), torch.rand(2, 16)
    losses = {
        ConvNeXtV2: lambda model: model(imgs).float().square().sum(),
        FCMAE: lambda model: model(imgs, noise=noise, masked_only=True)[0],
    }
    for model in (ConvNeXtV2(num_classes=5, **network), FCMAE(128, decoder_embed_dim=16, **network)):
        loss = losses[type(model)]
        expected = dict(zip(dict(model.named_parameters()), torch.autograd.grad(loss(model), list(model.parameters()))))
        trunk = getattr(model, "encoder", model)
        for policy in (MixedPrecisionPolicy(), MixedPrecisionPolicy(param_dtype=torch.bfloat16)):
            for per in ("stage", "linear"):
                sharded = copy.deepcopy(model)
                trunk = getattr(sharded, "encoder", sharded)
                units = trunk.stages if per == "stage" else [m for m in sharded.modules() if isinstance(m, nn.Linear)]
                for unit in units:
                    fully_shard(unit, mesh=dist.device_mesh.init_device_mesh("cpu", (1,)), mp_policy=policy)
                fully_shard(sharded, mesh=dist.device_mesh.init_device_mesh("cpu", (1,)), mp_policy=policy)
                loss(sharded).backward()
                grads = torch.cat([p.grad.full_tensor().flatten() for p in sharded.parameters()])
                plain = torch.cat([expected[name].flatten() for name, _ in sharded.named_parameters()])
                similar = torch.cosine_similarity(grads, plain, 0)
                assert similar > (0.99 if policy.param_dtype else 1 - 1e-5), (type(model), per, policy, similar)
    dist.destroy_process_group()
"""


def test_fsdp2_shards_stages_and_linear_layers():
    command = [sys.executable, "-c", textwrap.dedent(FSDP), free_port()]
    subprocess.run(command, check=True, cwd=Path(__file__).parents[1], timeout=300)


@BOTH
def test_quantized_linear_layers_are_called(build):
    model = build().eval()
    expected = model(IMGS)
    quantized = torch.ao.quantization.quantize_dynamic(model, {nn.Linear})
    assert 0 < gap(quantized(IMGS), expected) < 0.2


@BOTH
def test_torchao_quantizes_weights(build):
    quantization = pytest.importorskip("torchao.quantization")
    model = build().eval()
    expected = model(IMGS)
    quantization.quantize_(model, quantization.Int8WeightOnlyConfig())
    assert 0 < gap(model(IMGS), expected) < 0.2


# ---- Transforms and tracers


@BOTH
def test_transforms_of_torch_func(build):
    model = build()
    parameters = {name: p.detach() for name, p in model.named_parameters()}
    expected = step(model)

    def loss(parameters):
        return torch.func.functional_call(model, parameters, (IMGS,)).square().sum()

    grads = torch.func.grad(loss)(parameters)
    assert_same(grads, {name: expected[name] for name in parameters}, 1e-4)
    tangents = {name: torch.randn_like(p) for name, p in parameters.items()}
    _, derivative = torch.func.jvp(loss, (parameters,), (tangents,))
    product = sum((grads[name] * tangents[name]).sum() for name in parameters)
    assert derivative.item() == pytest.approx(product.item(), rel=1e-3)
    with torch.autograd.forward_ad.dual_level():
        dual = {n: torch.autograd.forward_ad.make_dual(p, tangents[n]) for n, p in parameters.items()}
        tangent = torch.autograd.forward_ad.unpack_dual(loss(dual)).tangent
    assert tangent.item() == pytest.approx(product.item(), rel=1e-3)


def test_gradients_of_each_image_by_vmap():
    model = dense()
    parameters = {name: p.detach() for name, p in model.named_parameters()}

    def loss(parameters, image):
        return torch.func.functional_call(model, parameters, (image[None],)).square().sum()

    grads = torch.func.vmap(torch.func.grad(loss), (None, 0))(parameters, IMGS)
    assert_same({name: grad[1] for name, grad in grads.items()}, torch.func.grad(loss)(parameters, IMGS[1]), 1e-4)


def test_torch_fx_and_feature_extraction_of_torchvision():
    from torchvision.models.feature_extraction import create_feature_extractor

    model = dense()
    expected = step(model)
    assert_same(step(torch.fx.symbolic_trace(model)), expected)
    features = create_feature_extractor(model, {"stages.1": "second", "stages.3": "last"})(IMGS)
    assert features["second"].shape == (2, 16, 16, 16)
    assert gap(features["last"], model.forward_trunk(IMGS)) < 1e-5


@pytest.mark.parametrize("strict", [False, True])
def test_export_with_free_batch_height_and_width(strict):
    model = dense().eval()
    free = torch.export.Dim.DYNAMIC
    program = torch.export.export(model, (IMGS,), dynamic_shapes={"x": {0: free, 2: free, 3: free}}, strict=strict)
    for shape in ((1, 3, 64, 96), (3, 3, 160, 128)):
        imgs = torch.randn(shape)
        assert gap(program.module()(imgs), model(imgs)) < 1e-5


def test_torch_jit_trace():
    model = dense().eval()
    traced = torch.jit.trace(model, IMGS)
    imgs = torch.randn(1, 3, 64, 96)
    assert gap(traced(imgs), model(imgs)) < 1e-5


def test_a_compiled_model_is_one_graph_with_grn_fused():
    model = dense()
    expected, graphs = step(model), []

    def keep(graph, inputs):
        graphs.append(graph)
        return graph.forward

    compiled = torch.compile(model, fullgraph=True, backend=keep)
    assert gap(compiled(IMGS), expected["output"]) < 1e-5
    subgraphs = [graph for graph in graphs[0].modules() if isinstance(graph, torch.fx.GraphModule)]
    targets = [str(node.target) for graph in subgraphs for node in graph.graph.nodes]
    assert len(graphs) == 1 and sum("baddbmm" in target for target in targets) == 2


# ---- Shapes


def test_a_batch_of_0():
    empty = torch.zeros(0, 3, 64, 64)
    classifier = dense()
    assert classifier(empty).shape == (0, 5)
    assert classifier(empty, window=(1, 1)).shape == (0, 5)
    classifier(empty).sum().backward()
    encoder, mask = SparseConvNeXtV2(**TINY), torch.zeros(0, 4)
    assert encoder(empty, mask, visible=mask[:, :2].long()).shape == (0, encoder.dims[-1], 2, 2)


# ---- The models alone


ALONE = """
    import sys
    sys.path.insert(0, sys.argv[1])
    import torch
    from models import convnextv2, fcmae, cost

    slow = {"timm", "triton", "torchvision", "torch._dynamo"} & sys.modules.keys()
    assert not slow, slow
    network = dict(depths=(1, 1, 1, 1), dims=(8, 8, 8, 8))
    imgs = torch.zeros(1, 3, 64, 64)
    convnextv2.ConvNeXtV2(drop_path_rate=0.1, **network)(imgs).sum().backward()
    fcmae.FCMAE(64, **network)(imgs)[0].backward()
    print(cost.describe(lambda: convnextv2.convnextv2_atto(), 3, (224, 224)))
    others = {module for module in sys.modules if module in ("utils", "datasets", "hooks", "run", "checkpoints")}
    assert not others, others
"""


def test_models_work_without_the_rest_of_the_project(tmp_path):
    (tmp_path / "models").symlink_to(Path(utils.__file__).parent)
    command = [sys.executable, "-I", "-c", textwrap.dedent(ALONE), tmp_path]
    result = subprocess.run(command, check=True, cwd=tmp_path, capture_output=True, text=True, env=os.environ)
    assert "3.7 M parameters, 0.547 G multiply-adds" in result.stdout
