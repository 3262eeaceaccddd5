"""What the models promise: the original's numbers, no information from masked patches, one set of weights for all.

The references are independent: files written by the original code, MinkowskiEngine, a dense masked network, timm,
PyTorch's own derivatives, numpy. Parameters are random throughout, so that no term hides behind a zero.
"""

import functools
import json
import os
import re
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
import torch.nn.functional as F
from conftest import gap, randomise
from safetensors import safe_open
from sklearn.datasets import load_digits

from models import convnextv2, fcmae, mlp, utils
from models.convnextv2 import SIZES, ConvNeXtV2
from models.convnextv2_sparse import SparseConvNeXtV2, count_visible
from models.cost import cost
from models.depthwise import depthwise_conv
from models.fcmae import FCMAE
from models.mlp import can_fuse
from models.utils import GRN
from models.weights import remap_checkpoint_keys
from tools.dense_masked import DenseMasked

pytestmark = pytest.mark.usefixtures("seed_and_one_thread")
TINY = {"depths": (1, 1, 2, 1), "dims": (8, 16, 24, 32)}


def make_fcmae(grid=(4, 4), patch_size=32, **kwargs):
    """A narrow FCMAE with random parameters for images of grid (h, w) patches."""
    img_size = tuple(patch_size * side for side in grid)
    return randomise(FCMAE(img_size, patch_size=patch_size, decoder_embed_dim=16, **TINY | kwargs))


