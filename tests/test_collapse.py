"""Feature collapse: the distance against its definition, where it is measured, and which checkpoints are read."""

import importlib.util
import sys

import pytest
import torch
import torch.nn.functional as F
from conftest import gap, randomise, run_script_here
from PIL import Image

import tools.collapse
from models.convnextv2 import ConvNeXtV2
from models.fcmae import FCMAE
from models.utils import GRN
from models.weights import to_timm
from tools.collapse import Layer, cosine_distance, dead_channels, measure, spread

pytestmark = pytest.mark.usefixtures("seed_and_one_thread")
needs_matplotlib = pytest.mark.skipif(importlib.util.find_spec("matplotlib") is None, reason="draws with matplotlib")
SMALL = {"depths": (1, 1, 2, 1), "dims": (8, 16, 24, 32)}
BLOCKS = ["stages.0.0", "stages.1.0", "stages.2.0", "stages.2.1", "stages.3.0"]


@pytest.fixture
def collapse(capsys, monkeypatch):
    """collapse(*flags): tools/collapse.py on the CPU, see `run_script_here`."""
    return lambda *flags: run_script_here(tools.collapse, (*flags, "--device", "cpu"), monkeypatch, capsys)


def by_definition(x):
    """1 / C^2 sum_ij (1 - cos(x_i, x_j)) / 2 of x (N, H, W, C), term by term."""
    channels = x.flatten(1, -2).mT  # (N, C, S)
    cosine = F.cosine_similarity(channels[:, :, None], channels[:, None, :], dim=-1, eps=0)
    return ((1 - cosine) / 2).mean((1, 2))


# ---- the distance


@pytest.mark.parametrize("shape", [(3, 4, 5, 7), (1, 1, 1, 6), (2, 9, 3, 1), (2, 30, 4)])
def test_the_distance_is_the_double_sum(shape):
    x = torch.randn(shape, dtype=torch.float64) + 0.5
    assert torch.allclose(cosine_distance(x), by_definition(x), rtol=0, atol=1e-14)
    assert torch.allclose(cosine_distance(x.float()).double(), by_definition(x), rtol=0, atol=1e-6)


def test_channels_equal_up_to_scale_have_no_distance():
    x = torch.randn(50, 4, 4, 1, dtype=torch.float64) * torch.tensor([1.0, 1.0, 3.0, 1e-3, 1e3])
    assert cosine_distance(x).max() <= 1e-15
    assert cosine_distance(x.float()).min() >= 0  # despite rounding


def test_orthogonal_channels_are_half_apart_except_from_themselves():
    count = 8
    x = torch.eye(count, dtype=torch.float64).reshape(1, 2, 4, count)  # each channel on a site of its own
    assert cosine_distance(x).tolist() == [(1 - 1 / count) / 2]


def test_pairs_of_opposite_channels_are_half_apart():
    x = torch.randn(2, 4, 4, 3, dtype=torch.float64)
    assert cosine_distance(torch.cat([x, -2 * x], -1)).tolist() == pytest.approx([0.5, 0.5], abs=1e-15)


def test_a_channel_of_zeros_has_cosine_0_to_all_and_to_itself():
    x = torch.ones(2, 3, 3, 8)
    x[0, ..., 2:] = 0
    x[1] = 0
    assert cosine_distance(x).tolist() == [(1 - (2 / 8) ** 2) / 2, 0.5]


def test_each_image_has_its_own_distance():
    x = torch.randn(3, 4, 4, 6)
    assert torch.allclose(cosine_distance(x), torch.cat([cosine_distance(image[None]) for image in x]))


@pytest.mark.parametrize(("dtype", "scale"), [(torch.float16, 6e4), (torch.bfloat16, 1e18), (torch.float32, 1e-18)])
def test_large_and_small_activations_do_not_overflow(dtype, scale):
    x = (torch.rand(2, 8, 8, 16) * scale).to(dtype)
    assert gap(cosine_distance(x).double(), by_definition(x.double())) <= 1e-4


