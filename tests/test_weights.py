"""Weights of other programs come in exactly and go out exactly, and what does not fit is named.

The references are independent: timm's own models and loader, files as the original writes them, indices by hand.
"""

import argparse
from pathlib import Path

import pytest
import timm
import torch
import torch.nn.functional as F
from conftest import assert_same_weights, gap, randomise
from safetensors.torch import load_file
from timm.models._manipulate import adapt_input_conv

from models import convnextv2, fcmae
from models.convnextv2 import SIZES, Block, ConvNeXtV2
from models.fcmae import FCMAE
from models.weights import find_weights, load_backbone, load_weights, remap_checkpoint_keys, to_timm

pytestmark = pytest.mark.usefixtures("seed_and_one_thread")

# Those of the original's file beside this one
SMALL = {"depths": (1, 1, 2, 1), "dims": (8, 16, 24, 32)}
TOP = ("norm.weight", "norm.bias", "head.weight", "head.bias")


def classifier(**kwargs):
    return randomise(ConvNeXtV2(**SMALL | {"num_classes": 5} | kwargs))


def backbone_of(state):
    return {name: value for name, value in state.items() if name not in TOP}


def snapshot(model):
    return {name: value.clone() for name, value in model.state_dict().items()}


def save_and_load(model, checkpoint, path):
    """Load the file of a checkpoint into the model, as fine-tuning does: the report."""
    torch.save(checkpoint, path)
    with torch.serialization.safe_globals([argparse.Namespace]):
        return load_backbone(model, find_weights(torch.load(path)))


# ---- timm


@pytest.mark.parametrize("size", SIZES)
def test_timm_loads_what_to_timm_writes_and_computes_the_same_logits(size, tmp_path):
    sizes = SIZES[size]
    narrow = {"dims": (8, 16, 32, 64)} if size in ("convnextv2_large", "convnextv2_huge") else {}
    model = randomise(ConvNeXtV2(**sizes | narrow)).eval()
    torch.save(to_timm(model.state_dict(), model.config), tmp_path / "timm.pth")
    reference = timm.create_model(size, checkpoint_path=str(tmp_path / "timm.pth"), **narrow).eval()
    imgs = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        assert gap(model(imgs), reference(imgs)) <= 1e-5


@pytest.mark.parametrize("size", SIZES)
def test_weights_of_timm_load_and_compute_the_same_logits(size):
    narrow = {"depths": SIZES[size]["depths"], "dims": (8, 16, 32, 64)}
    reference = randomise(timm.create_model(size, **narrow)).eval()
    weights = find_weights({"state_dict": reference.state_dict()}, "state_dict")
    model = ConvNeXtV2(**narrow).eval()
    load_weights(model, weights)
    imgs = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        assert gap(model(imgs), reference(imgs)) <= 1e-5


@pytest.mark.parametrize("size", ["convnextv2_atto", "convnextv2_tiny"])
def test_names_and_shapes_come_back_from_timm_unchanged(size):
    state = randomise(ConvNeXtV2(depths=SIZES[size]["depths"], dims=(8, 16, 24, 32))).state_dict()
    assert_same_weights(remap_checkpoint_keys(to_timm(state)), state)


# ---- Pre-trained weights


def released(state):
    """The state dict as in the original's released FCMAE files, with each form of a tensor that is met there."""
    state = backbone_of(state)
    for name in ("stages.0.0.dwconv.bias", "stages.2.1.pwconv1.bias", "downsample_layers.1.1.bias"):
        state[name] = state[name][None]
    for name in ("stages.0.0.dwconv.weight", "stages.2.1.dwconv.weight", "downsample_layers.2.1.weight"):
        state[name] = state[name].flatten(1)
    for name in ("stages.1.0.grn.gamma", "stages.1.0.grn.beta", "stages.2.0.grn.beta"):
        state[name] = state[name].view(1, -1)
    for name in ("stages.2.0.grn.gamma", "stages.3.0.grn.gamma", "stages.3.0.grn.beta"):
        state[name] = state[name].flatten()
    assert state["stages.0.0.grn.gamma"].shape == (1, 1, 1, 32) and state["stages.2.1.dwconv.weight"].shape == (24, 49)
    return state


