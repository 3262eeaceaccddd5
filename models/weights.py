"""Weights under the names and shapes of other programs, and how they come into a model. Every refusal is a ValueError.

The forms that are read, recognized by the names of the tensors:

    dense       this project, the original's fine-tuned files; released FCMAE files hold no norm and no head
    encoder.    the same names under a prefix, beside a decoder: FCMAE pre-training
    kernel      the original's Minkowski training, see `remap_checkpoint_keys`
    timm        stem.0, stages.1.blocks.0.conv_dw, head.fc, ...; with _ for the first dot: its `features_only`
    hf          transformers: embeddings.patch_embeddings, encoder.stages.0.layers.0.dwconv, classifier, ...
"""

import re

import torch

# Names of this project, timm and transformers; # stands for a number. The first row that fits counts, whatever the way
OURS, TIMM, HF = range(3)
NAMES = (
    ("downsample_layers.0.0.", "stem.0.", "embeddings.patch_embeddings."),
    ("downsample_layers.0.1.", "stem.1.", "embeddings.layernorm."),
    ("downsample_layers.#.#.", "stages.#.downsample.#.", "encoder.stages.#.downsampling_layer.#."),
    ("stages.#.#.dwconv.", "stages.#.blocks.#.conv_dw.", "encoder.stages.#.layers.#.dwconv."),
    ("stages.#.#.norm.", "stages.#.blocks.#.norm.", "encoder.stages.#.layers.#.layernorm."),
    ("stages.#.#.pwconv1.", "stages.#.blocks.#.mlp.fc1.", "encoder.stages.#.layers.#.pwconv1."),
    ("stages.#.#.pwconv2.", "stages.#.blocks.#.mlp.fc2.", "encoder.stages.#.layers.#.pwconv2."),
    ("stages.#.#.grn.gamma", "stages.#.blocks.#.mlp.grn.weight", "encoder.stages.#.layers.#.grn.weight"),
    ("stages.#.#.grn.beta", "stages.#.blocks.#.mlp.grn.bias", "encoder.stages.#.layers.#.grn.bias"),
    ("norm.", "head.norm.", "layernorm."),
    ("head.", "head.fc.", "classifier."),
)
# Options that other programs have too, or that concern pre-training alone; others are options of Block
STANDARD_OPTIONS = set(
    "in_chans num_classes depths dims drop_path_rate head_init_scale stem_stride img_size patch_size mask_ratio "
    "norm_pix_loss decoder_depth decoder_embed_dim sparse_backend".split()
)


def rename(name, before, after):
    """`name` with its beginning from one column of NAMES exchanged for that in another; unchanged if none fits."""
    for names in NAMES:
        match = re.match(re.escape(names[before]).replace(r"\#", r"(\d+)"), name)
        if match:
            return names[after].replace("#", "{}").format(*match.groups()) + name[match.end() :]
    return name


def to_timm(state, config=None):
    """A state dict of the dense model with timm's names and shapes.

    GRN is (4C,) there, and the linear layers of the four smallest sizes, those with two blocks in the first stage, are
    1x1 convolutions. timm demands the norm before the head: where there is none it is written with its initial values.

    config: the model's, whose options are then checked too. Raises ValueError for a network that timm cannot express.
    """
    check_standard(state, config or {}, "timm's ConvNeXt V2", strides=(4,))
    convolutions = count_blocks(state, "stages.0.") == 2
    converted = {}
    for name, value in with_norm(state).items():
        if ".grn." in name:
            value = value.flatten()
        elif convolutions and ".pwconv" in name and name.endswith(".weight"):
            value = value[:, :, None, None]
        converted[rename(name, OURS, TIMM)] = value
    return converted


def to_timm_features(state, config=None, prefix=""):
    """As `to_timm`, for timm's models with `features_only`: the four stages alone, names with _ for the first dot.

    prefix: "model." for the encoders `tu-...` of segmentation_models_pytorch.
    """
    converted = to_timm(state, config).items()
    return {prefix + name.replace(".", "_", 1): value for name, value in converted if not name.startswith("head.")}


def to_hf(state, config=None):
    """A state dict of the dense model with the names of transformers' ConvNextV2ForImageClassification.

    Without a head those of ConvNextV2Model, whose last norm is written with its initial values where there is none.
    Raises ValueError as `to_timm` does; stems of stride 1 and 2 are known there.
    """
    check_standard(state, config or {}, "transformers' ConvNextV2", strides=(1, 2, 4))
    converted = {rename(name, OURS, HF): value for name, value in with_norm(state).items()}
    if "head.weight" not in state:
        return converted
    return {name if name.startswith("classifier.") else f"convnextv2.{name}": v for name, v in converted.items()}


def with_norm(state):
    """The state dict with the norm before the head, at its initial values if it has none."""
    if "norm.weight" in state:
        return state
    width = len(state["downsample_layers.3.1.weight"])
    return state | {"norm.weight": torch.ones(width), "norm.bias": torch.zeros(width)}