def test_dead_channels_are_those_far_below_the_mean_norm():
    x = torch.ones(2, 4, 4, 8)
    x[0, ..., 0], x[0, ..., 1], x[0, ..., 2] = 0, -0.005, 0.05
    assert dead_channels(x).tolist() == [2 / 8, 0]
    assert dead_channels(torch.zeros(1, 4, 4, 8)).tolist() == [1]


# ---- what is measured


def images(count, size=64):
    return list(torch.randn(count, 3, size, size))


def test_every_block_is_measured_in_order():
    layers = measure(ConvNeXtV2(num_classes=1, **SMALL), images(2))
    assert [layer.block for layer in layers] == BLOCKS
    assert [layer.index for layer in layers] == [0, 0.25, 0.5, 0.75, 1]


@torch.no_grad()
def test_the_distance_is_of_the_input_and_the_output_of_grn():
    model = randomise(ConvNeXtV2(num_classes=1, **SMALL))
    batch = images(3)
    block = model.stages[0][0]
    x = model.downsample_layers[0](torch.stack(batch))
    expanded = F.gelu(block.pwconv1(block.norm(block.dwconv(x).permute(0, 2, 3, 1))))
    first = measure(model, batch)[0]
    assert first.before == pytest.approx(by_definition(expanded).mean().item(), abs=1e-5)
    assert first.after == pytest.approx(by_definition(block.grn(expanded)).mean().item(), abs=1e-5)
    assert abs(first.before - first.after) > 1e-3


def test_all_images_have_the_same_weight_however_many_there_are():
    model = randomise(ConvNeXtV2(num_classes=1, **SMALL))
    batch = images(tools.collapse.BATCH + 1)
    alone = torch.tensor([[layer[2:] for layer in measure(model, [image])] for image in batch]).mean(0)
    together = torch.tensor([layer[2:] for layer in measure(model, batch)])
    assert torch.allclose(together, alone, atol=1e-5)


def test_a_grn_of_zeros_changes_nothing():
    model = randomise(ConvNeXtV2(num_classes=1, **SMALL))
    for module in model.modules():
        if isinstance(module, GRN):
            torch.nn.init.zeros_(module.gamma)
            torch.nn.init.zeros_(module.beta)
    assert all(layer.before == layer.after for layer in measure(model, images(2)))


def test_measuring_leaves_no_hook_in_the_network():
    model = ConvNeXtV2(num_classes=1, **SMALL)
    assert measure(model, images(1)) and not any(module._forward_hooks for module in model.modules())


def test_of_many_images_evenly_spread_ones_are_taken():
    assert spread(range(10), 5) == [0, 2, 4, 6, 8]
    assert spread(range(3), 5) == [0, 1, 2]
    assert spread([], 5) == []


# ---- the script


@pytest.fixture
def checkpoints(tmp_path):
    """Paths of the same encoder in files of pre-training, fine-tuning, the original's release and timm."""
    fcmae = randomise(FCMAE(64, decoder_embed_dim=16, **SMALL))
    classifier = randomise(ConvNeXtV2(num_classes=3, **SMALL))
    classifier.load_state_dict(fcmae.encoder.state_dict(), strict=False)
    contents = {
        "pretrained": {"format": 2, "model": fcmae.state_dict(), "args": {"input_size": 64}},
        "finetuned": {"format": 2, "model": classifier.state_dict(), "args": {"input_size": (64, 64)}},
        "released": {"model": fcmae.encoder.state_dict()},
        "timm": to_timm(classifier.state_dict()),
    }
    paths = []
    for name, content in contents.items():
        paths.append(tmp_path / f"{name}.pth")
        torch.save(content, paths[-1])
    return paths


def rows(out):
    """{first word: numbers} of the lines of all tables."""
    lines = [line.split() for line in out.splitlines() if line.startswith(("stages.", "mean"))]
    return {name: [float(word) for word in words] for name, *words in lines}