def test_a_released_fcmae_file_loads_without_a_lost_key(tmp_path):
    state, model = classifier().state_dict(), classifier()
    initial = snapshot(model)
    report = save_and_load(model, {"model": released(state)}, tmp_path / "released.pt")
    assert_same_weights(model.state_dict(), {name: (initial if name in TOP else state)[name] for name in state})
    assert report == [
        f"loaded {len(state) - 4} of {len(state)} tensors",
        "newly initialized: norm and head",
    ]


def test_a_file_of_the_originals_minkowski_training_loads_without_a_lost_key(tmp_path):
    fixture = load_file(Path(__file__).with_name("fcmae_minkowski.safetensors"))
    state = {name.removeprefix("state."): value for name, value in fixture.items() if name.startswith("state.")}
    model = classifier()
    checkpoint = {"model": state, "epoch": 3, "args": argparse.Namespace(input_size=128)}
    report = save_and_load(model, checkpoint, tmp_path / "checkpoint-3.pth")
    assert report[1:] == ["left out 15 tensors of the pre-training's decoder", "newly initialized: norm and head"]

    loaded, seen = model.state_dict(), set()
    for name in [name for name in state if name.startswith("encoder.")]:
        ours = name.removeprefix("encoder.").replace(".ln", "").replace(".linear", "").replace("kernel", "weight")
        value, kernel = loaded[ours], state[name]
        seen.add(ours)
        if not name.endswith("kernel"):
            assert torch.equal(value.squeeze(), kernel.squeeze()), name
            continue
        side = {49: 7, 4: 2}[len(kernel)]
        for row in range(side):
            for column in range(side):
                here = kernel[row + side * column]  # the first axis of space runs fastest
                assert torch.equal(value[:, :, row, column], here[:, None] if side == 7 else here.T), name
    assert seen == set(backbone_of(loaded))


@pytest.mark.parametrize("stem_stride", [4, 2])
def test_a_pre_training_checkpoint_of_this_project_loads_without_its_decoder(stem_stride, tmp_path):
    pretrained = randomise(FCMAE(64, patch_size=8 * stem_stride, decoder_embed_dim=16, **SMALL)).state_dict()
    model = classifier(stem_stride=stem_stride)
    report = save_and_load(model, {"model": pretrained, "epoch": 1}, tmp_path / "checkpoint-0.pth")
    loaded = model.state_dict()
    assert all(torch.equal(loaded[name], pretrained[f"encoder.{name}"]) for name in backbone_of(loaded))
    assert "left out 15 tensors of the pre-training's decoder" in report


def test_whatever_is_beside_the_encoder_is_its_decoder():
    pretrained, model = FCMAE(64, decoder_embed_dim=16, **SMALL), classifier()
    pretrained.second_head = torch.nn.Linear(16, 2)
    report = load_backbone(model, pretrained.state_dict())
    assert "left out 17 tensors of the pre-training's decoder" in report


# ---- Networks are rebuilt from their configuration


class BlockWithoutGRN(Block):
    """A block as a researcher may change it, with an option of its own."""

    def __init__(self, dim, drop_path=0.0, grn=True):
        super().__init__(dim, drop_path)
        if not grn:
            self.grn = torch.nn.Identity()


@pytest.mark.parametrize(
    "model",
    [
        ConvNeXtV2(1, 7, stem_stride=2, drop_path_rate=0.1, head_init_scale=0.5, **SMALL),
        FCMAE((16, 24), 1, patch_size=8, mask_ratio=0.5, decoder_depth=2, decoder_embed_dim=16, **SMALL),
    ],
)
def test_a_configuration_survives_a_file_and_rebuilds_the_model(model, tmp_path):
    torch.save(model.config, tmp_path / "config.pth")
    rebuilt = type(model)(**torch.load(tmp_path / "config.pth"))
    assert rebuilt.config == model.config
    rebuilt.load_state_dict(model.state_dict())
    assert str(rebuilt) == str(model)


