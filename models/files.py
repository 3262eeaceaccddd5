"""Files of weights in every form that is read: from a name to the checkpoint's dict, and to a model ready for use.

    FILE.pth            torch.save of this project, the original or timm
    FILE.safetensors    of `tools.convert` or any program; this project's metadata has the config and flags as JSON
    FOLDER              of Hugging Face transformers: config.json and model.safetensors
    timm:NAME           released weights by timm's name, such as timm:convnextv2_tiny.fcmae, downloaded by timm once

Every refusal is a ValueError or an OSError.
"""

import argparse
import json
import pickle
import zipfile
from pathlib import Path

import torch

from . import convnextv2

IMAGENET_STATISTICS = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # mean and standard deviation, RGB
INCEPTION_STATISTICS = (0.5, 0.5, 0.5), (0.5, 0.5, 0.5)
METADATA = ("config", "args", "class_names", "task")  # what tools need of a checkpoint beside its weights


def read_other_file(path):
    """The checkpoint's dict, {"model": weights, ...}, of all forms but torch.save's; None for a file of that."""
    if str(path).startswith("timm:"):
        return {"model": download_from_timm(str(path).removeprefix("timm:"))}
    if Path(path).is_dir():
        return read_huggingface(Path(path))
    return read_safetensors(path) if str(path).endswith(".safetensors") else None


def read_safetensors(path):
    """{"model": weights} of a .safetensors file, with its METADATA if it was written here."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt") as file:
            metadata = json.loads((file.metadata() or {}).get("convnextv2", "{}"))
            weights = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  (not a dict)
    except (SafetensorError, json.JSONDecodeError) as error:
        raise ValueError(f"not a whole safetensors file: {error}") from None
    return {"model": weights} | {name: metadata[name] for name in METADATA if name in metadata}


def write_safetensors(checkpoint, weights, file):
    """Write weights and the METADATA of the checkpoint that they are from to a binary file."""
    from safetensors.torch import save

    metadata = {name: checkpoint[name] for name in METADATA if name in checkpoint}
    if isinstance(metadata.get("args"), argparse.Namespace):  # of the original
        metadata["args"] = vars(metadata["args"])
    weights = {name: value.contiguous() for name, value in weights.items()}
    file.write(save(weights, {"format": "pt", "convnextv2": json.dumps(metadata)}))


def read_huggingface(folder):
    """The checkpoint of a folder as `save_pretrained` of transformers' ConvNextV2 writes it."""
    try:
        config = json.loads((folder / "config.json").read_text())
        preprocessor = folder / "preprocessor_config.json"
        preprocessor = json.loads(preprocessor.read_text()) if preprocessor.exists() else {}
    except (OSError, json.JSONDecodeError) as error:
        raise ValueError(f"a folder without config.json and model.safetensors of transformers: {error}") from None
    if config.get("model_type") != "convnextv2":
        raise ValueError(f"model_type {config.get('model_type')!r}: must be convnextv2")
    args = {"input_size": [config.get("image_size", 224)] * 2, "crop_pct": preprocessor.get("crop_pct")}
    if "image_mean" in preprocessor:
        args |= {"mean": preprocessor["image_mean"], "std": preprocessor.get("image_std")}
    checkpoint = read_safetensors(folder / "model.safetensors") | {"args": args}
    checkpoint["task"], names = config.get("convnextv2_task"), config.get("id2label")
    return checkpoint | ({"class_names": [names[key] for key in sorted(names, key=int)]} if names else {})


def download_from_timm(name):
    """The weights that timm releases under a name, such as convnextv2_tiny.fcmae, from its cache or the network."""
    from timm.models import get_pretrained_cfg, list_pretrained, load_state_dict_from_hf

    names = list_pretrained("convnextv2_*")
    if name not in names:
        raise ValueError(f"must be timm: and one of {', '.join(names)}")
    try:
        return load_state_dict_from_hf(get_pretrained_cfg(name).hf_hub_id)
    except Exception as error:  # many kinds, of the network, the hub and the disk
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ValueError(f"neither in timm's cache nor to be downloaded (is there a network?): {reason}") from None


def find_statistics(args, in_chans):
    """(mean, std) of each channel, in [0, 1], by which a training with these flags, a dict, normalizes images.

    Those of --mean and --std, else ImageNet's or Inception's, and if there are not 3 channels, the average of RGB.
    Raises ValueError for --mean and --std of another number of channels.
    """
    if args.get("mean") or args.get("std"):
        mean, std = (tuple(args.get(name) or ()) for name in ("mean", "std"))
        if not len(mean) == len(std) == in_chans:
            raise ValueError(f"mean and std have {len(mean)} and {len(std)} values: must be {in_chans}, one a channel")
        return mean, std
    mean, std = IMAGENET_STATISTICS if args.get("imagenet_default_mean_and_std", True) else INCEPTION_STATISTICS
    return (mean, std) if in_chans == 3 else tuple((sum(values) / 3,) * in_chans for values in (mean, std))


def preprocessing(checkpoint, in_chans):
    """How the checkpoint's training saw images, under timm's names: a `pretrained_cfg` without the model.

    input_size (in_chans, height, width), mean and std of each channel, crop_pct, crop_mode, interpolation. Raises
    ValueError if the checkpoint's flags are none.
    """
    try:
        args = checkpoint.get("args") or {}
        args = args if isinstance(args, dict) else vars(args)
        size, crop_pct = args.get("input_size", 224), args.get("crop_pct")
        height, width = (size, size) if isinstance(size, int) else (int(size[0]), int(size[-1]))
        crop_pct = crop_pct and float(crop_pct)
        mean, std = find_statistics(args, in_chans)
    except (TypeError, ValueError, IndexError) as error:  # anybody may have written the file
        raise ValueError(f"its args hold no flags of a training: {error}") from None
    whole = not crop_pct and not 32 < min(height, width) < 384  # without a crop, see `datasets.build_eval_transform`
    crop = dict(crop_pct=1.0, crop_mode="squash") if whole else dict(crop_pct=crop_pct or 0.875, crop_mode="center")
    return dict(input_size=(in_chans, height, width), mean=mean, std=std, interpolation="bicubic") | crop


def from_checkpoint(path, model_key="model|module"):
    """The `ConvNeXtV2` of a file in any form of this module, pre-trained or fine-tuned, with its weights, as `eval`.

    A file without a head, such as of pre-training, gives a model whose norm and head are newly initialized: take its
    `forward_trunk` (N, C, h, w) or `feature_maps`. `model.pretrained_cfg` is `preprocessing`, as timm's models have it,
    and `model.class_names` a list, or None. model_key: checkpoint keys to try, separated by |; "model_ema" for EMA
    weights. Raises ValueError for a file that holds no ConvNeXt V2, OSError if it cannot be read.
    """
    try:
        checkpoint = read_other_file(path) or read_torch_file(path)
        model, _ = convnextv2.from_checkpoint(checkpoint, model_key)
        model.pretrained_cfg = preprocessing(checkpoint, model.config["in_chans"])
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None
    model.class_names = checkpoint.get("class_names")
    return model.eval()


def read_torch_file(path):
    """The dict in a file of torch.save, of tensors, numbers and strings."""
    try:
        with torch.serialization.safe_globals([argparse.Namespace]):  # the original's flags
            checkpoint = torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except (RuntimeError, EOFError, KeyError, pickle.UnpicklingError) as error:
        raise ValueError(f"not a whole file of torch.save: {error}") from None
    if not isinstance(checkpoint, dict):
        raise ValueError(f"holds a {type(checkpoint).__name__}: must be a dict of weights")
    return checkpoint
