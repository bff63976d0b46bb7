# SPDX-License-Identifier: MIT
"""The networks of FaceMAE. Needs only torch and einops: this file may be copied alone.

MAE         ViT masked autoencoder (arXiv 2111.06377), state_dict keys of facebookresearch/mae
IResNet     face recogniser (arXiv 1801.07698), state_dict keys of insightface's iresnet
MarginHead  ArcFace (arXiv 1801.07698) and CosFace (arXiv 1801.09414) logits
"""

import copy
import math

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import nn
from torch.nn.utils.fusion import fuse_conv_bn_eval, fuse_linear_bn_eval


def sincos_positions(dim, grid):
    """Fixed 2-D sine-cosine position embedding, (grid*grid + 1, dim) float32 in [-1, 1].

    Row 0 is the class token's and is zero; row 1 + r*grid + c is the patch in row r, column c.
    The first half of the channels encodes the column, the second the row, each half as sines,
    then cosines, of position / 10000^(4i/dim) (arXiv 1706.03762, section 3.5, in each axis).
    ValueError if dim is not a multiple of 4.
    """
    if dim % 4:
        raise ValueError(f'position embedding of dim {dim} is impossible; use a multiple of 4')
    # float64 because the reference makes these in numpy and float32 would differ in the last bits
    frequency = 10000.0 ** -(torch.arange(dim // 4, dtype=torch.float64) / (dim // 4))
    angle = torch.arange(grid, dtype=torch.float64)[:, None] * frequency  # (G, D/4)
    axis = torch.cat([angle.sin(), angle.cos()], dim=1)  # (G, D/2)
    column, row = axis.repeat(grid, 1), axis.repeat_interleave(grid, dim=0)  # (G*G, D/2)
    patches = torch.cat([column, row], dim=1).float()
    return torch.cat([torch.zeros(1, dim), patches])  # (G*G + 1, D)


def random_masking(noise, ratio):
    """Hide a share of the patches (MAE, section 3): those with the largest noise.

    noise (N, L) of any sortable dtype, ties go to the lower index; ratio in [0, 1).
    Returns keep (N, K) int64, K = L - round(L * ratio), the visible patches by rising noise;
    restore (N, L) int64, the place of each patch in that order; mask (N, L) float32, 0 for a
    visible and 1 for a hidden patch. ValueError if K is not within 1 .. L.
    """
    patches = noise.shape[1]
    visible = patches - round(patches * ratio)
    if not 1 <= visible <= patches:
        raise ValueError(f'mask ratio {ratio} keeps {visible} of {patches} patches; '
                         f'use a ratio from 0 to {(patches - 1) / patches:.3f}')
    order = noise.argsort(dim=1, stable=True)
    restore = order.argsort(dim=1)
    return order[:, :visible], restore, (restore >= visible).float()


class TransformerBlock(nn.Module):
    """Pre-norm self-attention and MLP, (N, T, D) -> (N, T, D) (ViT, arXiv 2010.11929, eq. 2-3)."""

    def __init__(self, dim, heads, mlp_ratio):
        super().__init__()
        self.heads = heads
        self.norm1 = nn.LayerNorm(dim, eps=1e-6)
        self.attn = nn.ModuleDict({'qkv': nn.Linear(dim, 3 * dim), 'proj': nn.Linear(dim, dim)})
        self.norm2 = nn.LayerNorm(dim, eps=1e-6)
        hidden = int(dim * mlp_ratio)
        self.mlp = nn.ModuleDict({'fc1': nn.Linear(dim, hidden), 'fc2': nn.Linear(hidden, dim)})

    def forward(self, x):
        qkv = self.attn['qkv'](self.norm1(x))  # (N, T, 3*D)
        q, k, v = rearrange(qkv, 'n t (three h d) -> three n h t d', three=3, h=self.heads)
        mixed = F.scaled_dot_product_attention(q, k, v)  # (N, H, T, D/H)
        x = x + self.attn['proj'](rearrange(mixed, 'n h t d -> n t (h d)'))
        return x + self.mlp['fc2'](F.gelu(self.mlp['fc1'](self.norm2(x))))


class MAE(nn.Module):
    """Masked autoencoder (arXiv 2111.06377, section 3) for square RGB images of size pixels.

    Images are (N, 3, size, size) in any fixed normalisation, L = (size / patch)^2. The defaults
    are ViT-B/8 at 112 pixels. Hidden pixels are never read: the prediction does not depend on
    them in a single bit. ValueError if size, patch, dims and heads do not divide.
    """

    def __init__(self, size=112, patch=8, dim=768, depth=12, heads=12,
                 decoder_dim=512, decoder_depth=8, decoder_heads=16, mlp_ratio=4):
        super().__init__()
        for name, whole, part in [('size', size, patch), ('dim', dim, heads),
                                  ('decoder_dim', decoder_dim, decoder_heads)]:
            if whole % part:
                raise ValueError(f'{name} {whole} does not divide by {part}; use a multiple of it')
        self.size, self.patch, self.grid = size, patch, size // patch

        # A convolution in name only, for the checkpoint's sake: encode() uses it as a matrix
        self.patch_embed = nn.ModuleDict({'proj': nn.Conv2d(3, dim, patch, stride=patch)})
        self.cls_token = nn.Parameter(torch.empty(1, 1, dim))
        self.register_buffer('pos_embed', sincos_positions(dim, self.grid)[None])
        self.blocks = nn.ModuleList(
            TransformerBlock(dim, heads, mlp_ratio) for _ in range(depth))
        self.norm = nn.LayerNorm(dim, eps=1e-6)

        self.decoder_embed = nn.Linear(dim, decoder_dim)
        self.mask_token = nn.Parameter(torch.empty(1, 1, decoder_dim))
        self.register_buffer('decoder_pos_embed', sincos_positions(decoder_dim, self.grid)[None])
        self.decoder_blocks = nn.ModuleList(
            TransformerBlock(decoder_dim, decoder_heads, mlp_ratio) for _ in range(decoder_depth))
        self.decoder_norm = nn.LayerNorm(decoder_dim, eps=1e-6)
        self.decoder_pred = nn.Linear(decoder_dim, patch * patch * 3)

        nn.init.normal_(self.cls_token, std=0.02)
        nn.init.normal_(self.mask_token, std=0.02)
        nn.init.xavier_uniform_(self.patch_embed['proj'].weight.view(dim, -1))
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)

    def patchify(self, x):
        """(N, 3, S, S) -> (N, L, p*p*3), patches and pixels row by row, channels last.

        ValueError if the images are not (3, size, size).
        """
        if tuple(x.shape[1:]) != (3, self.size, self.size):
            raise ValueError(f'images of shape {tuple(x.shape[1:])} do not fit this MAE; '
                             f'resize them to (3, {self.size}, {self.size})')
        return rearrange(x, 'n c (h p) (w q) -> n (h w) (p q c)', p=self.patch, q=self.patch)

    def unpatchify(self, patches):
        """(N, L, p*p*3) -> (N, 3, S, S), the inverse of patchify."""
        return rearrange(patches, 'n (h w) (p q c) -> n c (h p) (w q)',
                         h=self.grid, p=self.patch, q=self.patch)

    def encode(self, x, keep):
        """Images (N, 3, S, S) and keep (N, K) int64 -> latents (N, K + 1, D), class first."""
        index = keep[:, :, None]  # (N, K, 1)
        visible = self.patchify(x).take_along_dim(index, dim=1)  # (N, K, p*p*3)
        matrix = rearrange(self.patch_embed['proj'].weight, 'd c p q -> d (p q c)')
        tokens = F.linear(visible, matrix, self.patch_embed['proj'].bias)  # (N, K, D)
        tokens = tokens + self.pos_embed[:, 1:].take_along_dim(index, dim=1)
        first = (self.cls_token + self.pos_embed[:, :1]).expand(len(x), -1, -1)
        tokens = torch.cat([first.to(tokens.dtype), tokens], dim=1)  # (N, K + 1, D)
        for block in self.blocks:
            tokens = block(tokens)
        return self.norm(tokens)

    def decode(self, latent, restore):
        """Latents (N, K + 1, D) and restore (N, L) int64 -> predicted patches (N, L, p*p*3)."""
        tokens = self.decoder_embed(latent)  # (N, K + 1, E)
        hidden = restore.shape[1] + 1 - tokens.shape[1]
        fill = self.mask_token.to(tokens.dtype).expand(len(tokens), hidden, -1)
        patches = torch.cat([tokens[:, 1:], fill], dim=1)  # (N, L, E), visible ones first
        patches = patches.take_along_dim(restore[:, :, None], dim=1)  # (N, L, E)
        tokens = torch.cat([tokens[:, :1], patches], dim=1) + self.decoder_pos_embed
        for block in self.decoder_blocks:
            tokens = block(tokens)
        return self.decoder_pred(self.decoder_norm(tokens))[:, 1:]

    def forward(self, x, noise, ratio=0.75):
        """Images (N, 3, S, S), noise (N, L), ratio as in random_masking -> pred (N, L, p*p*3),
        mask (N, L). The ValueErrors are those of patchify and random_masking."""
        keep, restore, mask = random_masking(noise, ratio)
        return self.decode(self.encode(x, keep), restore), mask


def masked_mse(pred, target_patches, mask, norm_pix=False):
    """Mean squared error over the hidden patches, a float32 scalar (MAE, section 3).

    pred and target_patches (N, L, p*p*3); mask (N, L), 1 where hidden; 0 if nothing is hidden.
    norm_pix compares with each patch normalised by its own mean and unbiased variance.
    """
    pred, target = pred.float(), target_patches.float()
    if norm_pix:
        mean, variance = target.mean(-1, keepdim=True), target.var(-1, keepdim=True)
        target = (target - mean) / (variance + 1e-6).sqrt()
    error = (pred - target).square().mean(dim=-1)  # (N, L)
    # The clamp keeps a run without masking at 0; 0 / 0 would poison every other loss term
    return (error * mask).sum() / mask.sum().clamp(min=1)


class Shortcut(nn.Conv2d):
    """A 1x1 convolution with a stride, (N, C, H, W) -> (N, planes, H/stride, W/stride), rounded
    up: the pixels that it reads are taken first, then convolved without a stride.

    Same result; the backward pass of the other form crashes in torch's CPU kernels at widths 8 and
    12 (channels last, torch 2.6 to 2.14). A pool of one pixel takes them faster than a slice.
    """

    def forward(self, x):
        return F.conv2d(F.max_pool2d(x, 1, self.stride[0]), self.weight, self.bias)


class ResidualBlock(nn.Module):
    """BN-conv-BN-PReLU-conv-BN plus shortcut, (N, C, H, W) -> (N, planes, H/stride, W/stride)
    rounded up (ArcFace, arXiv 1801.07698, section 3.1)."""

    def __init__(self, inside, planes, stride):
        super().__init__()
        self.bn1 = nn.BatchNorm2d(inside)
        self.conv1 = nn.Conv2d(inside, planes, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(planes)
        self.prelu = nn.PReLU(planes)
        self.conv2 = nn.Conv2d(planes, planes, 3, stride, padding=1, bias=False)
        self.bn3 = nn.BatchNorm2d(planes)
        self.downsample = nn.Identity() if stride == 1 else nn.Sequential(
            Shortcut(inside, planes, 1, stride, bias=False), nn.BatchNorm2d(planes))

    def forward(self, x):
        y = self.prelu(self.bn2(self.conv1(self.bn1(x))))
        return self.bn3(self.conv2(y)) + self.downsample(x)


class IResNet(nn.Module):
    """Face recogniser: images (N, 3, size, size) in [-1, 1] -> embeddings (N, dim), any norm.

    layers are the blocks per stage, width the channels of the first stage, doubled by each next;
    each stage halves the map, rounding up (112 -> 7). Any size from 16 pixels works.
    """

    def __init__(self, layers=(3, 4, 14, 3), width=64, size=112, dim=512):
        super().__init__()
        self.size, side = size, math.ceil(size / 16)
        self.conv1 = nn.Conv2d(3, width, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.prelu = nn.PReLU(width)
        inside = width
        for stage, count in enumerate(layers):
            planes = width * 2 ** stage
            blocks = [ResidualBlock(inside, planes, 2)]
            blocks += [ResidualBlock(planes, planes, 1) for _ in range(count - 1)]
            self.add_module(f'layer{stage + 1}', nn.Sequential(*blocks))
            inside = planes
        self.bn2 = nn.BatchNorm2d(inside)
        self.fc = nn.Linear(inside * side * side, dim)
        self.features = nn.BatchNorm1d(dim)
        self.features.weight.requires_grad_(False)  # a scale would be lost in the cosines
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.normal_(module.weight, std=0.1)

    def forward(self, x):
        x = self.prelu(self.bn1(self.conv1(x)))  # (N, W, S, S)
        x = self.layer4(self.layer3(self.layer2(self.layer1(x))))  # (N, 8*W, S/16, S/16)
        # Half precision in the last layers would round the cosines that everything depends on
        with torch.autocast(x.device.type, enabled=False):
            return self.features(self.fc(self.bn2(x.to(self.fc.weight.dtype)).flatten(1)))


DEPTHS = {10: (1, 1, 1, 1), 18: (2, 2, 2, 2), 34: (3, 4, 6, 3), 50: (3, 4, 14, 3),
          100: (3, 13, 30, 3)}


def iresnet(depth, width=64, size=112, dim=512):
    """An IResNet of 10, 18, 34, 50 or 100 layers; ValueError for another depth."""
    if depth not in DEPTHS:
        raise ValueError(f'there is no IResNet of depth {depth}; use one of {list(DEPTHS)}')
    return IResNet(DEPTHS[depth], width, size, dim)


def folded(net):
    """A frozen copy of an IResNet with its BatchNorms folded into their neighbours, (N, 3, S, S)
    -> (N, dim) like net.eval() up to rounding; leave it in eval mode.

    A block's bn1 stays: its shift would have to reach the zero padding of the next convolution.
    """
    net = copy.deepcopy(net).eval().double()  # so that rounding happens once, at the end
    blocks = [module for module in net.modules() if isinstance(module, ResidualBlock)]
    pairs = [(net, 'conv1', 'bn1')]
    for block in blocks:
        pairs += [(block, 'conv1', 'bn2'), (block, 'conv2', 'bn3')]
        if isinstance(block.downsample, nn.Sequential):
            pairs += [(block.downsample, '0', '1')]
    for parent, conv, norm in pairs:
        setattr(parent, conv, fuse_conv_bn_eval(getattr(parent, conv), getattr(parent, norm)))
        setattr(parent, norm, nn.Identity())

    net.fc, net.features = fuse_linear_bn_eval(net.fc, net.features), nn.Identity()
    scale = net.bn2.weight / (net.bn2.running_var + net.bn2.eps).sqrt()  # (C,)
    shift = net.bn2.bias - net.bn2.running_mean * scale
    pixels = net.fc.in_features // len(scale)  # flatten() repeats a channel over its map
    net.fc.bias.data += net.fc.weight.data @ shift.data.repeat_interleave(pixels)
    net.fc.weight.data *= scale.data.repeat_interleave(pixels)
    net.bn2 = nn.Identity()
    return net.float().requires_grad_(False)


class MarginHead(nn.Module):
    """Classification logits with a margin on the true class, over classes * dim weights.

    loss 'arcface': cos(theta + margin) (arXiv 1801.07698, eq. 3); 'cosface': cos(theta) - margin
    (arXiv 1801.09414, eq. 4). gradient 'exact' continues arcface beyond theta + margin = pi by
    cos - margin * sin(margin), as its authors do, so that it falls on; 'straight_through' has no
    continuation and passes derivative 1 to the cosine, which is what arcface_torch computes as
    it adds the margin under no_grad. ValueError for another loss or gradient.
    """

    def __init__(self, dim, classes, loss='arcface', scale=64.0, gradient='exact'):
        super().__init__()
        if loss not in ('arcface', 'cosface'):
            raise ValueError(f"unknown loss {loss!r}; use 'arcface' or 'cosface'")
        if gradient not in ('exact', 'straight_through'):
            raise ValueError(f"unknown gradient {gradient!r}; use 'exact' or 'straight_through'")
        self.loss, self.scale, self.gradient = loss, scale, gradient
        self.weight = nn.Parameter(torch.empty(classes, dim).normal_(std=0.01))

    def forward(self, z, labels, margin=0.5):
        """Embeddings (N, dim), labels (N,) int64, margin in radians (arcface) or cosine
        (cosface) -> logits (N, classes) for cross-entropy, float32 (float64 if z is)."""
        cosine = self.cosines(z, self.weight)
        true = cosine.gather(1, labels[:, None])  # (N, 1)
        return self.scale * cosine.scatter(1, labels[:, None], self.with_margin(true, margin))

    @staticmethod
    def cosines(z, weight):
        """Cosines (N, C) in [-1, 1] of embeddings (N, dim) and class centres (C, dim)."""
        dtype = torch.promote_types(z.dtype, torch.float32)
        with torch.autocast(z.device.type, enabled=False):
            z, weight = F.normalize(z.to(dtype)), F.normalize(weight.to(dtype))
            return F.linear(z, weight).clamp(-1, 1)

    def with_margin(self, cosine, margin):
        """What stands in the place of the true class's cosine, any shape."""
        return cosine - margin if self.loss == 'cosface' else self.arc(cosine, margin)

    def arc(self, cosine, margin):
        """cos(theta + margin) of cosines in [-1, 1], any shape, with the chosen gradient."""
        # The clamp acts at theta = 0 and pi only, where the root's derivative is infinite
        sine = ((1 - cosine) * (1 + cosine)).clamp(min=1e-12).sqrt()
        shifted = cosine * math.cos(margin) - sine * math.sin(margin)
        if self.gradient == 'straight_through':
            return cosine + (shifted - cosine).detach()
        beyond = cosine <= math.cos(math.pi - margin)
        return torch.where(beyond, cosine - margin * math.sin(margin), shifted)