def test_an_option_of_the_block_reaches_encoder_decoder_and_classifier_and_is_refused_by_timm(monkeypatch):
    monkeypatch.setattr(convnextv2, "Block", BlockWithoutGRN)
    monkeypatch.setattr(fcmae, "Block", BlockWithoutGRN)

    class SparseBlock(fcmae.SparseConvNeXtV2.block, BlockWithoutGRN):
        pass

    monkeypatch.setattr(fcmae.SparseConvNeXtV2, "block", SparseBlock)
    monkeypatch.setattr(ConvNeXtV2, "block", BlockWithoutGRN)
    pretrained = randomise(FCMAE(64, decoder_embed_dim=16, grn=False, **SMALL))
    assert not [name for name in pretrained.state_dict() if "grn" in name]
    checkpoint = {"model": pretrained.state_dict(), "config": pretrained.config}
    imgs, noise = torch.randn(2, 3, 64, 64), torch.rand(2, 4)
    assert torch.equal(fcmae.from_checkpoint(checkpoint)(imgs, noise=noise)[0], pretrained(imgs, noise=noise)[0])
    model, report = convnextv2.from_checkpoint(checkpoint)
    assert model.config["grn"] is False and report[-1] == "newly initialized: norm and head"
    assert gap(model.forward_trunk(imgs), pretrained.encode_all(imgs)) < 1e-5
    with pytest.raises(ValueError, match="options {'grn': False}"):
        to_timm(model.state_dict(), model.config)
    with pytest.raises(ValueError, match="stages.0.0.grn.beta is missing"):
        to_timm(model.state_dict())


@pytest.mark.parametrize("args", [{"norm_pix_loss": False}, argparse.Namespace(norm_pix_loss=False), {}, None])
def test_an_fcmae_without_a_configuration_is_inferred_from_its_weights(args):
    model = FCMAE(32, 1, patch_size=16, decoder_depth=2, decoder_embed_dim=16, **SMALL)
    built = fcmae.from_checkpoint({"model": model.state_dict(), "args": args})
    assert str(built) == str(model) and built.norm_pix_loss == (not args)


def test_weights_that_are_not_of_an_fcmae_or_a_convnextv2_are_refused():
    with pytest.raises(ValueError, match="no proj.weight, mask_token, pred.weight: must be an FCMAE"):
        fcmae.from_checkpoint({"model": classifier().state_dict()})
    with pytest.raises(ValueError, match="no downsample_layers.0.0.weight.*: must be the weights of a ConvNeXt V2"):
        convnextv2.from_checkpoint({"model": {"fc.weight": torch.ones(2)}})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda state: state | {"stages.0.0.gate.weight": torch.ones(1)}, "stages.0.0.gate.weight has no place there"),
        (lambda state: without(state, "stages.2.1.grn.beta"), "stages.2.1.grn.beta is missing"),
        (lambda _: classifier(stem_stride=2).state_dict(), "stem stride 2"),
    ],
)
def test_timm_has_no_place_for_another_network(change, message):
    with pytest.raises(ValueError, match=message):
        to_timm(change(classifier().state_dict()))


# ---- Where the weights are in a file


def prefixed(state, prefix):
    return {prefix + name: value for name, value in state.items()}