def test_every_known_form_of_a_checkpoint_is_read(collapse, checkpoints, image_folder):
    result = collapse("--checkpoint", *checkpoints, "--images", image_folder, "--num_images", 5, "--input_size", 64)
    assert (result.status, result.err) == (0, "")
    assert "pretrained.pth: 5 images of 64 x 64 pixels" in result.out
    table = rows(result.out)
    assert list(table) == [*BLOCKS, "mean"]
    for name in BLOCKS:
        assert table[name][1:4] * 4 == table[name][1:]  # the same network four times
    assert [table[name][0] for name in BLOCKS] == [0, 0.25, 0.5, 0.75, 1]
    assert table["mean"][0] == pytest.approx(sum(table[name][1] for name in BLOCKS) / 5, abs=1e-3)


def test_images_are_seen_as_in_evaluation(collapse, checkpoints, tmp_path):
    pixels = torch.randint(256, (32, 32, 3), dtype=torch.uint8)
    Image.fromarray(pixels.numpy()).save(tmp_path / "a.png")
    mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    model = ConvNeXtV2(num_classes=3, **SMALL)
    model.load_state_dict(torch.load(checkpoints[1], weights_only=True)["model"])
    layers = measure(model, [((pixels / 255 - mean) / std).permute(2, 0, 1)])
    result = collapse("--checkpoint", checkpoints[1], "--images", tmp_path / "a.png", "--input_size", 32)
    measured = [rows(result.out)[block][1:3] for block in BLOCKS]
    assert measured == [pytest.approx([layer.before, layer.after], abs=6e-4) for layer in layers]


def test_the_input_size_is_that_of_the_training(collapse, checkpoints, image_folder):
    flags = ("--images", image_folder, "--num_images", 1)
    assert "1 image of 64 x 64 pixels" in collapse("--checkpoint", checkpoints[1], *flags).out
    assert "1 image of 224 x 224 pixels" in collapse("--checkpoint", checkpoints[2], *flags).out


def test_a_checkpoint_that_is_given_twice_is_measured_once(collapse, checkpoints, image_folder):
    path = checkpoints[0]
    again = path.parent / "." / ".." / path.parent.name / path.name
    result = collapse("--checkpoint", path, again, "--images", image_folder, "--num_images", 1)
    assert result.out.count("1 image of") == 1 and len(rows(result.out)["mean"]) == 3


def test_digits_need_no_images_and_networks_of_other_depths_have_their_own_table(collapse, tmp_path):
    for name, depths in (("a", (1, 1, 1, 1)), ("b", (1, 1, 2, 1))):
        model = ConvNeXtV2(in_chans=1, num_classes=2, depths=depths, dims=SMALL["dims"], stem_stride=1)
        torch.save(model.state_dict(), tmp_path / f"{name}.pth")
    paths = (tmp_path / "a.pth", tmp_path / "b.pth")
    result = collapse("--checkpoint", *paths, "--data_set", "DIGITS", "--num_images", 2, "--input_size", 32)
    assert result.status == 0 and result.out.count("mean") == 2 and result.out.count("stages.2.1") == 1


@needs_matplotlib
def test_the_picture_has_two_curves_a_checkpoint():
    measured = {
        "a/c.pth": [Layer(f"stages.{i}.0", i / 3, 0.1 * i, 0.2 * i, 0) for i in range(4)],
        "b/c.pth": [Layer(f"stages.{i}.0", i / 4, 0.3, 0.4, 0) for i in range(5)],
    }
    figure = tools.collapse.draw(measured)
    (axis,) = figure.axes
    drawn = [(line.get_linestyle(), list(line.get_xdata()), list(line.get_ydata())) for line in axis.get_lines()]
    index = [i / 3 for i in range(4)]
    assert drawn[0] == ("-", index, [0, 0.2, 0.4, pytest.approx(0.6)])
    assert drawn[1] == ("--", index, [0, 0.1, 0.2, pytest.approx(0.3)])
    assert [look for look, *_ in drawn] == ["-", "--", "-", "--"] and drawn[3][2] == [0.3] * 5
    first, second = axis.get_lines()[::2]
    assert first.get_color() == axis.get_lines()[1].get_color() != second.get_color()
    texts = [[text.get_text() for text in legend.get_texts()] for legend in figure.legends]
    assert texts == [["a/c.pth", "b/c.pth"], ["after GRN", "before GRN"]]


