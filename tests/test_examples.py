"""The examples: scenes and crops in standard layouts, a U-Net and a Mask R-CNN; they resume and measure right.

And the recipes for small data.
"""

import functools
import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import assert_same_weights, randomise, run_script_here
from PIL import Image

import main_finetune
import main_pretrain
from examples import crops, detection, scenes, segmentation
from examples.common import build_encoder, build_optimizer
from flags import FlagParser
from models.fcmae import FCMAE

pytestmark = [
    pytest.mark.usefixtures("seed_and_one_thread", "narrow"),
    pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning"),  # of pycocotools
]
SMALL = {"depths": (1, 1, 2, 1), "dims": (8, 16, 24, 32)}


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Scenes: 2 unlabelled, 4 to train, 3 to validate."""
    folder = tmp_path_factory.mktemp("scenes")
    counts = dict(unlabelled=2, train=4, val=3)
    scenes.main(FlagParser(parents=[scenes.get_args_parser()]).parse_args(
        [str(folder), *(word for name, count in counts.items() for word in (f"--{name}", str(count)))]
    ))  # fmt: skip
    return folder


@pytest.fixture
def example(data, monkeypatch, capsys):
    """example(module, *flags): `python -m examples.NAME` on the scenes, see `run_script_here`."""
    flags = ["--data_path", data, "--device", "cpu", "--batch_size", 2]
    return lambda module, *more: run_script_here(module, [*flags, *more], monkeypatch, capsys)


def test_boxes_and_masks_of_scenes_agree(data):
    coco = detection.CocoFolder(data / "train", masks=True)
    assert len(coco.ids) == 4 and coco.categories == list(range(1, 11))
    for number in range(4):
        target, image = coco.target(number), coco.image(number)
        classes = torch.from_numpy(np.array(Image.open(data / f"train/masks/{number:04}.png")))
        assert image.shape == (3, 128, 128) and len(target["labels"]) >= 1
        by_hand = torch.zeros(128, 128, dtype=torch.uint8)
        for box, label, mask in zip(target["boxes"].int(), target["labels"], target["masks"].bool(), strict=True):
            rows, columns = mask.nonzero().T
            assert box.tolist() == [columns.min(), rows.min(), columns.max() + 1, rows.max() + 1]
            by_hand[mask] = label.byte()
        assert torch.equal(by_hand, classes)


def test_a_detector_looks_at_all_four_scales_of_the_encoder():
    """torchvision's heads leave out scales of other names, without a word."""
    args = FlagParser(parents=[detection.get_args_parser()]).parse_args(
        ["--data_path", "", "--masks", "--device", "cpu"]
    )
    model = detection.build_model(args, 11).eval()
    model([torch.rand(3, 128, 128)])
    for pool in (model.roi_heads.box_roi_pool, model.roi_heads.mask_roi_pool):
        assert pool.scales == [1 / 4, 1 / 8, 1 / 16, 1 / 32]


def test_a_perfect_detector_has_an_ap_of_100_and_one_that_misses_half_less(data):
    coco = detection.CocoFolder(data / "val", masks=False)
    results = [a | {"score": 1.0} for annotations in coco.coco.imgToAnns.values() for a in annotations]
    results = [{name: result[name] for name in ("image_id", "category_id", "bbox", "score")} for result in results]
    assert detection.average_precision(coco, results, "bbox") == pytest.approx(100)
    assert 0 < detection.average_precision(coco, results[::2], "bbox") < 90
    assert detection.average_precision(coco, [], "bbox") == 0


def test_mean_iou_counts_classes_that_occur_and_leaves_ignored_pixels_out():
    target = torch.tensor([[[0, 0, 1, 1, 255]]])
    predicted = torch.tensor([[[0, 1, 1, 1, 3]]])
    assert segmentation.mean_iou(predicted, target, 4) == pytest.approx(100 * (1 / 2 + 2 / 3) / 2)


@pytest.mark.parametrize(
    ("module", "flags", "words"),
    [(segmentation, [], "mIoU"), (detection, ["--masks", "--input_size", 64], "segm AP")],
)
def test_an_example_trains_measures_and_resumes_bit_for_bit(example, module, flags, words, tmp_path):
    whole = example(module, *flags, "--epochs", 2, "--output_dir", tmp_path / "whole")
    assert whole.status == 0 and f"{words} " in whole.out.splitlines()[-1], whole.err
    stopped = functools.partial(example, module, *flags, "--output_dir", tmp_path / "stopped", "--epochs", 2)
    with pytest.MonkeyPatch.context() as patch:
        save = patch_save(patch)
        assert stopped().status == 130 and save
    resumed = stopped()
    assert "resuming from" in resumed.out and resumed.out.splitlines()[-1] == whole.out.splitlines()[-1]
    weights = (torch.load(tmp_path / name / "checkpoint.pth")["model"] for name in ("whole", "stopped"))
    assert_same_weights(*weights)


