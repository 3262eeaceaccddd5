"""FCMAE: the fully convolutional masked autoencoder that pre-trains ConvNeXt V2 (section 3 of arXiv 2301.00808).

Shapes: N images, L = h x w patches of p x p pixels (the mask unit: 32 x 32 by default), V of them visible and R
masked; C channels of the latent, D of the decoder, P = p * p * in_chans values a patch. A mask is (N, L), 1 = masked.
"""

from functools import partial

import torch
import torch.nn.functional as F
from torch import nn

from .convnextv2 import SIZES, Block
from .convnextv2_sparse import SparseConvNeXtV2, count_visible, is_patch_conv, split_patches
from .sites import map_as_rows, rows_as_map
from .utils import init_weights, names_without_decay
from .weights import count_blocks, find_weights, load_weights, network_config


class FCMAE(nn.Module):
    """Masked autoencoder with a sparse ConvNeXt V2 encoder and a light ConvNeXt decoder.

    Args:
        img_size: side of the images in pixels, or (height, width); each a multiple of patch_size.
        in_chans: channels of the images.
        decoder_depth, decoder_embed_dim: blocks of the decoder and their width D.
        patch_size: side of the mask unit in pixels, 8 times the stem's stride; a multiple of 8.
        mask_ratio: fraction of the patches to mask, unless `forward` is given another.
        norm_pix_loss: predict each patch's pixels normalized by their own mean and variance.
        sparse_backend: "packed" (plain PyTorch) or "minkowski" (MinkowskiEngine; slower, for comparison).
        network: further arguments of the encoder, see `convnextv2.Network`: depths, dims, drop_path_rate.

    `config` holds the arguments of the constructor, `FCMAE(**model.config)` builds the same network.
    """

    def __init__(
        self,
        img_size=224,
        in_chans=3,
        *,
        decoder_depth=1,
        decoder_embed_dim=512,
        patch_size=32,
        mask_ratio=0.6,
        norm_pix_loss=False,
        sparse_backend="packed",
        **network,
    ):
        super().__init__()
        height, width = (img_size, img_size) if isinstance(img_size, int) else img_size
        if patch_size < 8 or patch_size % 8:
            raise ValueError(f"patch_size {patch_size}: must be a multiple of 8")
        if height % patch_size or width % patch_size or min(height, width) < patch_size:
            raise ValueError(f"img_size {height} x {width}: both sides must be multiples of patch_size {patch_size}")
        self.img_size = (height, width)
        self.in_chans = in_chans
        self.patch_size = patch_size
        self.mask_ratio = mask_ratio
        self.norm_pix_loss = norm_pix_loss

        self.encoder = encoder_class(sparse_backend)(in_chans, stem_stride=patch_size // 8, **network)
        options = self.encoder.block_options
        self.proj = nn.Conv2d(self.encoder.dims[-1], decoder_embed_dim, kernel_size=1)
        self.mask_token = nn.Parameter(torch.zeros(1, decoder_embed_dim, 1, 1))
        self.decoder = nn.Sequential(*(Block(decoder_embed_dim, **options) for _ in range(decoder_depth)))
        self.pred = nn.Conv2d(decoder_embed_dim, patch_size**2 * in_chans, kernel_size=1)
        self.apply(init_weights)
        nn.init.normal_(self.mask_token, std=0.02)
        self.config = {name: value for name, value in self.encoder.config.items() if name != "stem_stride"}
        self.config |= dict(img_size=self.img_size, patch_size=patch_size, mask_ratio=mask_ratio)
        self.config |= dict(decoder_depth=decoder_depth, decoder_embed_dim=decoder_embed_dim)
        self.config |= dict(norm_pix_loss=norm_pix_loss, sparse_backend=sparse_backend)

    def set_grad_checkpointing(self, enable=True):
        """As `Network.set_grad_checkpointing`, for the encoder: the decoder is small."""
        self.encoder.set_grad_checkpointing(enable)

    def no_weight_decay(self):
        """As `Network.no_weight_decay`."""
        return names_without_decay(self)

    # ---- Patches and masks

    def patchify(self, imgs):
        """Images (N, in_chans, H, W) -> patches (N, L, P)."""
        p = self.patch_size
        n, c, height, width = imgs.shape
        x = imgs.reshape(n, c, height // p, p, width // p, p)
        return x.permute(0, 2, 4, 3, 5, 1).reshape(n, (height // p) * (width // p), p * p * c)

    def unpatchify(self, x, grid=None):
        """Patches (N, L, P) -> images (N, in_chans, H, W). grid: (h, w), default that of img_size."""
        p = self.patch_size
        h, w = grid or (size // p for size in self.img_size)
        x = x.reshape(len(x), h, w, p, p, self.in_chans)
        return x.permute(0, 5, 1, 3, 2, 4).reshape(len(x), self.in_chans, h * p, w * p)

    def num_patches(self, imgs):
        """L of images (N, in_chans, H, W)."""
        return (imgs.shape[2] // self.patch_size) * (imgs.shape[3] // self.patch_size)

    @staticmethod
    def num_visible(num_patches, mask_ratio):
        """How many of num_patches a mask of mask_ratio leaves visible. Raises ValueError if none or all."""
        # The length of a range is a plain number; torch.compile would fail with a symbol for the second mask ratio.
        visible = len(range(int(num_patches * (1 - mask_ratio))))
        if not 0 < visible < num_patches:
            raise ValueError(
                f"mask_ratio {mask_ratio} leaves {visible} of {num_patches} patches: must be some, not all"
            )
        return visible

    def gen_random_mask(self, x, mask_ratio, noise=None):
        """Random mask (N, L) of images x, 1 = masked: the int(L * (1 - mask_ratio)) lowest of noise (N, L) are visible.

        noise: drawn from torch's generator if None.
        """
        return self.mask_by_noise(x, self.num_visible(self.num_patches(x), mask_ratio), noise)

    def mask_by_noise(self, x, num_visible, noise=None):
        """`gen_random_mask` by the number of visible patches."""
        if noise is None:
            noise = torch.rand(x.shape[0], self.num_patches(x), device=x.device)
        return torch.ones_like(noise).scatter(1, noise.argsort(dim=1)[:, :num_visible], 0.0)

    # ---- Encoder and decoder

    def forward_encoder(self, imgs, mask_ratio, noise=None):
        """Images (N, in_chans, H, W) -> latent (N, C, h, w), zero at masked patches, and mask (N, L)."""
        num_visible = self.num_visible(self.num_patches(imgs), mask_ratio)
        mask = self.mask_by_noise(imgs, num_visible, noise)
        visible, _ = split_patches(mask, num_visible)
        return self.encoder(imgs, mask, visible=visible), mask

    def encode_all(self, imgs):
        """Images (N, in_chans, H, W) -> latent (N, C, h, w) with nothing masked."""
        visible = torch.arange(self.num_patches(imgs), device=imgs.device).expand(imgs.shape[0], -1)
        return self.encoder(imgs, imgs.new_zeros(visible.shape), visible=visible)

    def decode(self, latent, mask):
        """Latent (N, C, h, w) and mask (N, L) -> the decoder's features (N, D, h, w)."""
        if is_patch_conv(self.proj, latent):  # a matrix product, also where cuDNN would choose another order of sums
            x = F.linear(latent.permute(0, 2, 3, 1), self.proj.weight.flatten(1), self.proj.bias).permute(0, 3, 1, 2)
        else:
            x = self.proj(latent)
        masked = mask.view(x.shape[0], 1, *x.shape[2:]).bool()
        x = torch.where(masked, self.mask_token.to(x.dtype), x)
        return self.decoder(x.contiguous(memory_format=torch.channels_last))

    def forward_decoder(self, latent, mask):
        """Latent (N, C, h, w) and mask (N, L) -> predicted patches (N, P, h, w)."""
        return self.pred(self.decode(latent, mask))

    def predict_rows(self, x):
        """Features of patches (N, R, D) -> predicted patches (N, R, P)."""
        if is_patch_conv(self.pred, x):
            return F.linear(x, self.pred.weight.flatten(1), self.pred.bias)
        return map_as_rows(self.pred(rows_as_map(x)))

    # ---- Loss

    def patch_targets(self, patches):
        """What to predict of patches (N, L, P): with norm_pix_loss each normalized by its own mean and variance."""
        if not self.norm_pix_loss:
            return patches
        values = patches.shape[-1]
        unbiased = (values - 1) / values  # MAE's variance divides by P - 1, a layer norm's by P
        return F.layer_norm(patches, (values,), eps=1e-6 * unbiased) * unbiased**0.5

    def patch_loss(self, pred, patches):
        """Mean squared error of each predicted patch: pred and patches (N, R, P) -> (N, R)."""
        target = self.patch_targets(patches)
        return ((pred.to(target.dtype) - target) ** 2).mean(dim=-1)

    def forward_loss(self, imgs, pred, mask, masked=None):
        """Mean loss of the masked patches, or a dict of named terms whose sum is to be minimized.

        pred: (N, P, h, w) or (N, L, P) of all patches, or (N, R, P) of the masked ones in order.
        masked: (N, R) their numbers, if known; else they are read from the mask.
        """
        if masked is None:
            _, masked = split_patches(mask, count_visible(mask))
        if pred.ndim == 4:
            pred = pred.flatten(2).transpose(1, 2)
        if pred.shape[1] != masked.shape[1]:
            pred = gather_patches(pred, masked)
        return self.patch_loss(pred, gather_patches(self.patchify(imgs), masked)).mean()

    def forward(self, imgs, labels=None, mask_ratio=None, noise=None, masked_only=False, num_visible=None):
        """Images (N, in_chans, H, W) -> loss (see `forward_loss`), pred (N, P, h, w), mask (N, L). Labels are not used.

        masked_only: visible patches, which do not count in the loss, are not predicted either: pred is (N, R, P).
        num_visible: V, in place of mask_ratio. torch.compile makes a graph for each mask_ratio, but one for any V.
        """
        if num_visible is None:
            mask_ratio = self.mask_ratio if mask_ratio is None else mask_ratio
            num_visible = self.num_visible(self.num_patches(imgs), mask_ratio)
        mask = self.mask_by_noise(imgs, num_visible, noise)
        visible, masked = split_patches(mask, num_visible)
        features = self.decode(self.encoder(imgs, mask, visible=visible), mask)
        if masked_only:
            pred = self.predict_rows(gather_patches(features.flatten(2).transpose(1, 2), masked))
        else:
            pred = self.pred(features)
        return self.forward_loss(imgs, pred, mask, masked), pred, mask

    @torch.no_grad()
    def reconstruct(self, imgs, pred, mask, true_statistics=True):
        """Images with the masked patches as predicted (N, P, h, w), in pixel values, and the visible ones as they are.

        With norm_pix_loss a prediction lacks its patch's mean and deviation. true_statistics: give it the true ones,
        which the network never sees; False: the averages over the image's visible patches.
        """
        pred = pred.flatten(2).transpose(1, 2).to(imgs.dtype)
        patches = self.patchify(imgs)
        if self.norm_pix_loss:
            var, mean = torch.var_mean(patches, -1, keepdim=True)
            std = (var + 1e-6) ** 0.5
            if not true_statistics:
                visible = (1 - mask)[:, :, None] / (1 - mask).sum(1)[:, None, None]
                mean, std = ((x * visible).sum(1, keepdim=True) for x in (mean, std))
            pred = pred * std + mean
        patches = torch.where(mask[:, :, None].bool(), pred, patches)
        return self.unpatchify(patches, tuple(size // self.patch_size for size in imgs.shape[2:]))


def gather_patches(x, patches):
    """Rows (N, L, C) at the patch numbers (N, R) -> (N, R, C)."""
    n, num_patches, channels = x.shape
    rows = (patches + num_patches * torch.arange(n, device=x.device)[:, None]).flatten()
    return x.flatten(0, 1).index_select(0, rows).view(*patches.shape, channels)


def from_checkpoint(checkpoint):
    """The FCMAE of a checkpoint, with its weights: built from the checkpoint's `config`, else from their shapes.

    Without a config norm_pix_loss comes from the checkpoint's `args`, else it is True, the original's only setting.
    Raises ValueError unless it holds an encoder with a decoder.
    """
    state = find_weights(checkpoint)
    missing = [name for name in ("proj.weight", "mask_token", "pred.weight") if name not in state]
    if missing:
        raise ValueError(f"no {', '.join(missing)}: must be an FCMAE with its decoder")
    shapes, kept = infer_config(state, checkpoint.get("args")), ("img_size", "norm_pix_loss")
    config = checkpoint.get("config", {}).items()
    options = {name: value for name, value in config if name not in shapes or name in kept}
    try:
        model = FCMAE(**shapes | options)
    except TypeError as error:
        raise ValueError(f"config: {error}") from None
    load_weights(model, state)
    return model


def infer_config(state, args=None):
    """The config of the FCMAE whose weights these are; args: flags of the training, a dict or a namespace, if known."""
    flags = args if isinstance(args, dict) else vars(args) if args else {}
    config = network_config(state, prefix="encoder.")
    patch_size = 8 * config.pop("stem_stride")
    return config | dict(
        img_size=patch_size,
        patch_size=patch_size,
        decoder_depth=count_blocks(state, "decoder."),
        decoder_embed_dim=len(state["proj.weight"]),
        norm_pix_loss=flags.get("norm_pix_loss", True),
    )


def encoder_class(sparse_backend):
    """The encoder of that name. Raises ValueError for another name, ImportError where MinkowskiEngine is missing."""
    if sparse_backend == "packed":
        return SparseConvNeXtV2
    if sparse_backend == "minkowski":
        from .convnextv2_minkowski import MinkowskiConvNeXtV2

        return MinkowskiConvNeXtV2
    raise ValueError(f"sparse_backend {sparse_backend!r}: must be 'packed' or 'minkowski'")


convnextv2_atto = partial(FCMAE, **SIZES["convnextv2_atto"])
convnextv2_femto = partial(FCMAE, **SIZES["convnextv2_femto"])
convnextv2_pico = partial(FCMAE, **SIZES["convnextv2_pico"])
convnextv2_nano = partial(FCMAE, **SIZES["convnextv2_nano"])
convnextv2_tiny = partial(FCMAE, **SIZES["convnextv2_tiny"])
convnextv2_base = partial(FCMAE, **SIZES["convnextv2_base"])
convnextv2_large = partial(FCMAE, **SIZES["convnextv2_large"])
convnextv2_huge = partial(FCMAE, **SIZES["convnextv2_huge"])
