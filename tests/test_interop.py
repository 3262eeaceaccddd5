"""Weights move to other programs and back: each reference is the other side's own code, loading strictly."""

import importlib
import json

import pytest
import timm
import torch
from conftest import assert_same_weights, gap, randomise, run_script_here
from PIL import Image

import models
from checkpoints import load_checkpoint
from models.convnextv2 import ConvNeXtV2
from models.fcmae import FCMAE
from models.weights import find_weights
from tools import common, convert

pytestmark = pytest.mark.usefixtures("seed_and_one_thread")
SMALL = {"depths": (1, 1, 2, 1), "dims": (8, 16, 24, 32)}
SHALLOW = SMALL | {"depths": (1, 1, 1, 1)}
NAMES = ["owl", "newt", "red eel"]
FLAGS = {"input_size": (64, 64), "imagenet_default_mean_and_std": False}


@pytest.fixture(scope="module")
def classifier(tmp_path_factory):
    """A fine-tuned checkpoint: its path and the model."""
    torch.manual_seed(0)
    model = randomise(ConvNeXtV2(num_classes=3, **SMALL)).eval()
    path = tmp_path_factory.mktemp("classifier") / "checkpoint-best.pth"
    content = {"format": 2, "model": model.state_dict(), "config": model.config, "args": FLAGS, "class_names": NAMES}
    torch.save(content, path)
    return path, model


@pytest.fixture(scope="module")
def pretrained(tmp_path_factory):
    """A pre-training checkpoint, SHALLOW: its path and the model."""
    torch.manual_seed(1)
    model = randomise(FCMAE(64, decoder_embed_dim=16, **SHALLOW)).eval()
    path = tmp_path_factory.mktemp("pretrained") / "checkpoint-0.pth"
    torch.save(
        {"format": 2, "model": model.state_dict(), "config": model.config, "args": {"input_size": [64, 64]}}, path
    )
    return path, model


@pytest.fixture
def write(monkeypatch, capsys, tmp_path):
    """write(IN, form): the file or folder that `tools.convert IN OUT --to form` writes."""

    def write(path, form):
        output = tmp_path / f"out.{form}"
        result = run_script_here(
            importlib.import_module("tools.convert"), [path, output, "--to", form], monkeypatch, capsys
        )
        assert result.status == 0, result.err
        return output

    return write


@torch.no_grad()
def assert_same_maps(ours, theirs):
    assert len(ours) == len(theirs) == 4
    assert max(gap(theirs, ours) for ours, theirs in zip(ours, theirs, strict=True)) <= 1e-5


# ---- Four scales