def check_standard(state, config, program, strides):
    """Raise ValueError, naming what another program's network has no place for, if it cannot hold these weights."""
    network = network_config(state)
    if network["stem_stride"] not in strides:
        raise ValueError(f"stem stride {network['stem_stride']}: {program} has {', '.join(map(str, strides))} only")
    if options := block_options(config):
        raise ValueError(f"options {options}: {program} has none")
    layers = [f"downsample_layers.{stage}.{i}" for stage in range(4) for i in range(2)]
    blocks = [f"stages.{stage}.{i}" for stage, depth in enumerate(network["depths"]) for i in range(depth)]
    layers += [f"{block}.{layer}" for block in blocks for layer in ("dwconv", "norm", "pwconv1", "pwconv2")]
    expected = {f"{layer}.{part}" for layer in layers for part in ("weight", "bias")}
    expected |= {f"{block}.grn.{part}" for block in blocks for part in ("gamma", "beta")}
    given = {name for name in state if not name.startswith(("norm.", "head."))}
    differences = [f"{name} is missing" for name in sorted(expected - given)]
    differences += [f"{name} has no place there" for name in sorted(given - expected)]
    if differences:
        raise ValueError(f"not the parameters of {program}: {'; '.join(differences[:4])}")


def block_options(config):
    """The options of the blocks in a model's config: those that other programs' networks do not have."""
    return {name: value for name, value in config.items() if name not in STANDARD_OPTIONS}


def check_same_blocks(config, model):
    """Raise ValueError if the blocks of a checkpoint's config have other options than a model's.

    Options may leave no trace in the weights, such as another activation.
    """
    saved, current = block_options(config), block_options(model.config)
    if saved != current:
        raise ValueError(f"a network with options {saved}, not {current}: give the same flags")


def remap_checkpoint_keys(state):
    """A state dict in any known form with this project's names and shapes, those of the original's dense code.

    From the original's Minkowski training: `kernel` (kh * kw, in, out), or (kh * kw, C) if depthwise, the first axis of
    space running fastest, becomes `weight` (out, in, kh, kw) or (C, 1, kh, kw); biases (1, C) become (C,); `.ln.` and
    `.linear.` go; GRN (1, 4C) becomes (1, 1, 1, 4C), as does timm's (4C,). timm's 1x1 convolutions become linear.
    """
    state = {name.removeprefix("convnextv2."): value for name, value in state.items()}
    if "stem_0.weight" in state:  # timm's features_only
        state = {name.replace("_", ".", 1): value for name, value in state.items()}
    remapped, other = {}, HF if "embeddings.patch_embeddings.weight" in state else TIMM
    for name, value in state.items():
        name = rename(name.replace(".ln.", ".").replace(".linear.", "."), other, OURS)
        if name.endswith(".kernel"):
            name = name.removesuffix("kernel") + "weight"
            side = round(len(value) ** 0.5)
            value = value.view(side, side, *((1,) if value.ndim == 2 else ()), *value.shape[1:])
            value = value.permute(3, 2, 1, 0).contiguous()
        elif name.endswith((".grn.gamma", ".grn.beta")):
            value = value.reshape(1, 1, 1, -1)
        elif name.endswith(".bias"):
            value = value.flatten()
        elif name.endswith((".pwconv1.weight", ".pwconv2.weight")):
            value = value.flatten(1)
        remapped[name] = value
    return remapped


def find_weights(checkpoint, model_key="model|module", model_prefix=""):
    """The weights in a checkpoint, of any known form, with this project's names and shapes.

    model_key: checkpoint keys to try in turn, separated by |; if it has none, the checkpoint itself is the weights.
    model_prefix: only names that begin with it are taken, without it. Raises ValueError if there are none.
    """
    key = next((key for key in model_key.split("|") if key in checkpoint), None)
    state = checkpoint if key is None else checkpoint[key]
    if not isinstance(state, dict) or not all(isinstance(k, str) and torch.is_tensor(v) for k, v in state.items()):
        raise ValueError(
            f"holds no weights: must be a dict of tensors by name, or have one under {model_key!r}; "
            f"it has {', '.join(map(str, list(checkpoint)[:8]))}"
        )
    # Prefixes of DistributedDataParallel and torch.compile, in either order, and of segmentation_models_pytorch
    wrappers = ("module.", "_orig_mod.", "model.")
    while state and any(all(name.startswith(wrapper) for name in state) for wrapper in wrappers):
        state = {name.split(".", 1)[1]: value for name, value in state.items()}
    state = {name.removeprefix(model_prefix): value for name, value in state.items() if name.startswith(model_prefix)}
    if not state:
        raise ValueError(f"holds no weight whose name begins with {model_prefix!r}")
    return remap_checkpoint_keys(state)