def make_batch(model, n=2, dtype=torch.float32):
    """Random images (n, in_chans, H, W), and noise (n, L) that makes each image another mask."""
    height, width = model.img_size
    imgs = torch.randn(n, model.in_chans, height, width, dtype=dtype)
    return imgs, torch.rand(n, height * width // model.patch_size**2, dtype=dtype)


def run(model, imgs, noise):
    """What a training step computes, by name: latent, loss, pred and the gradient of every parameter."""
    latent, mask = model.forward_encoder(imgs, model.mask_ratio, noise)
    pred = model.forward_decoder(latent, mask)
    loss = model.forward_loss(imgs, pred, mask)
    grads = torch.autograd.grad(loss, list(model.parameters()))
    named = {name: grad for (name, _), grad in zip(model.named_parameters(), grads, strict=True)}
    return {"latent": latent, "loss": loss, "pred": pred} | named


def assert_close(results, reference, tolerance):
    """Two dicts of tensors hold the same names, and values within a relative tolerance."""
    assert results.keys() == reference.keys()
    gaps = {name: gap(value, reference[name]) for name, value in results.items()}
    assert not (wrong := {name: value for name, value in gaps.items() if not value <= tolerance}), wrong


def count_parameters(model):
    return sum(p.numel() for p in model.parameters())


# ---- The encoder computes the original's submanifold sparse convolution


def test_weights_outputs_and_gradients_are_those_of_the_original():
    with safe_open(Path(__file__).with_name("fcmae_minkowski.safetensors"), "pt") as file:
        meta, saved = file.metadata(), {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118, not iterable
    state, grads = (
        remap_checkpoint_keys({k.removeprefix(prefix): v for k, v in saved.items() if k.startswith(prefix)})
        for prefix in ("state.", "grad.")
    )
    model = FCMAE(
        int(meta["size"]),
        depths=json.loads(meta["depths"]),
        dims=json.loads(meta["dims"]),
        decoder_embed_dim=int(meta["decoder_embed_dim"]),
        norm_pix_loss=True,
    )
    model.load_state_dict(state, strict=True)

    latent = model.encoder(saved["imgs"], saved["mask"])
    pred = model.forward_decoder(latent, saved["mask"])
    loss = model.forward_loss(saved["imgs"], pred, saved["mask"])
    loss.backward()

    torch.testing.assert_close(latent, saved["latent"], rtol=0, atol=2e-6)
    torch.testing.assert_close(pred, saved["pred"], rtol=0, atol=2e-6)
    assert abs(loss.item() - saved["loss"].item()) <= 1e-6
    assert_close({name: p.grad for name, p in model.named_parameters()}, grads, 1e-5)


@pytest.mark.parametrize(("n", "grid"), [(1, (4, 4)), (3, (4, 4)), (3, (2, 3))])
def test_packed_equals_minkowski_engine(n, grid):
    if not os.environ.get("REQUIRE_MINKOWSKI"):  # set where it must be there: then a failed import fails the test
        pytest.importorskip("models.convnextv2_minkowski", exc_type=ImportError)
    packed, minkowski = (make_fcmae(grid, sparse_backend=backend).double() for backend in ("packed", "minkowski"))
    packed.load_state_dict(minkowski.state_dict(), strict=True)
    minkowski.load_state_dict(packed.state_dict(), strict=True)
    batch = make_batch(packed, n, torch.float64)
    assert_close(run(packed, *batch), run(minkowski, *batch), 1e-12)


@pytest.mark.parametrize(
    ("size", "grid", "in_chans", "patch_size", "mask_ratio"),
    [
        ("atto", (4, 4), 3, 32, 0.6),
        ("atto", (4, 6), 1, 8, 0.25),
        ("atto", (6, 4), 5, 16, 0.9),
        ("nano", (4, 4), 1, 16, 0.9),
        ("nano", (3, 2), 3, 8, 0.6),
        ("nano", (2, 3), 5, 32, 0.25),
        ("tiny", (4, 4), 5, 8, 0.25),
        ("tiny", (4, 6), 3, 16, 0.6),
        ("tiny", (6, 4), 1, 32, 0.9),
        ("base", (4, 4), 3, 8, 0.9),
        ("base", (2, 3), 5, 16, 0.6),
        ("base", (3, 2), 1, 32, 0.25),
    ],
)
def test_packed_equals_a_dense_network_that_masks_every_activation(size, grid, in_chans, patch_size, mask_ratio):
    depths = SIZES[f"convnextv2_{size}"]["depths"]
    model = make_fcmae(grid, patch_size, in_chans=in_chans, depths=depths, mask_ratio=mask_ratio).double()
    batch = make_batch(model, dtype=torch.float64)
    packed = run(model, *batch)
    model.encoder = DenseMasked(model.encoder)
    assert_close(packed, run(model, *batch), 1e-12)


def test_packed_with_nothing_masked_equals_the_dense_classifier_on_the_same_state_dict():
    dense, encoder = (randomise(model(**TINY)).double() for model in (ConvNeXtV2, SparseConvNeXtV2))
    missing, unexpected = dense.load_state_dict(encoder.state_dict(), strict=False)
    assert set(missing) == {"norm.weight", "norm.bias", "head.weight", "head.bias"} and not unexpected
    imgs = torch.randn(2, 3, 64, 96, dtype=torch.float64)
    latent = encoder(imgs, torch.zeros(2, 6))
    assert gap(dense.head(dense.norm(latent.mean((2, 3)))), dense(imgs)) <= 1e-12


@pytest.mark.parametrize("fill", [100.0, torch.nan])
def test_latent_does_not_depend_on_one_bit_of_masked_pixels(fill):
    model = make_fcmae((3, 4))
    imgs, noise = make_batch(model)
    latent, mask = model.forward_encoder(imgs, 0.6, noise)
    masked = mask.view(2, 1, 3, 4).repeat_interleave(32, 2).repeat_interleave(32, 3).bool()
    assert torch.equal(model.encoder(imgs.masked_fill(masked, fill), mask), latent)


def test_latent_does_not_depend_on_the_other_images_of_the_batch():
    model = make_fcmae((3, 4)).double()
    imgs, noise = make_batch(model, 4, torch.float64)
    latent, mask = model.forward_encoder(imgs, 0.6, noise)
    for i in range(4):
        assert gap(latent[i : i + 1], model.encoder(imgs[i : i + 1], mask[i : i + 1])) <= 1e-12


def test_latent_is_one_site_a_patch_and_zero_exactly_where_masked():
    model = make_fcmae((3, 4))
    imgs, noise = make_batch(model)
    latent, mask = model.forward_encoder(imgs, 0.6, noise)
    assert latent.shape == (2, 32, 3, 4)
    assert torch.equal((latent == 0).flatten(2), mask[:, None].bool().expand(-1, 32, -1))


def test_numbers_of_visible_patches_are_only_a_hint():
    model = make_fcmae()
    imgs, noise = make_batch(model)
    mask = model.gen_random_mask(imgs, 0.6, noise)
    visible = (mask == 0).nonzero()[:, 1].view(2, 6)
    assert torch.equal(model.encoder(imgs, mask), model.encoder(imgs, mask, visible=visible))


def test_encode_all_masks_nothing():
    model = make_fcmae((2, 3))
    imgs, _ = make_batch(model)
    assert torch.equal(model.encode_all(imgs), model.encoder(imgs, torch.zeros(2, 6)))


# ---- Layers


def grn_by_norm(x, gamma, beta):
    """Algorithm 1 of the paper, word for word, of (N, ..., C)."""
    gx = torch.norm(x.flatten(1, -2), p=2, dim=1).view(len(x), *[1] * (x.ndim - 2), -1)
    nx = gx / (gx.mean(dim=-1, keepdim=True) + 1e-6)
    return gamma.flatten() * (x * nx) + beta.flatten() + x


def outputs_and_grads(function, *inputs):
    """The output of function(*inputs), and the gradients of a fixed random projection of it for each input."""
    inputs = [x.detach().requires_grad_() for x in inputs]
    y = function(*inputs)
    projection = torch.randn(y.shape, generator=torch.Generator().manual_seed(1)).to(y.dtype)
    return dict(enumerate((y, *torch.autograd.grad(y, inputs, projection))))


def grn(x, gamma, beta):
    """`GRN` as a function of its parameters too."""
    return torch.func.functional_call(GRN(x.shape[-1]), {"gamma": gamma, "beta": beta}, x)


GRN_SHAPES = pytest.mark.parametrize("shape", [(2, 3, 4, 5), (2, 6, 5)], ids=["dense", "packed"])


def grn_inputs(shape, dtype=torch.float64):
    return [torch.randn(size, dtype=dtype) for size in (shape, (1, 1, 1, shape[-1]), (1, 1, 1, shape[-1]))]


@GRN_SHAPES
def test_grn_has_the_derivatives_of_finite_differences(shape):
    inputs = [x.requires_grad_() for x in grn_inputs(shape)]
    assert torch.autograd.gradcheck(grn, inputs) and torch.autograd.gradgradcheck(grn, inputs, fast_mode=True)


@GRN_SHAPES
def test_grn_is_algorithm_1_even_where_a_channel_is_zero(shape):
    x, gamma, beta = grn_inputs(shape)
    x[0, ..., 2] = 0  # one channel of one image: the norm has no derivative there
    assert_close(outputs_and_grads(grn, x, gamma, beta), outputs_and_grads(grn_by_norm, x, gamma, beta), 1e-12)


def mlp_inputs(shape, dtype=torch.float64):
    """x (N, H, W, C), weight and bias of the norm (C,), of the first linear layer, gamma and beta (1, 1, 1, 4C), ..."""
    shapes = (*shape, 3), (3,), (3,), (12, 3), (12,), (1, 1, 1, 12), (1, 1, 1, 12), (3, 12), (3,)
    return [torch.randn(shape, dtype=dtype) for shape in shapes]


def call_mlp(x, *parameters):
    """`Block.mlp` as a function of its parameters too, in the order of the layers."""
    block = convnextv2.Block(3).to(x.dtype)
    layers = block.norm, block.pwconv1, block.act, block.grn, block.pwconv2
    assert can_fuse(x, *layers)
    names = [name for name, _ in block.named_parameters() if not name.startswith("dwconv")]
    with torch.nn.utils.stateless._reparametrize_module(block, dict(zip(names, parameters, strict=True))):
        return block.mlp(x)


def mlp_by_definition(x, norm_weight, norm_bias, weight1, bias1, gamma, beta, weight2, bias2):
    a = F.gelu(F.linear(F.layer_norm(x, x.shape[-1:], norm_weight, norm_bias, 1e-6), weight1, bias1))
    return F.linear(grn_by_norm(a, gamma, beta), weight2, bias2)


# Images, height, width, of 3 channels: nothing, norm and beta, or GRN's scale too is folded into the weights
FOLDED = pytest.mark.parametrize("shape", [(2, 1, 5), (4, 3, 5), (2, 5, 5)], ids=["nothing", "affine", "scale"])


@FOLDED
def test_the_fused_mlp_has_the_value_and_derivatives_of_its_definition(shape):
    inputs = mlp_inputs(shape)
    inputs[3][1], inputs[4][1] = 0, 0  # a dead channel
    assert_close(outputs_and_grads(call_mlp, *inputs), outputs_and_grads(mlp_by_definition, *inputs), 1e-12)
    inputs = [x.requires_grad_() for x in mlp_inputs(shape)]
    assert torch.autograd.gradcheck(call_mlp, inputs, fast_mode=True)
    assert torch.autograd.gradgradcheck(call_mlp, inputs, fast_mode=True)


@FOLDED
def test_a_zero_channel_has_finite_second_derivatives(shape):
    inputs = mlp_inputs(shape)
    inputs[3][1], inputs[4][1] = 0, 0
    inputs = [x.requires_grad_() for x in inputs]
    grads = torch.autograd.grad(call_mlp(*inputs).square().sum(), inputs, create_graph=True)
    assert all(x.isfinite().all() for x in torch.autograd.grad(sum(g.square().sum() for g in grads), inputs))


@FOLDED
def test_small_changes_of_gamma_count_in_low_precision(shape):
    """1 + gamma n is not rounded to bfloat16, where it would be 1 for all gamma n below 0.002."""
    inputs = [x.bfloat16().double() for x in mlp_inputs(shape)]
    inputs[5] = torch.full_like(inputs[5], 1e-3)
    with_gamma, without = (mlp_by_definition(*inputs[:5], gamma, *inputs[6:]) for gamma in (inputs[5], 0 * inputs[5]))

    def low(gamma):
        parameters = [x.float() for x in inputs]
        parameters[5] = gamma.float()
        with torch.autocast("cpu", torch.bfloat16):
            return call_mlp(*parameters).double()

    change = low(inputs[5] * 2) - low(0 * inputs[5])
    expected = 2 * (with_gamma - without)
    assert F.cosine_similarity(change.flatten(), expected.flatten(), 0) > 0.3


def test_gradients_of_the_norm_are_not_summed_in_low_precision():
    block, x = convnextv2.Block(64), torch.randn(8, 7, 7, 64)
    rows = torch.randn(8, 7, 7, 64)

    def gradients(dtype, autocast):
        inputs = x.to(dtype).requires_grad_()
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            out = block.to(dtype).mlp(inputs)
        return torch.cat(torch.autograd.grad(out, [block.norm.weight, block.norm.bias], rows.to(out)))

    low, exact = gradients(torch.float32, True).double(), gradients(torch.float64, False)
    assert (low - exact).norm() < 0.01 * exact.norm()


def test_parameters_are_folded_into_weights_only_where_that_saves_passes():
    rows = [torch.empty(images, sites, 2) for images, sites in ((3, 10), (4, 8), (4, 15), (1, 16))]
    assert [(mlp.folds_affine(x), mlp.folds_scale(x)) for x in rows] == [(0, 0), (1, 0), (1, 0), (1, 1)]


def test_grn_of_large_float16_does_not_overflow():
    x, gamma, beta = grn_inputs((2, 8, 8, 5), torch.float16)
    x = x.sign() * 300 + x  # 300 squared is beyond float16
    half = outputs_and_grads(grn, x, gamma, beta)
    reference = outputs_and_grads(grn_by_norm, x.double(), gamma.double(), beta.double())
    assert_close({name: value.double() for name, value in half.items()}, reference, 5e-3)


@pytest.mark.parametrize("order", ["NHWC", "HWNC", "NCHW"])
@pytest.mark.parametrize("size", [(1, 1), (2, 3), (7, 7), (9, 12)], ids=str)
def test_depthwise_conv_and_its_gradients_are_those_of_torch(order, size):
    x = torch.randn(3, 4, *size, dtype=torch.float64)
    to_memory = ["NCHW".index(axis) for axis in order]
    x = x.permute(to_memory).contiguous().permute([order.index(axis) for axis in "NCHW"])
    weight, bias = torch.randn(4, 1, 7, 7, dtype=torch.float64), torch.randn(4, dtype=torch.float64)
    conv = torch.nn.Conv2d(4, 4, 7, padding=3, groups=4)

    def ours(x, weight, bias):
        conv.weight, conv.bias = torch.nn.Parameter(weight), torch.nn.Parameter(bias)
        y, _ = depthwise_conv(x, conv)
        projection = torch.randn(y.shape, generator=torch.Generator().manual_seed(1)).to(y.dtype)
        return y, *torch.autograd.grad(y, (x, conv.weight, conv.bias), projection)

    ours = dict(enumerate(ours(x.requires_grad_(), weight, bias)))
    assert_close(ours, outputs_and_grads(functools.partial(F.conv2d, padding=3, groups=4), x, weight, bias), 1e-12)


# ---- The eight sizes, and timm


@pytest.mark.parametrize(
    ("size", "millions"),
    # The paper's table
    {"atto": 3.7, "femto": 5.2, "pico": 9.1, "nano": 15.6, "tiny": 28.6, "base": 89, "large": 198, "huge": 660}.items(),
)
def test_size_has_the_parameters_of_the_paper_of_timm_and_of_its_encoder(size, millions, monkeypatch):
    # `torch.device("meta")` builds without memory; older timm's drop path rates need a device that has some
    monkeypatch.setattr(torch, "linspace", functools.partial(torch.linspace, device="cpu"))
    name = f"convnextv2_{size}"
    with torch.device("meta"):
        model, encoder = getattr(convnextv2, name)(), getattr(fcmae, name)().encoder
        reference = timm.create_model(name)
    count = count_parameters(model)
    assert round(count / 1e6, 1 if isinstance(millions, float) else 0) == millions
    assert count == count_parameters(reference)
    assert count == count_parameters(encoder) + count_parameters(model.norm) + count_parameters(model.head)


def test_there_are_eight_sizes():
    assert len(SIZES) == 8


# ---- Masks


@pytest.mark.parametrize(
    ("grid", "mask_ratio", "keep"),
    [((7, 7), 0.6, 19), ((7, 7), 0.75, 12), ((2, 3), 0.6, 2), ((4, 4), 0.9, 1), ((4, 4), 0.01, 15)],
)
def test_mask_keeps_the_patches_of_the_lowest_noise(grid, mask_ratio, keep):
    model = make_fcmae(grid, patch_size=8)
    imgs, noise = make_batch(model, 5)
    mask = model.gen_random_mask(imgs, mask_ratio, noise)
    assert torch.equal(mask, (noise.argsort(1).argsort(1) >= keep).float())
    drawn = model.gen_random_mask(imgs, mask_ratio)
    assert ((drawn == 0).sum(1) == keep).all() and ((drawn == 1).sum(1) == noise.shape[1] - keep).all()
    assert not torch.equal(drawn, model.gen_random_mask(imgs, mask_ratio))


@pytest.mark.parametrize("mask_ratio", [0, 1, 0.95, 1.5, -0.5])
def test_mask_of_no_or_all_patches_is_refused(mask_ratio):
    model = make_fcmae()
    with pytest.raises(ValueError, match=f"mask_ratio {mask_ratio} leaves"):
        model(make_batch(model)[0], mask_ratio=mask_ratio)


@pytest.mark.parametrize("rows", [[[0, 1, 1], [0, 0, 1]], [[1, 1, 1], [1, 1, 1]]], ids=["uneven", "all masked"])
def test_mask_must_leave_as_many_patches_in_every_image(rows):
    with pytest.raises(ValueError, match="must be one number"):
        count_visible(torch.tensor(rows))


# ---- Pixels, targets, loss


def patch_of(imgs, i, row, column, p):
    """The pixels of one patch of image i as a vector, channels running fastest."""
    return imgs[i, :, row * p : (row + 1) * p, column * p : (column + 1) * p].transpose(1, 2, 0).ravel()


@pytest.mark.parametrize("grid", [(3, 3), (2, 3)])
def test_patchify_is_rows_of_pixels_with_channels_last_and_unpatchify_its_inverse(grid):
    model = make_fcmae(grid, patch_size=8, in_chans=2)
    imgs, _ = make_batch(model)
    patches = model.patchify(imgs)
    assert patches.shape == (2, grid[0] * grid[1], 8 * 8 * 2)
    n, c, row, column, y, x = 1, 1, 1, 2, 3, 5
    assert patches[n, row * grid[1] + column, (y * 8 + x) * 2 + c] == imgs[n, c, row * 8 + y, column * 8 + x]
    assert torch.equal(model.unpatchify(patches), imgs)
    assert torch.equal(make_fcmae(patch_size=8, in_chans=2).unpatchify(patches, grid), imgs)


@pytest.mark.parametrize("norm_pix_loss", [False, True])
def test_loss_is_the_mean_squared_error_of_masked_patches(norm_pix_loss):
    model = make_fcmae((2, 3), patch_size=8, norm_pix_loss=norm_pix_loss).double()
    imgs, noise = make_batch(model, dtype=torch.float64)
    imgs = 3 * imgs + 1
    imgs[0, :, :8, :8] = 1 / 3  # a patch of one color: only the epsilon divides
    noise[0, 0] = 2  # ... that is masked
    mask, pred = model.gen_random_mask(imgs, 0.6, noise), torch.randn(2, 192, 2, 3, dtype=torch.float64)
    errors = []
    for i, patch in mask.nonzero().tolist():
        row, column = divmod(patch, 3)
        target = patch_of(imgs.numpy(), i, row, column, 8)
        if norm_pix_loss:
            target = (target - target.mean()) / np.sqrt(target.var(ddof=1) + 1e-6)
        errors.append(np.mean((pred[i, :, row, column].numpy() - target) ** 2))
    assert len(errors) == 8
    assert model.forward_loss(imgs, pred, mask).item() == pytest.approx(np.mean(errors), rel=1e-10)
    assert model.forward_loss(imgs, pred.flatten(2).mT, mask).item() == pytest.approx(np.mean(errors), rel=1e-10)


@pytest.mark.parametrize("norm_pix_loss", [False, True])
def test_reconstruction_is_the_prediction_where_masked_and_the_image_elsewhere(norm_pix_loss):
    model = make_fcmae((2, 3), patch_size=8, norm_pix_loss=norm_pix_loss)
    imgs, noise = make_batch(model)
    mask = model.gen_random_mask(imgs, 0.6, noise)
    masked = mask.view(2, 1, 2, 3).repeat_interleave(8, 2).repeat_interleave(8, 3).bool().expand_as(imgs)

    as_maps = functools.partial(torch.unflatten, dim=2, sizes=(2, 3))  # (N, P, L) -> (N, P, h, w)
    pred = torch.randn(2, 6, 192)
    result = model.reconstruct(imgs, as_maps(pred.mT), mask)
    assert torch.equal(result[~masked], imgs[~masked])
    if not norm_pix_loss:
        assert torch.equal(result[masked], model.unpatchify(pred)[masked])

    patches = np.stack([patch_of(imgs.numpy(), i, r, c, 8) for i in range(2) for r in range(2) for c in range(3)])
    if norm_pix_loss:
        patches = (patches - patches.mean(1, keepdims=True)) / np.sqrt(patches.var(1, ddof=1, keepdims=True) + 1e-6)
    perfect = torch.from_numpy(patches).view(2, 6, 192)
    torch.testing.assert_close(model.reconstruct(imgs, as_maps(perfect.mT), mask), imgs, rtol=0, atol=1e-5)


# ---- Training


def test_initial_weights_have_std_002_and_what_adds_or_scales_starts_neutral():
    pretrain = FCMAE(64, dims=(32, 64, 96, 128), depths=(1, 1, 1, 1))
    finetune = ConvNeXtV2(dims=(32, 64, 96, 128), depths=(1, 1, 1, 1), head_init_scale=0.5)
    for name, p in [*pretrain.named_parameters(), *finetune.named_parameters()]:
        if name == "mask_token" or p.ndim > 1 and "grn" not in name:
            assert p.std().item() == pytest.approx(0.01 if name == "head.weight" else 0.02, rel=0.1), name
            assert abs(p.mean().item()) < 0.1 * p.std().item(), name
        else:  # of the vectors only those of norms are named weight
            assert (p == (1 if name.endswith("weight") else 0)).all(), name


def test_model_compiles_into_one_graph_with_the_results_of_eager():
    model = make_fcmae((2, 3), patch_size=16, norm_pix_loss=True, depths=(1, 0, 1, 0))
    imgs, noise = make_batch(model)

    def step(model):
        loss, pred, _ = model(imgs, noise=noise)
        return dict(enumerate((loss, pred, *torch.autograd.grad(loss, list(model.parameters())))))

    # aot_eager traces forward and backward as the default backend does, and spares its minute of C++ compilation
    assert_close(step(torch.compile(model, fullgraph=True, backend="aot_eager")), step(model), 1e-5)


def test_bfloat16_autocast_gives_gradients_close_to_float32():
    model = make_fcmae(norm_pix_loss=True)
    batch = make_batch(model)
    with torch.autocast("cpu", torch.bfloat16):
        mixed = run(model, *batch)
    assert mixed["latent"].dtype == torch.bfloat16 and mixed["loss"].dtype == torch.float32
    exact = run(model, *batch)
    mixed, exact = (torch.cat([r[name].flatten() for name, _ in model.named_parameters()]) for r in (mixed, exact))
    assert F.cosine_similarity(mixed, exact, dim=0) > 0.99  # false for NaN


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"img_size": 100}, "img_size 100 x 100"),
        ({"img_size": (64, 100)}, "img_size 64 x 100"),
        ({"img_size": 0}, "img_size 0 x 0"),
        ({"patch_size": 12}, "patch_size 12"),
        ({"patch_size": 0}, "patch_size 0"),
        ({"sparse_backend": "dense"}, "sparse_backend 'dense'"),
    ],
    ids=str,
)
def test_settings_that_do_not_fit_are_named(kwargs, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        FCMAE(**TINY | kwargs)


def test_images_of_part_of_a_patch_are_refused():
    encoder = FCMAE(img_size=64, depths=(1, 1, 1, 1), dims=(8, 8, 8, 8)).encoder
    with pytest.raises(ValueError, match="64 x 72: both sides must be multiples of 32"):
        encoder(torch.zeros(1, 3, 64, 72), torch.zeros(1, 4))


@pytest.mark.parametrize(
    "size, parameters, flops",
    list(
        zip(
            convnextv2.SIZES,
            ("3.7", "5.2", "9.1", "15.6", "28.6", "89", "198", "660"),
            (0.55, 0.78, 1.37, 2.45, 4.47, 15.4, 34.4, 115),
            strict=True,
        )
    ),
)
def test_costs_are_those_of_the_papers_table(size, parameters, flops):
    """Parameters to the digits that it prints, FLOPs to 1 %."""
    counted = cost(convnextv2.__dict__[size], (1, 3, 224, 224))
    digits = len(parameters.partition(".")[2])
    assert f"{counted.parameters / 1e6:.{digits}f}" == parameters
    assert counted.multiply_adds / 1e9 == pytest.approx(flops, rel=0.01)


def test_cost_of_a_convolution_and_an_activation():
    def build():
        return torch.nn.Sequential(torch.nn.Conv2d(3, 8, 4, stride=4), torch.nn.GELU(), torch.nn.Flatten())

    image, features = 3 * 12 * 20, 8 * 3 * 5  # what the gradients of the weight and of GELU need
    assert cost(build, (2, 3, 12, 20)) == (8 * 48 + 8, 2 * features * 48, 2 * 4 * (image + features))


def test_masking_saves_most_of_the_multiply_adds():
    """Of an encoder, without its stem: all is done at 19 of 49 patches, but for the depthwise canvas."""
    whole = cost(convnextv2.convnextv2_base, (1, 3, 224, 224))
    masked = cost(lambda: fcmae.convnextv2_base(mask_ratio=0.6), (1, 3, 224, 224))
    assert 19 / 49 < masked.multiply_adds / whole.multiply_adds < 0.45 and masked.activations < 0.52 * whole.activations


def test_the_loss_over_200_steps_is_that_of_modules_and_plain_operations(monkeypatch):
    """On the digits. Roundings grow: a tenth of a per cent of the loss after 200 steps, nothing after 20."""
    digits = torch.from_numpy(load_digits().images[:256]).float()[:, None] / 8 - 1
    imgs = F.interpolate(digits, scale_factor=4, mode="bilinear")  # 32 x 32: a grid of 4 x 4 patches

    def train():
        torch.manual_seed(0)
        model = FCMAE(32, 1, decoder_embed_dim=16, patch_size=8, norm_pix_loss=True, **TINY)
        optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3, betas=(0.9, 0.95), fused=not plain)
        losses = []
        for step in range(200):
            batch = imgs.roll(-16 * step, dims=0)[:16]
            loss = model(batch, mask_ratio=0.6, masked_only=not plain)[0]
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.item())
        return np.array(losses)

    plain = False
    fast = train()
    plain = True
    monkeypatch.setattr(utils, "can_use_functions", lambda *_: False)  # all fast paths are off
    slow = train()
    assert slow[-20:].mean() < 0.8 * slow[:20].mean()  # it learns
    np.testing.assert_allclose(fast[:20], slow[:20], rtol=1e-5)
    np.testing.assert_allclose(fast, slow, rtol=1e-3)