@torch.no_grad()
@pytest.mark.parametrize("stem_stride", [4, 1])
def test_feature_maps_are_the_four_stages_at_their_strides(stem_stride):
    model = randomise(ConvNeXtV2(stem_stride=stem_stride, **SMALL)).eval()
    imgs = torch.randn(2, 3, 64, 96)
    maps = model.feature_maps(imgs)
    strides = [stem_stride * 2**i for i in range(4)]
    assert [tuple(x.shape) for x in maps] == [
        (2, c, 64 // s, 96 // s) for c, s in zip(SMALL["dims"], strides, strict=True)
    ]
    x = model.stages[0](model.downsample_layers[0](imgs))
    assert torch.allclose(maps[0], x) and torch.allclose(maps[1], model.stages[1](model.downsample_layers[1](x)))
    assert torch.equal(maps[3], model.forward_trunk(imgs))


# ---- Out


@torch.no_grad()
@pytest.mark.parametrize(("source", "sizes"), [("classifier", SMALL), ("pretrained", SHALLOW)])
def test_timm_features_load_strictly_and_are_the_same_maps(write, request, source, sizes):
    path, _ = request.getfixturevalue(source)
    file = write(path, "timm_features")
    features = timm.create_model("convnextv2_tiny", features_only=True, checkpoint_path=str(file), **sizes).eval()
    imgs = torch.randn(2, 3, 64, 96)
    assert_same_maps(models.from_checkpoint(path).feature_maps(imgs), features(imgs))


@torch.no_grad()
def test_an_encoder_of_segmentation_models_pytorch_loads_strictly_and_gives_the_same_maps(write, pretrained):
    smp = pytest.importorskip("segmentation_models_pytorch")
    path, _ = pretrained
    unet = smp.Unet("tu-convnextv2_tiny", encoder_weights=None, classes=2, **SHALLOW).eval()
    unet.encoder.load_state_dict(torch.load(write(path, "smp")), strict=True)
    imgs = torch.randn(2, 3, 64, 96)
    assert_same_maps(models.from_checkpoint(path).feature_maps(imgs), unet.encoder(imgs)[2:])
    assert unet(imgs).shape == (2, 2, 64, 96)


@torch.no_grad()
def test_transformers_load_the_classifier_with_its_names_and_compute_the_same_logits(write, classifier):
    from transformers import AutoImageProcessor, ConvNextV2ForImageClassification

    path, model = classifier
    folder = write(path, "hf")
    theirs, report = ConvNextV2ForImageClassification.from_pretrained(folder, output_loading_info=True)
    assert not any(report.values()), report
    imgs = torch.randn(2, 3, 64, 64)
    assert gap(theirs.eval()(imgs).logits, model(imgs)) <= 1e-5
    assert list(theirs.config.id2label.values()) == NAMES
    image = Image.radial_gradient("L").resize((80, 70)).convert("RGB")
    pixels = AutoImageProcessor.from_pretrained(folder)(image, return_tensors="pt")["pixel_values"]
    ours = common.build_transform({"args": FLAGS}, (64, 64), 3)(image)[None]
    assert pixels.shape == ours.shape and (pixels - ours).abs().mean() <= 0.05  # crops differ by a pixel


@torch.no_grad()
def test_transformers_load_the_encoder_alone_and_compute_the_same_features(write, pretrained):
    from transformers import ConvNextV2Model

    path, model = pretrained
    theirs, report = ConvNextV2Model.from_pretrained(write(path, "hf"), output_loading_info=True)
    assert not any(report.values()), report
    imgs = torch.randn(2, 3, 64, 64)
    output = theirs.eval()(imgs, output_hidden_states=True)
    assert gap(output.last_hidden_state, model.encode_all(imgs)) <= 1e-5


def save_two_blocks(path, head):
    """A checkpoint of a network of two blocks, as exports take a second a block, with or without its head."""
    model = randomise(ConvNeXtV2(num_classes=3, depths=(1, 0, 0, 1), dims=SMALL["dims"])).eval()
    state = {name: value for name, value in model.state_dict().items() if head or not name.startswith(("head", "norm"))}
    torch.save({"model": state, "config": model.config, "args": FLAGS, "class_names": NAMES}, path)
    return path, model


@torch.no_grad()
def test_an_onnx_classifier_takes_any_batch_and_size_and_computes_the_same_logits(write, tmp_path):
    path, model = save_two_blocks(tmp_path / "in.pth", head=True)
    session = open_onnx(write(path, "onnx").read_bytes())
    assert session.get_inputs()[0].shape == ["batch", 3, "height", "width"]
    for shape in ((2, 3, 96, 64), (1, 3, 32, 32), (3, 3, 70, 101)):
        imgs = torch.randn(shape)
        (logits,) = session.run(["logits"], {"imgs": imgs.numpy()})
        assert gap(torch.from_numpy(logits), model(imgs)) <= 1e-5
    metadata = session.get_modelmeta().custom_metadata_map
    assert json.loads(metadata["class_names"]) == NAMES and json.loads(metadata["mean"]) == [0.5] * 3


@torch.no_grad()
def test_onnx_without_a_head_gives_the_four_scales(write, tmp_path):
    path, _ = save_two_blocks(tmp_path / "in.pth", head=False)
    session = open_onnx(write(path, "onnx").read_bytes())
    imgs = torch.randn(1, 3, 64, 128)
    maps = session.run(None, {"imgs": imgs.numpy()})
    assert_same_maps(models.from_checkpoint(path).feature_maps(imgs), list(map(torch.from_numpy, maps)))


class MaskedEncoder(torch.nn.Module):
    def __init__(self, fcmae):
        super().__init__()
        self.fcmae = fcmae

    def forward(self, imgs, noise):
        return self.fcmae.forward_encoder(imgs, 0.6, noise)


@torch.no_grad()
def test_the_sparse_encoder_passes_torch_export_and_onnx_with_its_mask_for_any_batch():
    fcmae = randomise(FCMAE(64, decoder_embed_dim=16, depths=(1, 0, 0, 1), dims=SMALL["dims"]))
    encoder, batch = MaskedEncoder(fcmae).eval(), {0: torch.export.Dim("batch")}
    inputs = torch.randn(2, 3, 96, 64), torch.rand(2, 6)
    exported = torch.export.export(encoder, inputs, dynamic_shapes=(batch, batch))
    inputs = torch.randn(3, 3, 96, 64), torch.rand(3, 6)
    for ours, theirs in zip(encoder(*inputs), exported.module()(*inputs), strict=True):
        assert gap(theirs, ours) <= 1e-5
    session = open_onnx(torch.onnx.export(exported, dynamo=True, verbose=False).model_proto.SerializeToString())
    names = [value.name for value in session.get_inputs()]
    outputs = session.run(None, {name: value.numpy() for name, value in zip(names, inputs, strict=True)})
    latent, mask = encoder(*inputs)
    assert gap(torch.from_numpy(outputs[0]), latent) <= 1e-5 and torch.equal(torch.from_numpy(outputs[1]), mask)


def open_onnx(content):
    return pytest.importorskip("onnxruntime").InferenceSession(content)


# ---- Back


@pytest.mark.parametrize("form", ["original", "timm", "hf", "safetensors"])
def test_a_written_classifier_is_read_back_bit_for_bit(write, classifier, form):
    path, model = classifier
    assert_same_weights(find_weights(load_checkpoint(write(path, form))), model.state_dict())


@pytest.mark.parametrize("form", ["timm_features", "smp"])
def test_a_written_encoder_is_read_back_bit_for_bit(write, pretrained, form):
    path, model = pretrained
    assert_same_weights(find_weights(load_checkpoint(write(path, form))), model.encoder.state_dict())


@torch.no_grad()
@pytest.mark.parametrize("head", [True, False])
def test_a_folder_of_transformers_is_a_checkpoint(head, tmp_path):
    from transformers import ConvNextV2Config, ConvNextV2ForImageClassification, ConvNextV2Model

    sizes = dict(depths=list(SMALL["depths"]), hidden_sizes=list(SMALL["dims"]), layer_norm_eps=1e-6)
    names = {"id2label": dict(enumerate(NAMES)), "label2id": {name: i for i, name in enumerate(NAMES)}}
    config = ConvNextV2Config(image_size=64, **sizes, **names)
    theirs = randomise((ConvNextV2ForImageClassification if head else ConvNextV2Model)(config)).eval()
    theirs.save_pretrained(tmp_path)
    model, imgs = models.from_checkpoint(tmp_path), torch.randn(2, 3, 64, 64)
    if head:
        assert gap(model(imgs), theirs(imgs).logits) <= 1e-5 and model.class_names == NAMES
    assert gap(model.forward_trunk(imgs), (theirs.convnextv2 if head else theirs)(imgs).last_hidden_state) <= 1e-5
    assert model.pretrained_cfg["input_size"] == (3, 64, 64)


def test_what_training_saw_travels_with_safetensors_and_transformers(write, classifier):
    path, _ = classifier
    first = models.from_checkpoint(path)
    for form in ("safetensors", "hf"):
        model = models.from_checkpoint(write(path, form))
        assert (model.pretrained_cfg, model.class_names) == (first.pretrained_cfg, NAMES)


# ---- Released weights by timm's names


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """The hub's cache, with a narrow convnextv2_atto.fcmae, and no network: the weights."""
    from huggingface_hub import constants
    from safetensors.torch import save_file

    state = randomise(timm.create_model("convnextv2_tiny", num_classes=0, **SMALL)).state_dict()
    repository = tmp_path / "models--timm--convnextv2_atto.fcmae"
    for folder in ("refs", "snapshots/0123"):
        (repository / folder).mkdir(parents=True)
    (repository / "refs/main").write_text("0123")
    save_file(state, repository / "snapshots/0123/model.safetensors")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    return state


@pytest.mark.usefixtures("narrow")
def test_fine_tuning_starts_from_released_weights_by_timms_name(finetune, hub, tmp_path):
    flags = "--model convnextv2_atto --data_set DIGITS --input_size 32 --epochs 1 --warmup_epochs 0 --lr 0 --min_lr 0"
    flags += " --images_per_class 1 --batch_size 10 --device cpu --num_workers 0 --disable_eval true"
    output = tmp_path / "out"
    result = finetune(*flags.split(), "--finetune", "timm:convnextv2_atto.fcmae", "--output_dir", output)
    assert result.status == 0 and "newly initialized: head" in result.out
    loaded = torch.load(output / "checkpoint-0.pth")["model"]
    assert_same_weights({k: v for k, v in loaded.items() if not k.startswith("head.")}, find_weights({"model": hub}))


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("timm:convnextv2_pico.fcmae", "neither in timm's cache nor to be downloaded (is there a network?)"),
        ("timm:convnext_tiny.fb_in1k", "must be timm: and one of convnextv2_atto.fcmae,"),
    ],
)
@pytest.mark.usefixtures("hub")
def test_released_weights_that_cannot_be_had_are_one_line(monkeypatch, capsys, tmp_path, name, words):
    result = run_script_here(convert, [name, tmp_path / "out.pth", "--to", "original"], monkeypatch, capsys)
    assert result.status == 2 and f"{name}: {words}" in result.err and len(result.err.splitlines()) == 1