@needs_matplotlib
def test_the_picture_is_written(collapse, checkpoints, image_folder, tmp_path):
    flags = ("--checkpoint", checkpoints[0], "--images", image_folder, "--num_images", 1)
    result = collapse(*flags, "--output", tmp_path / "curve.png")
    assert result.status == 0 and result.out.endswith(f"{tmp_path}/curve.png\n")
    assert Image.open(tmp_path / "curve.png").format == "PNG"


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ("--checkpoint FOLDER/none.pth --images IMAGES", "FOLDER/none.pth: No such file or directory"),
        ("--checkpoint GOOD FOLDER/other.pth --images IMAGES", "no downsample_layers.0.0.weight"),
        ("--checkpoint FOLDER/v1.pth --images IMAGES", "such as stages.0.0.grn.gamma is missing"),
        ("--checkpoint GOOD --images FOLDER/none.png", "--images FOLDER/none.png: cannot be read"),
        ("--checkpoint GOOD --images FOLDER/empty", "--images FOLDER/empty: no image there"),
        ("--checkpoint GOOD --images IMAGES --num_images 0", "--num_images 0: must be a whole number, at least 1"),
        ("--checkpoint GOOD --images IMAGES --input_size 100", "100: must be one or two multiples of 32"),
        ("--checkpoint GOOD --images IMAGES --input_size 64 64 64", "64 64 64: must be one or two numbers"),
        ("--checkpoint GOOD --images IMAGES --model_key ema", "holds no weights"),
        ("--checkpoint GOOD --images IMAGES --device gpu", "--device gpu: must be cpu, cuda or cuda:N"),
        ("--checkpoint FOLDER/two.pth --data_set DIGITS --input_size 32", "has 1, 3 or 4 channels, not the 2 of the"),
        ("--checkpoint GOOD", "one of the arguments --images --data_set is required"),
        ("--checkpoint GOOD --images IMAGES --data_set DIGITS", "not allowed with argument --images"),
        ("--checkpoint GOOD --images IMAGES --output FOLDER/none/a.png", "FOLDER/none/a.png: No such file"),
        ("--checkpoint GOOD --images IMAGES --output GOOD", "finetuned.pth: must end in one of .png, .pdf, .svg"),
        ("--checkpoint GOOD --images FOLDER/a.png --output FOLDER/a.png", "FOLDER/a.png: is one of the images"),
    ],
)
def test_mistakes_are_reported_in_one_line_before_anything_is_measured(
    capsys, monkeypatch, checkpoints, image_folder, tmp_path, flags, words
):
    if "--output FOLDER" in flags:
        pytest.importorskip("matplotlib")
    good = torch.load(checkpoints[1], weights_only=True)["model"]
    torch.save({"conv1.weight": torch.ones(8, 3, 7, 7)}, tmp_path / "other.pth")
    torch.save({name: value for name, value in good.items() if ".grn." not in name}, tmp_path / "v1.pth")
    torch.save(good | {"downsample_layers.0.0.weight": torch.ones(8, 2, 4, 4)}, tmp_path / "two.pth")
    (tmp_path / "empty").mkdir()
    Image.new("RGB", (48, 40)).save(tmp_path / "a.png")
    monkeypatch.setattr(tools.collapse, "measure", None)
    for word, path in (("FOLDER", tmp_path), ("IMAGES", image_folder), ("GOOD", checkpoints[1])):
        flags, words = flags.replace(word, str(path)), words.replace(word, str(path))
    flags = ["--device", "cpu", *flags.split()]
    result = run_script_here(tools.collapse, flags, monkeypatch, capsys)
    assert result.status == 2 and words in result.err and len(result.err.splitlines()) == 1


def test_without_matplotlib_only_the_picture_is_missing(collapse, checkpoints, image_folder, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    flags = ("--checkpoint", checkpoints[0], "--images", image_folder, "--num_images", 1)
    assert collapse(*flags).status == 0
    result = collapse(*flags, "--output", tmp_path / "curve.png")
    assert result.status == 2 and len(result.err.splitlines()) == 1
    assert "curve.png: needs matplotlib: pip install matplotlib" in result.err