@pytest.mark.parametrize("build", [make_fcmae, lambda **_: randomise(ConvNeXtV2(num_classes=5, **TINY))])
def test_checkpointed_activations_give_the_same_gradients_bit_for_bit(build, monkeypatch):
    model = build(drop_path_rate=0.5).train()
    grads, forwards = [], []
    monkeypatch.setattr(convnextv2.Block, "mlp", lambda *a, mlp=convnextv2.Block.mlp: forwards.append(1) or mlp(*a))
    for enable in (False, True):
        model.set_grad_checkpointing(enable)
        torch.manual_seed(1)
        output = model(torch.randn(2, 3, 128, 128))
        loss = output[0] if isinstance(output, tuple) else output.square().sum()
        count = len(forwards)
        grads.append(torch.autograd.grad(loss, list(model.parameters())))
    assert len(forwards) == count + sum(TINY["depths"])  # each block of the trunk ran again
    assert all(torch.equal(one, other) for one, other in zip(*grads, strict=True))


@pytest.mark.parametrize("norm_pix_loss", [True, False])
def test_predicting_masked_patches_only_changes_neither_loss_nor_gradients(norm_pix_loss):
    model = make_fcmae(grid=(3, 4), norm_pix_loss=norm_pix_loss).double()
    imgs, noise = make_batch(model, n=3, dtype=torch.float64)
    results = []
    for masked_only in (False, True):
        loss, pred, mask = model(imgs, mask_ratio=0.5, noise=noise, masked_only=masked_only)
        if masked_only:
            assert gap(model.forward_loss(imgs, pred, mask), loss) == 0
        else:
            pred = pred.flatten(2).mT[mask.bool()].view(3, 6, -1)
        grads = torch.autograd.grad(loss, list(model.parameters()))
        results.append(dict(enumerate((loss, pred, *grads))))
    assert_close(*results, 1e-12)