@pytest.mark.parametrize("args", [[1], {"input_size": ()}, {"input_size": "ab"}, {"crop_pct": "much"}])
def test_crafted_flags_are_a_value_error_with_the_files_name(args, classifier, tmp_path):
    torch.save(torch.load(classifier[0]) | {"args": args}, tmp_path / "crafted.pth")
    with pytest.raises(ValueError, match="crafted.pth: its args hold no flags of a training"):
        models.from_checkpoint(tmp_path / "crafted.pth")


def test_onnx_of_more_than_2_gb_is_refused_before_long_work(monkeypatch):
    monkeypatch.setattr(torch.onnx, "export", None)
    state = ConvNeXtV2(**SMALL).state_dict() | {"head.weight": torch.empty(600_000_000, 1, device="meta")}
    with pytest.raises(ValueError, match="2.4 GB of weights: a file of ONNX holds 2"):
        convert.write_onnx("out.onnx", state, {})


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("a.safetensors", b"no safetensors", "not a whole safetensors file"),
        ("folder/config.json", b"{}", "model_type None: must be convnextv2"),
        ("folder/config.json", b'{"model_type": "convnextv2"}', "No such file or directory: "),
        ("folder/other", b"", "a folder without config.json"),
    ],
)
def test_other_files_that_are_damaged_are_one_line(monkeypatch, capsys, tmp_path, name, content, words):
    (tmp_path / name).parent.mkdir(exist_ok=True)
    (tmp_path / name).write_bytes(content)
    path = tmp_path / name.split("/")[0]
    result = run_script_here(convert, [path, tmp_path / "out.pth", "--to", "original"], monkeypatch, capsys)
    assert result.status == 2 and f"{path}: {words}" in result.err and len(result.err.splitlines()) == 1