@pytest.mark.parametrize(
    ("wrap", "flags"),
    [
        (lambda state: state, {}),
        (lambda state: {"model": state, "epoch": 3}, {}),
        (lambda state: {"module": state, "epoch": 3}, {}),
        (lambda state: {"model": prefixed(state, "module.")}, {}),
        (lambda state: {"model": prefixed(state, "_orig_mod.")}, {}),
        (lambda state: {"model": prefixed(state, "module._orig_mod.")}, {}),
        (lambda state: {"model": prefixed(state, "_orig_mod.module.")}, {}),
        (lambda state: prefixed(state, "module."), {}),
        (lambda state: {"state_dict": state, "arch": "convnextv2"}, {"model_key": "state_dict"}),
        (lambda state: {"model": {}, "model_ema": state}, {"model_key": "model_ema"}),
        (
            lambda state: {"model": prefixed(state, "backbone.") | {"neck.weight": torch.ones(2)}},
            {"model_prefix": "backbone."},
        ),
        (lambda state: {"model": prefixed(state, "module.backbone.")}, {"model_prefix": "backbone."}),
    ],
    ids=(
        "bare, model, module, DDP, compiled, DDP of compiled, compiled DDP, bare DDP, state_dict, model_ema, "
        "backbone and neck, DDP of backbone"
    ).split(", "),
)
def test_weights_are_found_in_every_wrapper(wrap, flags):
    state = classifier().state_dict()
    assert_same_weights(find_weights(wrap(state), **flags), state)


@pytest.mark.parametrize(
    ("checkpoint", "flags", "words"),
    [
        ({"net": {"a": torch.ones(1)}, "epoch": 3}, {}, ["'model|module'", "it has net, epoch"]),
        ({"model": {"a": torch.ones(1)}, "epoch": 3}, {"model_key": "ema"}, ["'ema'", "it has model, epoch"]),
        ({"model": {"a": 1.0}, "args": None}, {}, ["holds no weights", "it has model, args"]),
        ({"model": {"a": torch.ones(1)}}, {"model_prefix": "backbone."}, ["begins with 'backbone.'"]),
        ({"model": {}}, {}, ["holds no weight"]),
    ],
    ids=["no key", "another key", "no tensors", "no such prefix", "empty"],
)
def test_a_file_without_weights_there_is_refused_with_what_it_has(checkpoint, flags, words):
    with pytest.raises(ValueError) as error:
        find_weights(checkpoint, **flags)
    assert not [word for word in words if word not in str(error.value)], error.value


# ---- What does not fit


def without(state, name):
    return {key: value for key, value in state.items() if key != name}


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda state: state | {"gate.weight": torch.ones(3)}, ["1 diff", "gate.weight is not of this model"]),
        (lambda state: state | {"decoder.0.norm.bias": torch.ones(3)}, ["1 diff", "decoder.0.norm.bias is not of"]),
        (lambda state: without(state, "stages.2.1.grn.beta"), ["1 diff", "stages.2.1.grn.beta is missing"]),
        (lambda state: without(state, "head.bias"), ["1 diff", "head.bias is missing"]),
        (lambda _: classifier(depths=(1, 1, 3, 1)).state_dict(), ["10 diff", "stages.2.2.dwconv.weight is not of"]),
        (lambda _: classifier(depths=(1, 1, 1, 1)).state_dict(), ["10 diff", "stages.2.1.dwconv.weight is missing"]),
        (
            lambda _: classifier(stem_stride=2).state_dict(),
            ["1 diff", "downsample_layers.0.0.weight is (8, 3, 2, 2), not (8, 3, 4, 4)"],
        ),
        (
            lambda _: classifier(stem_stride=2, in_chans=1).state_dict(),
            ["1 diff", "downsample_layers.0.0.weight is (8, 3, 2, 2), not (8, 3, 4, 4)"],
        ),
        (
            lambda _: classifier(dims=(8, 16, 24, 40)).state_dict(),
            ["downsample_layers.3.1.weight is (40, 24, 2, 2), not (32, 24, 2, 2)"],
        ),
        (
            lambda state: state | {"stages.0.0.pwconv1.weight": torch.ones(8, 32)},
            ["1 diff", "stages.0.0.pwconv1.weight is (8, 32), not (32, 8)"],
        ),
        (
            lambda state: prefixed(backbone_of(state), "encoder.") | {"encoder.gate": torch.ones(3)},
            ["1 diff", "gate is not of this model"],
        ),
    ],
    ids=(
        "extra key, decoder without an encoder, no GRN beta, head without a bias, a block more, a block less, "
        "stem stride, stem stride and channels, width, transposed, extra key of an encoder"
    ).split(", "),
)
def test_a_difference_that_is_not_explained_is_an_error_and_loads_nothing(change, words):
    model = classifier()
    initial = snapshot(model)
    with pytest.raises(ValueError) as error:
        load_backbone(model, remap_checkpoint_keys(change(classifier().state_dict())))
    assert not [word for word in words if word not in str(error.value)], error.value
    assert_same_weights(model.state_dict(), initial)


