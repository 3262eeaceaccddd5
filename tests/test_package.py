"""The network installs by pip as `convnextv2`, alone, and works in a folder whose modules have our scripts' names."""

import subprocess
import sys
from pathlib import Path

import torch
from conftest import randomise

from models.convnextv2 import ConvNeXtV2
from models.fcmae import FCMAE

ROOT = Path(__file__).resolve().parent.parent
SMALL = {"depths": (1, 1, 2, 1), "dims": (8, 16, 24, 32)}
USER = """
import sys, utils
assert utils.MINE and utils.__file__.startswith(FOLDER)
import convnextv2, torch, timm
assert convnextv2.__file__.startswith(TARGET) and "datasets" not in sys.modules
imgs = torch.ones(1, 1, 32, 32)
for name in ("pretrained", "finetuned", "format1"):
    model = convnextv2.from_checkpoint(f"{FOLDER}/{name}.pth")
    assert not model.training and [len(x[0, 0]) for x in model.feature_maps(imgs)] == [16, 8, 4, 2]
    torch.save((model.forward_trunk(imgs), model(imgs)), f"{FOLDER}/{name}-out.pth")
    config = timm.data.resolve_model_data_config(model)
    assert (config["input_size"], config["mean"], config["crop_mode"]) == ((1, 32, 32), (0.5,), "squash"), config
assert model.class_names == ["a", "b"]

sys.path.insert(1, ROOT)
import models.kernels, convnextv2.kernels  # both register their operators
x = torch.ones(1, 2, 2, 8)
for kernels in (models.kernels, convnextv2.kernels, models.kernels):
    assert kernels._conv(x, torch.ones(49, 8), torch.zeros(8), None, None, False, None, None)[0].eq(4).all()
import models
assert type(models.from_checkpoint(f"{FOLDER}/finetuned.pth")) is not type(model)
"""


@torch.no_grad()
def test_an_installed_copy_reads_every_checkpoint_in_a_folder_with_its_own_utils(tmp_path):
    target, folder = tmp_path / "site", tmp_path / "mine"
    folder.mkdir()
    source = tmp_path / "source"  # pip builds in the tree it installs
    source.mkdir()
    for name in ("pyproject.toml", "README.md", "models"):
        (source / name).symlink_to(ROOT / name)
    options = "--quiet --no-deps --no-build-isolation --no-index --disable-pip-version-check --target".split()
    command = [sys.executable, "-m", "pip", "install", *options, str(target), str(source)]
    subprocess.run(command, check=True, capture_output=True, text=True)

    (folder / "utils.py").write_text("MINE = True")
    pretrained = randomise(FCMAE(32, 1, patch_size=16, decoder_embed_dim=16, **SMALL)).eval()
    finetuned = randomise(ConvNeXtV2(1, 2, stem_stride=2, **SMALL)).eval()
    args = {"input_size": [32, 32], "imagenet_default_mean_and_std": False}
    content = {"format": 2, "args": args, "class_names": ["a", "b"]}
    for name, model in (("pretrained", pretrained), ("finetuned", finetuned)):
        torch.save(content | {"model": model.state_dict(), "config": model.config}, folder / f"{name}.pth")
    torch.save({"format": 1, "model": finetuned.state_dict()} | content | {"format": 1}, folder / "format1.pth")

    code = f"FOLDER, TARGET, ROOT = {str(folder)!r}, {str(target)!r}, {str(ROOT)!r}\n{USER}"
    (folder / "use.py").write_text(code)
    environment = {"PYTHONPATH": str(target), "PATH": "/usr/bin:/bin"}
    result = subprocess.run([sys.executable, "use.py"], cwd=folder, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    imgs = torch.ones(1, 1, 32, 32)
    trunk, _ = torch.load(folder / "pretrained-out.pth")
    assert torch.allclose(trunk, pretrained.encode_all(imgs), atol=1e-5)
    for name in ("finetuned", "format1"):
        trunk, logits = torch.load(folder / f"{name}-out.pth")
        assert torch.allclose(logits, finetuned(imgs), atol=1e-5)
    assert sorted(path.name for path in target.iterdir())[0] == "convnextv2" and len(list(target.iterdir())) == 2