def patch_save(patch):
    """Stop by Ctrl-C after the first checkpoint; the list of paths saved."""
    from examples import common

    saved, save_together = [], common.save_together

    def save_and_stop(contents):
        save_together(contents)
        saved.extend(contents)
        raise KeyboardInterrupt

    patch.setattr(common, "save_together", save_and_stop)
    return saved


def build_args(*flags):
    parser = FlagParser(parents=[segmentation.get_args_parser()])
    return parser.parse_args(["--data_path", "none", "--device", "cpu", *map(str, flags)])


def test_the_encoder_is_the_checkpoints_and_the_head_does_not_depend_on_it(tmp_path):
    pretrained = randomise(FCMAE(64, decoder_embed_dim=16, **SMALL))
    statistics = {"mean": [0.1, 0.2, 0.3], "std": [0.4, 0.5, 0.6]}
    content = {"model": pretrained.state_dict(), "config": pretrained.config, "args": statistics}
    torch.save(content, tmp_path / "checkpoint-0.pth")
    encoder = build_encoder(build_args("--encoder", tmp_path / "checkpoint-0.pth"))
    assert encoder.statistics == ((0.1, 0.2, 0.3), (0.4, 0.5, 0.6))
    assert_same_weights(encoder.state_dict(), pretrained.encoder.state_dict())
    head = segmentation.UNet(encoder, 11).decoder.state_dict()
    assert_same_weights(head, segmentation.UNet(build_encoder(build_args()), 11).decoder.state_dict())


def test_layer_decay_reaches_the_encoder_and_not_the_head():
    args = build_args("--layer_decay", 0.5)
    model = segmentation.UNet(build_encoder(args), 11)
    optimizer = build_optimizer(args, model)
    scales = {id(p): group["lr_scale"] for group in optimizer.param_groups for p in group["params"]}
    scales = {name: scales[id(p)] for name, p in model.named_parameters()}
    assert scales["scales.encoder.downsample_layers.0.0.weight"] == 0.5**5
    assert scales["scales.encoder.stages.3.0.pwconv1.weight"] == 0.5
    assert {scale for name, scale in scales.items() if "encoder." not in name} == {1.0}


def test_a_frozen_encoder_does_not_change(example, tmp_path):
    assert example(segmentation, "--freeze", "--epochs", 1, "--output_dir", tmp_path).status == 0
    trained = torch.load(tmp_path / "checkpoint.pth")["model"]
    initial = {f"scales.encoder.{name}": value for name, value in build_encoder(build_args()).state_dict().items()}
    assert_same_weights({name: trained[name] for name in initial}, initial)


@pytest.mark.parametrize(
    ("module", "change", "words"),
    [
        (segmentation, lambda folder: (folder / "train/masks/0001.png").unlink(), "0001.png has no mask"),
        (segmentation, lambda folder: (folder / "val/images/0001.png").write_bytes(b"x"), "0001.png: cannot identify"),
        (segmentation, lambda folder: Image.new("L", (64, 64)).save(folder / "train/masks/0001.png"), "of the size of"),
        (detection, lambda folder: (folder / "val/annotations.json").unlink(), "annotations.json: [Errno 2]"),
        (detection, lambda folder: rename_category(folder / "val/annotations.json"), "must be those of train/"),
    ],
)
def test_data_that_does_not_fit_is_one_line(module, change, words, tmp_path, monkeypatch, capsys):
    for split in ("train", "val"):
        scenes.write_split(tmp_path / split, 2, split == "train", 0)
    change(tmp_path)
    result = run_script_here(module, ["--data_path", tmp_path, "--device", "cpu"], monkeypatch, capsys)
    assert result.status == 2 and words in result.err and len(result.err.splitlines()) == 1, result.err


@pytest.mark.parametrize(
    ("module", "package"), [(segmentation, "segmentation_models_pytorch"), (detection, "pycocotools")]
)
def test_a_package_that_is_missing_is_one_line(example, module, package, monkeypatch):
    for name in [name for name in sys.modules if name.split(".")[0] == package] + [package]:
        monkeypatch.setitem(sys.modules, name, None)
    result = example(module)
    assert result.status == 2 and f"needs {package}: pip install {package}" in result.err, result.err
    assert len(result.err.splitlines()) == 1


def rename_category(path):
    content = json.loads(path.read_text())
    content["categories"][0]["id"] = 90
    path.write_text(json.dumps(content))


def write_crops(folder, flags):
    crops.main(FlagParser(parents=[crops.get_args_parser()]).parse_args([str(folder), *flags.split()]))


