"""FCMAE: the fully convolutional masked autoencoder that pre-trains ConvNeXt V2 (section 3 of arXiv 2301.00808).

Shapes: N images, L = h x w patches of p x p pixels (the mask unit: 32 x 32 by default), C channels of the latent,
D channels of the decoder. A mask is (N, L), 1 = removed.
"""

import torch
import torch.nn.functional as F
from torch import nn

from models.checkpoints import count_blocks, network_config
from models.convnextv2 import SIZES, Block
from models.convnextv2_sparse import SparseConvNeXtV2
from models.utils import init_weights


class FCMAE(nn.Module):
    """Masked autoencoder with a sparse ConvNeXt V2 encoder and a light ConvNeXt decoder.

    Args:
        img_size: side of the images in pixels, or (height, width); each a multiple of patch_size.
        in_chans: channels of the images.
        depths, dims: blocks and channels of the encoder's stages.
        decoder_depth, decoder_embed_dim: blocks of the decoder and their width D.
        patch_size: side of the mask unit in pixels, 8 times the stem's stride; a multiple of 8.
        mask_ratio: part of the patches that is removed when `forward` is not told.
        norm_pix_loss: predict each patch's pixels normalised by their own mean and variance.
        drop_path_rate: drop path rate of the encoder's last block.
        sparse_backend: "packed" (plain PyTorch) or "minkowski" (MinkowskiEngine; slower, for comparison).
    """

    def __init__(
        self,
        img_size=224,
        in_chans=3,
        depths=(3, 3, 9, 3),
        dims=(96, 192, 384, 768),
        decoder_depth=1,
        decoder_embed_dim=512,
        patch_size=32,
        mask_ratio=0.6,
        norm_pix_loss=False,
        drop_path_rate=0.0,
        sparse_backend="packed",
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

        encoder = encoder_class(sparse_backend)
        self.encoder = encoder(in_chans, depths, dims, drop_path_rate=drop_path_rate, stem_stride=patch_size // 8)
        self.proj = nn.Conv2d(dims[-1], decoder_embed_dim, kernel_size=1)
        self.mask_token = nn.Parameter(torch.zeros(1, decoder_embed_dim, 1, 1))
        self.decoder = nn.Sequential(*(Block(decoder_embed_dim) for _ in range(decoder_depth)))
        self.pred = nn.Conv2d(decoder_embed_dim, patch_size**2 * in_chans, kernel_size=1)
        self.apply(init_weights)
        nn.init.normal_(self.mask_token, std=0.02)

    def set_grad_checkpointing(self, enable=True):
        """As `ConvNeXtV2.set_grad_checkpointing`, for the encoder: the decoder is small."""
        self.encoder.grad_checkpointing = enable

    def patchify(self, imgs):
        """Images (N, in_chans, H, W) -> patches (N, L, p * p * in_chans)."""
        p = self.patch_size
        n, c, height, width = imgs.shape
        x = imgs.reshape(n, c, height // p, p, width // p, p)
        return x.permute(0, 2, 4, 3, 5, 1).reshape(n, -1, p * p * c)

    def unpatchify(self, x, grid=None):
        """Patches (N, L, p * p * in_chans) -> images (N, in_chans, H, W). grid: (h, w), default that of img_size."""
        p = self.patch_size
        h, w = grid or (size // p for size in self.img_size)
        x = x.reshape(len(x), h, w, p, p, self.in_chans)
        return x.permute(0, 5, 1, 3, 2, 4).reshape(len(x), self.in_chans, h * p, w * p)

    def num_visible(self, num_patches, mask_ratio):
        """How many of num_patches a mask of mask_ratio leaves. Raises ValueError if none or all."""
        keep = int(num_patches * (1 - mask_ratio))
        if not 0 < keep < num_patches:
            raise ValueError(f"mask_ratio {mask_ratio} leaves {keep} of {num_patches} patches: must be some, not all")
        return keep

    def gen_random_mask(self, x, mask_ratio, noise=None):
        """Random mask (N, L) of images x, 1 = removed: the int(L * (1 - mask_ratio)) lowest of noise (N, L) stay.

        noise: drawn from torch's generator if not given.
        """
        num_patches = (x.shape[2] // self.patch_size) * (x.shape[3] // self.patch_size)
        keep = self.num_visible(num_patches, mask_ratio)
        if noise is None:
            noise = torch.rand(len(x), num_patches, device=x.device)
        visible = noise.argsort(dim=1)[:, :keep]
        return torch.ones_like(noise).scatter(1, visible, 0.0)

    def forward_encoder(self, imgs, mask_ratio, noise=None):
        """Images (N, in_chans, H, W) -> latent (N, C, h, w), zero at removed patches, and mask (N, L)."""
        mask = self.gen_random_mask(imgs, mask_ratio, noise)
        latent = self.encoder(imgs, mask, num_visible=self.num_visible(mask.shape[1], mask_ratio))
        return latent, mask

    def decode(self, latent, mask):
        """Latent (N, C, h, w) and mask (N, L) -> the decoder's features (N, D, h, w)."""
        x = self.proj(latent)
        removed = mask.view(len(x), 1, *x.shape[2:]).to(x.dtype)
        x = x * (1 - removed) + self.mask_token * removed
        return self.decoder(x.contiguous(memory_format=torch.channels_last))

    def forward_decoder(self, latent, mask):
        """Latent (N, C, h, w) and mask (N, L) -> predicted patches (N, p * p * in_chans, h, w)."""
        return self.pred(self.decode(latent, mask))

    def patch_targets(self, patches):
        """What is predicted of patches (N, L, p * p * in_chans), and each one's mean and deviation (N, L, 1)."""
        mean = patches.mean(dim=-1, keepdim=True)
        std = (patches.var(dim=-1, keepdim=True) + 1e-6) ** 0.5
        return ((patches - mean) / std if self.norm_pix_loss else patches), mean, std

    def patch_loss(self, pred, patches):
        """Mean squared error of each predicted patch: pred and patches (N, L, p * p * in_chans) -> (N, L)."""
        target, _, _ = self.patch_targets(patches)
        return ((pred.to(target.dtype) - target) ** 2).mean(dim=-1)

    def forward_loss(self, imgs, pred, mask):
        """Mean loss of removed patches. pred: (N, p * p * in_chans, h, w) or (N, L, p * p * in_chans)."""
        if pred.ndim == 4:
            pred = pred.flatten(2).transpose(1, 2)
        return (self.patch_loss(pred, self.patchify(imgs)) * mask).sum() / mask.sum()

    def loss_on_removed(self, imgs, features, mask, num_removed):
        """`forward_loss` from the decoder's features (N, D, h, w), predicting the removed patches, R an image, only."""
        n, num_patches = mask.shape
        removed = mask.argsort(dim=1, descending=True, stable=True)[:, :num_removed]  # the ones come first
        rows = (removed + num_patches * torch.arange(n, device=mask.device)[:, None]).flatten()  # (N * R,)
        features = features.flatten(2).transpose(1, 2).flatten(0, 1).index_select(0, rows)
        pred = F.linear(features, self.pred.weight.flatten(1), self.pred.bias)
        patches = self.patchify(imgs).flatten(0, 1).index_select(0, rows)
        return self.patch_loss(pred, patches).mean()

    def forward(self, imgs, labels=None, mask_ratio=None, noise=None, loss_only=False):
        """Images (N, in_chans, H, W) -> loss, pred (N, p * p * in_chans, h, w), mask (N, L). Labels are not used.

        loss_only: pred is None, and the visible patches, which have no part in the loss, are not predicted.
        """
        mask_ratio = self.mask_ratio if mask_ratio is None else mask_ratio
        latent, mask = self.forward_encoder(imgs, mask_ratio, noise)
        if loss_only:
            num_removed = mask.shape[1] - self.num_visible(mask.shape[1], mask_ratio)
            return self.loss_on_removed(imgs, self.decode(latent, mask), mask, num_removed), None, mask
        pred = self.forward_decoder(latent, mask)
        return self.forward_loss(imgs, pred, mask), pred, mask

    @torch.no_grad()
    def reconstruct(self, imgs, pred, mask):
        """Images with removed patches as predicted, in the pixels' own scale, and visible ones as they are.

        With norm_pix_loss each prediction gets its patch's true mean and deviation back: the network never sees them.
        """
        pred = pred.flatten(2).transpose(1, 2).to(imgs.dtype)
        _, mean, std = self.patch_targets(self.patchify(imgs))
        if self.norm_pix_loss:
            pred = pred * std + mean
        patches = torch.where(mask[:, :, None].bool(), pred, self.patchify(imgs))
        return self.unpatchify(patches, tuple(size // self.patch_size for size in imgs.shape[2:]))


def from_state_dict(state, norm_pix_loss=True):
    """The FCMAE that a state dict (dense names) was taken from, of any size, with its weights.

    Raises ValueError, naming what is missing, if it is not of an encoder with a decoder.
    """
    missing = [name for name in ("proj.weight", "mask_token", "pred.weight") if name not in state]
    if missing:
        raise ValueError(f"no {', '.join(missing)}: accepted is an FCMAE with its decoder")
    config = network_config(state, prefix="encoder.")
    patch_size = 8 * config.pop("stem_stride")
    model = FCMAE(
        img_size=patch_size,
        decoder_depth=count_blocks(state, "decoder."),
        decoder_embed_dim=len(state["proj.weight"]),
        patch_size=patch_size,
        norm_pix_loss=norm_pix_loss,
        **config,
    )
    model.load_state_dict(state)
    return model


def encoder_class(sparse_backend):
    """The encoder of that name. Raises ValueError for another name, ImportError where MinkowskiEngine is missing."""
    if sparse_backend == "packed":
        return SparseConvNeXtV2
    if sparse_backend == "minkowski":
        from models.convnextv2_minkowski import MinkowskiConvNeXtV2

        return MinkowskiConvNeXtV2
    raise ValueError(f"sparse_backend {sparse_backend!r}: must be 'packed' or 'minkowski'")


def convnextv2_atto(**kwargs):
    return FCMAE(**SIZES["convnextv2_atto"], **kwargs)


def convnextv2_femto(**kwargs):
    return FCMAE(**SIZES["convnextv2_femto"], **kwargs)


def convnextv2_pico(**kwargs):
    return FCMAE(**SIZES["convnextv2_pico"], **kwargs)


def convnextv2_nano(**kwargs):
    return FCMAE(**SIZES["convnextv2_nano"], **kwargs)


def convnextv2_tiny(**kwargs):
    return FCMAE(**SIZES["convnextv2_tiny"], **kwargs)


def convnextv2_base(**kwargs):
    return FCMAE(**SIZES["convnextv2_base"], **kwargs)


def convnextv2_large(**kwargs):
    return FCMAE(**SIZES["convnextv2_large"], **kwargs)


def convnextv2_huge(**kwargs):
    return FCMAE(**SIZES["convnextv2_huge"], **kwargs)
