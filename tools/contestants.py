"""The contestants of `tools.benchmark`, all with the same initial weights. Of --part encoder and step (pre-training):

    packed                  the project's FCMAE, as the scripts train it: on CUDA with Triton kernels
    packed compiled         the same under torch.compile(fullgraph=True), with --compile
    packed without triton   plain PyTorch, on CUDA
    dense masked            its encoder computes every site and masks it: tools/dense_masked.py
    dense unmasked          its encoder is the dense network on the whole image; also compiled
    minkowski               its encoder runs on MinkowskiEngine, where that is installed

Of --part finetune (a classifier of 1000 classes with label smoothing):

    dense                   the project's ConvNeXtV2, channels last; also compiled, and without triton
    timm                    timm's model of that name, (N, C, H, W); also channels last, and that compiled
"""

import functools
import warnings

import torch

from models import convnextv2, fcmae
from models.convnextv2_sparse import split_patches
from models.triton_switch import triton_works, use_triton
from tools.dense_masked import DenseMasked
from utils import name_in_errors, to_device

warnings.filterwarnings("ignore", module="MinkowskiEngine")  # it warns on import where it was built without CUDA
PATCH = 32  # pixels
PRETRAIN = ["packed", "packed compiled", "packed without triton"]
PRETRAIN += ["dense masked", "dense unmasked", "dense unmasked compiled", "minkowski"]
FINETUNE = ["dense", "dense compiled", "dense without triton"]
FINETUNE += ["timm", "timm channels last", "timm channels last compiled"]


class DenseUnmasked(convnextv2.ConvNeXtV2):
    """The dense trunk on the whole image: (N, 3, H, W) -> (N, C, h, w). It ignores the mask."""

    def __init__(self, **config):
        super().__init__(num_classes=1, **config)
        self.norm = self.head = torch.nn.Identity()

    def forward(self, imgs, mask, visible=None):
        return self.forward_trunk(imgs)


def count_patches(args):
    """The numbers of patches of an image and of visible ones. Raises UserError unless the mask leaves some, not all."""
    patches = (args.input_size // PATCH) ** 2
    with name_in_errors("--mask_ratio"):
        return patches, fcmae.FCMAE.num_visible(patches, args.mask_ratio)


def choose_contestants(args):
    """The contestants of --part, the reference first, and {contestant: reason} of those left out."""
    names = FINETUNE if args.part == "finetune" else PRETRAIN
    names = [name for name in names if args.compile or "compiled" not in name]
    names = [name for name in names if args.device == "cuda" or "triton" not in name]
    reason = why_no_minkowski(args) if "minkowski" in names else None
    return [name for name in names if name != "minkowski" or not reason], {"minkowski": reason} if reason else {}


def why_no_minkowski(args):
    """Why MinkowskiEngine is left out; None if it is not."""
    if args.dtype != "float32":
        return f"it computes in float32 only, not in {args.dtype}"
    try:
        from models.convnextv2_minkowski import ME
    except ImportError as error:
        return str(error).splitlines()[0]
    return None if args.device == "cpu" or ME.is_cuda_available() else "this MinkowskiEngine was built without CUDA"


def build_classifier(name, contestant):
    """The project's or timm's classifier of that name."""
    torch.manual_seed(0)
    model = getattr(convnextv2, name)(num_classes=1000)
    if not contestant.startswith("timm"):
        return model
    import timm

    from models.weights import to_timm

    timm_model = timm.create_model(name, num_classes=1000)
    timm_model.load_state_dict(to_timm(model.state_dict()))
    return timm_model.to(memory_format=torch.channels_last) if "channels last" in contestant else timm_model


def build_fcmae(name, contestant, input_size):
    """The FCMAE of that name with the contestant's encoder."""
    torch.manual_seed(0)
    model = getattr(fcmae, name)(img_size=input_size)
    if contestant == "minkowski":
        minkowski = getattr(fcmae, name)(img_size=input_size, sparse_backend="minkowski")
        minkowski.load_state_dict(model.state_dict())
        return minkowski
    if contestant == "dense masked":
        model.encoder = DenseMasked(model.encoder)
    elif contestant.startswith("dense unmasked"):
        encoder = DenseUnmasked(**convnextv2.SIZES[name])
        encoder.load_state_dict(model.encoder.state_dict())
        model.encoder = encoder
    return model


def choose_kernels(contestant, device):
    """Triton's where they work, as in the scripts, but for a contestant that goes without."""
    use_triton(device == "cuda" and "without triton" not in contestant and triton_works(device) is None)


def make_step(name, contestant, batch_size, args):
    """A function without arguments that runs one step of --part on a fixed batch of noise."""
    finetune = args.part == "finetune"
    model = build_classifier(name, contestant) if finetune else build_fcmae(name, contestant, args.input_size)
    model = to_device(model, args.device)  # as the scripts do
    choose_kernels(contestant, args.device)
    imgs = torch.randn(batch_size, 3, args.input_size, args.input_size, device=args.device)
    imgs = imgs.contiguous(memory_format=torch.channels_last) if "channels last" in contestant else imgs
    forward = make_forward(model, imgs, "compiled" in contestant, args)
    autocast = torch.autocast(args.device, getattr(torch, args.dtype), enabled=args.dtype != "float32")
    scaler = torch.amp.GradScaler(args.device, enabled=args.dtype == "float16")
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, betas=(0.9, 0.95), weight_decay=0.05, fused=True)
    if args.part == "encoder":
        side = args.input_size // PATCH
        grad = torch.randn(batch_size, model.proj.in_channels, side, side, device=args.device)

    def step():
        with autocast:
            output = forward()
        if args.part == "encoder":
            output.backward(grad.to(output.dtype))
        else:
            scaler.scale(output).backward()
            scaler.step(optimizer)
            scaler.update()
        optimizer.zero_grad(set_to_none=True)

    return step


def make_forward(model, imgs, compiled, args):
    """A function without arguments: the loss of the batch; for --part encoder the encoder's output (N, C, h, w)."""
    compile = functools.partial(torch.compile, fullgraph=args.part != "finetune") if compiled else lambda step: step
    if args.part == "finetune":
        targets = torch.arange(len(imgs), device=args.device)
        criterion, classify = torch.nn.CrossEntropyLoss(label_smoothing=0.1), compile(model)
        return lambda: criterion(classify(imgs).float(), targets)
    if args.part == "step":
        compute_loss = compile(model)
        return lambda: compute_loss(imgs, mask_ratio=args.mask_ratio, masked_only=True)[0]
    mask, (_, num_visible) = model.gen_random_mask(imgs, args.mask_ratio), count_patches(args)

    @compile
    def encode(imgs, mask):
        visible, _ = split_patches(mask, num_visible)
        return model.encoder(imgs, mask, visible=visible)

    return lambda: encode(imgs, mask)