def test_crops_for_validation_are_of_parts_that_no_other_crop_has_seen(tmp_path, monkeypatch):
    position = np.dstack([np.tile(np.arange(400) // 2, (100, 1))] * 3).astype(np.uint8)  # half of the column
    monkeypatch.setattr(crops, "load_pictures", lambda names: {name: Image.fromarray(position) for name in "ab"})
    write_crops(tmp_path, "--unlabelled 8 --train 8 --val 8")
    seen, held_out = (
        [np.array(Image.open(path)) for path in tmp_path.glob(f"{name}/*/*.png")] for name in ("train", "val")
    )
    seen += [np.array(Image.open(path)) for path in tmp_path.glob("unlabelled/*.png")]
    assert (len(seen), len(held_out)) == (24, 16) and {pixels.shape for pixels in seen + held_out} == {(64, 64, 3)}
    assert max(map(np.max, seen)) <= 133 and min(map(np.min, held_out)) >= 132  # the border is at column 266


def test_crops_of_folders_of_pictures_have_the_size_and_the_color_asked_for(tmp_path):
    for name, color in (("red", (255, 0, 0)), ("blue", (0, 0, 255))):
        (tmp_path / "pictures").mkdir(exist_ok=True)
        Image.new("RGB", (60, 30), color).save(tmp_path / "pictures" / f"{name}.png")
    counts = "--unlabelled 4 --train 2 --val 1 --side 16 --cut 8 20"
    write_crops(tmp_path / "color", f"--pictures {tmp_path / 'pictures'} {counts}")
    write_crops(tmp_path / "gray", f"--pictures {tmp_path / 'pictures'} {counts} --gray")
    files = {name: sorted((tmp_path / name).glob("**/*.png")) for name in ("color", "gray")}
    assert [len(paths) for paths in files.values()] == [10, 10]
    assert {(image.mode, *image.size) for image in map(Image.open, files["color"])} == {("RGB", 16, 16)}
    assert {(image.mode, *image.size) for image in map(Image.open, files["gray"])} == {("L", 16, 16)}
    assert {Image.open(path).getpixel((0, 0)) for path in files["color"] if "red" in str(path)} == {(255, 0, 0)}


def test_turned_crops_are_labelled_by_their_turn(tmp_path):
    """The brightness of this picture grows to the right, so after a quarter turn (counterclockwise) to the top."""
    ramp = np.tile(np.arange(240, dtype=np.uint8), (80, 1))
    (tmp_path / "pictures").mkdir()
    Image.fromarray(ramp).save(tmp_path / "pictures/ramp.png")
    write_crops(
        tmp_path, f"--pictures {tmp_path / 'pictures'} --turns --gray --unlabelled 4 --train 1 --val 1 --cut 64 64"
    )
    for turn, (axis, sign) in zip((0, 90, 180, 270), ((1, 1), (0, -1), (1, -1), (0, 1)), strict=True):
        for split in ("train", "val"):
            (path,) = (tmp_path / split / f"{turn:03}").iterdir()
            differences = np.diff(np.array(Image.open(path)).astype(int), axis=axis)
            assert (sign * differences >= 0).all() and differences.any()


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ("--pictures nowhere", "--pictures nowhere: no such folder; names: page, text, brick"),
        ("--pictures {empty}", "empty: has no pictures"),
        ("--pictures page --cut 64 192", "--cut 64 192: must be at most 128, a third of the width of page"),
        ("--pictures page --cut 64 32", "the smaller first"),
        ("--pictures page page", "page: another picture has this name too; rename one of them"),
    ],
)
def test_crops_that_cannot_be_made_are_one_line(flags, words, tmp_path, monkeypatch, capsys):
    (tmp_path / "empty").mkdir()
    flags = flags.format(empty=tmp_path / "empty").split()
    result = run_script_here(crops, [tmp_path / "crops", *flags], monkeypatch, capsys)
    assert result.status == 2 and words in result.err and len(result.err.splitlines()) == 1, result.err
    assert not (tmp_path / "crops").exists()


def test_crops_have_seventeen_classes_of_whole_pictures():
    pictures = crops.load_pictures(crops.GRAY + crops.COLOR + crops.OTHERS)
    assert len(pictures) == 17 and {picture.mode for picture in pictures.values()} == {"RGB"}
    assert all(picture.width >= 3 * 96 and picture.height >= 96 for picture in pictures.values())


@pytest.mark.parametrize("path", sorted(map(str, Path("recipes").glob("small_*.args"))))
def test_a_recipe_for_small_data_is_accepted(path):
    script = main_pretrain if path.endswith("_pretrain.args") else main_finetune
    data = [] if "DIGITS" in Path(path).read_text() else ["--data_path", "none"]
    script.check_args(FlagParser(parents=[script.get_args_parser()]).parse_args([f"@{path}", *data, "--device", "cpu"]))