def test_compiled_model_accepts_other_numbers_of_visible_patches():
    model = make_fcmae((3, 4), patch_size=8, norm_pix_loss=True, depths=(1, 0, 0, 0))
    imgs, noise = make_batch(model)

    def step(model, **kwargs):
        loss = model(imgs, noise=noise, masked_only=True, **kwargs)[0]
        return dict(enumerate((loss, *torch.autograd.grad(loss, list(model.parameters())))))

    compiled = torch.compile(model, fullgraph=True, backend="eager")
    for num_visible in (3, 4, 5, 7):  # a graph for one number, and at the second number one for all
        with torch.compiler.set_stance("fail_on_recompile" if num_visible > 4 else "default"):
            assert_close(step(compiled, num_visible=num_visible), step(model, num_visible=num_visible), 1e-5)
    for mask_ratio in (0.3, 0.6):  # a graph for each
        assert_close(step(compiled, mask_ratio=mask_ratio), step(model, mask_ratio=mask_ratio), 1e-5)


@pytest.mark.parametrize("grid, window", [((3, 4), (2, 3)), ((2, 2), (2, 2)), ((2, 3), (4, 2))])
def test_windows_average_the_logits_of_their_parts(grid, window):
    model = randomise(convnextv2.ConvNeXtV2(3, 5, depths=(1, 1, 1, 1), dims=(4, 8, 8, 16))).double().eval()
    imgs = torch.randn(2, 3, 32 * grid[0], 32 * grid[1], dtype=torch.float64)
    window = [min(pair) for pair in zip(window, grid, strict=True)]
    features = model.forward_trunk(imgs)
    logits = []
    for top in range(grid[0] - window[0] + 1):
        for left in range(grid[1] - window[1] + 1):
            part = features[:, :, top : top + window[0], left : left + window[1]]
            logits.append(model.head(model.norm(part.flatten(2).mean(2))))
    assert gap(model(imgs, window=window), torch.stack(logits).mean(0)) < 1e-12
    assert gap(model(imgs, window=grid), model(imgs)) < 1e-12