def test_a_head_of_another_number_of_classes_is_left_out_and_the_rest_is_kept():
    state, model = classifier(num_classes=7).state_dict(), classifier(num_classes=5)
    initial = snapshot(model)
    report = load_backbone(model, state)
    loaded = model.state_dict()
    assert_same_weights(loaded, {k: (initial if k.startswith("head.") else state)[k] for k in state})
    assert report[1:] == ["left out the head: it has 7 classes, not 5", "newly initialized: head"]


def test_a_head_of_the_same_number_of_classes_is_kept():
    state, model = classifier().state_dict(), classifier()
    assert load_backbone(model, state) == [f"loaded {len(state)} of {len(state)} tensors"]
    assert_same_weights(model.state_dict(), state)


@pytest.mark.parametrize("pretrained", [True, False])
def test_loading_a_pre_training_checkpoint_as_a_classifier_hints_at_finetune(pretrained):
    others = FCMAE(64, decoder_embed_dim=16, **SMALL) if pretrained else classifier(num_classes=7)
    with pytest.raises(ValueError, match="a checkpoint of another model: .* differences") as error:
        load_weights(classifier(), others.state_dict())
    assert ("--finetune" in str(error.value)) == pretrained


# ---- Channels


def adapted(before, now):
    """The stem's weight before, after loading it for another number of channels, and the report of that."""
    state, model = classifier(in_chans=before).state_dict(), classifier(in_chans=now)
    report = load_backbone(model, state)
    stem = "downsample_layers.0.0.weight"
    assert_same_weights(without(model.state_dict(), stem), without(state, stem))
    return state[stem], model.state_dict()[stem], report[1:]


@pytest.mark.parametrize(("now", "how"), [(1, "averaged"), (4, "repeated"), (6, "repeated")])
def test_a_stem_for_rgb_is_adapted_to_other_channels_as_by_timm(now, how):
    weight, ours, report = adapted(3, now)
    assert gap(ours, adapt_input_conv(now, weight)) <= 1e-6
    assert report == [f"the stem's 3 channels were {how} into {now}"]


@pytest.mark.parametrize(("before", "now", "how"), [(1, 3, "repeated"), (3, 2, "averaged"), (4, 3, "averaged")])
def test_a_stem_for_other_channels_keeps_its_response_to_a_constant_image(before, now, how):
    weight, ours, report = adapted(before, now)
    response = F.conv2d(torch.full((1, now, 4, 4), 0.7), ours)
    assert gap(response, F.conv2d(torch.full((1, before, 4, 4), 0.7), weight)) <= 1e-6
    assert report == [f"the stem's {before} channels were {how} into {now}"]


def test_a_stem_for_as_many_channels_is_kept():
    weight, ours, report = adapted(4, 4)
    assert torch.equal(ours, weight) and not report


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 1j])
def test_weights_that_are_not_finite_numbers_are_refused(value):
    model = ConvNeXtV2(num_classes=3, depths=(1, 1, 1, 1), dims=(8, 16, 24, 32))
    state = model.state_dict()
    state["head.bias"] = torch.full((3,), value)
    with pytest.raises(ValueError, match="head.bias holds values of torch.* that are not finite numbers"):
        load_weights(model, state)