def load_weights(model, state):
    """Load exactly the weights of a model. Raises ValueError, with a difference of each kind, if `state` has others."""
    expected = model.state_dict()
    state = {name: unflatten(value, expected[name]) if name in expected else value for name, value in state.items()}
    differences = [
        [f"{name} is missing" for name in expected if name not in state],
        [f"{name} is not of this model" for name in state if name not in expected],
        [
            f"{name} is {tuple(state[name].shape)}, not {tuple(like.shape)}"
            for name, like in expected.items()
            if name in state and state[name].shape != like.shape
        ],
    ]
    if any(differences):
        count, examples = sum(map(len, differences)), "; ".join(kind[0] for kind in differences if kind)
        pretrained = "head.weight" in expected and "mask_token" in state
        hint = ". Load a pre-training checkpoint with --finetune" if pretrained else ""
        raise ValueError(f"a checkpoint of another model: {count} differences, such as {examples}{hint}")
    for name, value in state.items():
        if not value.is_floating_point() or not value.isfinite().all():
            raise ValueError(
                f"{name} holds values of {value.dtype} that are not finite numbers: the weights are spoiled"
            )
    model.load_state_dict(state)


def load_backbone(model, state):
    """Load what a classifier can start from, and return lines that report what was loaded, what was left out and why.

    state: weights of a classifier, of a backbone or of an FCMAE, with this project's names. Left out are a decoder and
    a head of another number of classes. A stem for other channels is adapted. Raises ValueError for other differences.
    """
    state, decoder = split_decoder(state)
    initial = model.state_dict()
    report = []
    if decoder:
        report.append(f"left out {len(decoder)} tensors of the pre-training's decoder")
    if "head.weight" in state and len(state["head.weight"]) != len(initial["head.weight"]):
        classes = len(state["head.weight"]), len(initial["head.weight"])
        report.append(f"left out the head: it has {classes[0]} classes, not {classes[1]}")
        state = {name: value for name, value in state.items() if not name.startswith("head.")}
    stem = "downsample_layers.0.0.weight"
    if stem in state and state[stem].ndim == 4 and state[stem].shape[1] != initial[stem].shape[1]:
        before, after = state[stem].shape[1], initial[stem].shape[1]
        state[stem] = adapt_stem(state[stem], after)
        report.append(f"the stem's {before} channels were {'repeated' if after > before else 'averaged'} into {after}")
    # A backbone comes without a head, and may come without the norm before it.
    new = [layer for layer in ("norm", "head") if not any(name.startswith(f"{layer}.") for name in state)]
    if new:
        report.append(f"newly initialized: {' and '.join(new)}")
    kept = {name: value for name, value in initial.items() if name.split(".")[0] in new}
    load_weights(model, kept | state)
    return [f"loaded {len(state)} of {len(initial)} tensors", *report]


def split_decoder(state):
    """The weights of the network itself, without `encoder.`, and the names of the others: a pre-training's decoder."""
    if not any(name.startswith("encoder.") for name in state):
        return dict(state), []
    network = {name.removeprefix("encoder."): value for name, value in state.items() if name.startswith("encoder.")}
    return network, [name for name in state if not name.startswith("encoder.")]


def unflatten(value, like):
    """A tensor that was stored with axes merged or with axes of length 1 added, in the shape of `like`."""
    same = value.numel() == like.numel()
    if same and value.ndim < like.ndim and len(value) == len(like) or value.squeeze().shape == like.squeeze().shape:
        return value.reshape(like.shape)
    return value


def adapt_stem(weight, in_chans):
    """A stem's weight (C, in, s, s) for other channels: averaged into fewer or repeated into more, as large in sum."""
    before = weight.shape[1]
    if in_chans < before:
        weight = weight.mean(1, keepdim=True).expand(-1, in_chans, -1, -1)
    else:
        weight = weight.repeat(1, -(-in_chans // before), 1, 1)[:, :in_chans]
    return weight * (before / in_chans)


def network_config(state, prefix=""):
    """in_chans, depths, dims and stem_stride of the network whose weights these are: dense names after `prefix`.

    Raises ValueError, naming what is missing, if they are of none.
    """
    stem = f"{prefix}downsample_layers.0.0.weight"  # (C, in_chans, stride, stride)
    later = [f"{prefix}downsample_layers.{stage}.1.weight" for stage in (1, 2, 3)]
    missing = [name for name in (stem, *later) if name not in state]
    if missing:
        raise ValueError(f"no {', '.join(missing)}")
    return dict(
        in_chans=state[stem].shape[1],
        depths=[count_blocks(state, f"{prefix}stages.{stage}.") for stage in range(4)],
        dims=[len(state[name]) for name in (stem, *later)],
        stem_stride=state[stem].shape[-1],
    )


def count_blocks(state, prefix):
    return sum(name.startswith(prefix) and name.endswith(".dwconv.weight") for name in state)
