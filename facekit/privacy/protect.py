"""The protections: FaceMAE and what it is compared with.

Stages 2 and 4 share them: an attacker who learns from other people's photos protects them exactly
as the release was protected.
"""
import importlib
import math
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from types import SimpleNamespace

import numpy as np
import torch
import torch.nn.functional as F
from einops import reduce, repeat

import models
from facekit.base import files, process
from facekit.base.config import SPECS, check_value
from facekit.base.errors import InputError, quoted
from facekit.base.launch import command
from facekit.data import batches
from facekit.data.images import decode, encode, to_float, to_uint8
from facekit.nets.weights import digest_of_weights, is_sound, load_finished, load_weights

# The keys of section mae that decide a MAE's shapes
SHAPE = 'patch', 'dim', 'depth', 'heads', 'decoder_dim', 'decoder_depth', 'decoder_heads'
STD = 0.25      # of grey levels in 0..1; one for all channels: separate ones would shift the hue


# -------------------------------------------------------------- the masked autoencoder

@dataclass
class FaceMAE:
    """A masked autoencoder with the normalisation of its images."""
    model: models.MAE
    mean: torch.Tensor        # float32 (3, H, W) or (3, 1, 1), grey levels in 0..1
    std: float                # of all channels

    def normalise(self, x):
        """Float images (B, 3, H, W) in 0..1 -> what the model takes."""
        return (x - self.mean) / self.std

    def to_pixels(self, patches):
        """What the model predicts, (B, L, p*p*3) -> float32 images (B, 3, H, W), about 0..1."""
        return self.model.unpatchify(patches.float()) * self.std + self.mean

    def reconstruct(self, x, noise, ratio, cfg):
        """Float images (B, 3, H, W) in 0..1 and noise (B, L) -> float32 images, about 0..1, which
        depend on no bit of a hidden pixel: the decoder's whole output, or with paste_visible the
        visible patches of the input."""
        normalised = self.normalise(x)
        with process.autocast(x.device, cfg.run.precision):
            pred, mask = self.model(normalised, noise, ratio)
        if cfg.reconstruct.paste_visible:
            pred = torch.where(mask[:, :, None] > 0, pred.float(), self.model.patchify(normalised))
        return self.to_pixels(pred)

    def digest(self):
        """Hex digits that change with a weight, the mean or std."""
        extra = {'': self.mean, ' ': torch.tensor(self.std)}
        return digest_of_weights(self.model.state_dict() | extra)


def build_mae(settings, size):
    """The models.MAE of a config's section mae (namespace) for images of `size` pixels."""
    try:
        return models.MAE(size, *(getattr(settings, key) for key in SHAPE))
    except ValueError as error:
        raise InputError(f'mae: {error}') from None


def load_mae(path, cfg, device, made_by, fold=None):
    """The finished FaceMAE in a checkpoint, which `made_by` is the command to make; of a Fold only
    one that learnt from its public images."""
    saved = load_finished(path, made_by, ('model', 'mean', 'std', 'config'))
    if fold:
        fold.check_learnt(saved, path, made_by)
    settings, trained_at = (files.entry(saved['config'], key) for key in ('mae', 'data'))
    for key, then, now in (('data.size', trained_at.get('size'), cfg.data.size),
                           ('mae.patch', settings.get('patch'), cfg.mae.patch)):
        if then != now:
            raise InputError(f'{path} was trained with {key} = {quoted(then)}, not {now}: set it '
                             'alike')
    try:
        # Quoted, a number of the file is the text that a number is in YAML; all else is refused
        shape = {key: check_value(key, quoted(settings.get(key)), SPECS[f'mae.{key}'])
                 for key in SHAPE}
        with torch.device('meta'):           # takes no memory, before its shapes are compared
            model = build_mae(SimpleNamespace(**shape), cfg.data.size)
    except InputError:                       # a file can hold anything
        raise InputError(f'{path} has a damaged config: delete it and make it again') from None
    load_weights(model, saved, path)
    mean, std, size = saved['mean'], saved['std'], cfg.data.size
    if mean.shape not in ((3, 1, 1), (3, size, size)) or not is_sound(mean) or not 0 < std < 1e6:
        raise InputError(f'{path} has a damaged mean or std: delete it and make it again')
    return FaceMAE(model.to(device).eval(), mean.to(device), std)


def load_maes(variant, folds, device):
    """The FaceMAE of each fold, or None for methods that need none."""
    cfg, made_by = variant.cfg, command('train_mae.py')
    return [load_mae(variant.mae(f.k), cfg, device, made_by, f)
            if cfg.reconstruct.method == 'facemae' else None for f in folds]


# ------------------------------------------------------------------------------- masks
# Training, releases, their check, attackers and tables all take masks from here, and here from
# models.random_masking, which alone decides which patches are hidden.

def patch_noise(seeds, cfg):
    """The noise of images with seeds (B,), by which patches are hidden: int64 (B, L)."""
    return batches.expanded(seeds, (cfg.data.size // cfg.mae.patch) ** 2)


def hidden_patches(seeds, ratio, cfg):
    """Which patches of images with seeds (B,) are hidden: float32 (B, L), 1 = hidden."""
    return models.random_masking(patch_noise(seeds, cfg), ratio)[2]


def visible_count(size, patch, ratio):
    """How many patches of an image a mask leaves visible, and how many there are; InputError where
    there is no such mask."""
    patches = (size // patch) ** 2
    try:
        keep, _, _ = models.random_masking(torch.zeros(1, patches), ratio)
    except ValueError as error:
        raise InputError(str(error)) from None
    return keep.shape[1], patches


def drawn(hidden, side):
    """One value a patch (B, L) as squares of side x side pixels: (B, 1, H, W)."""
    grid = math.isqrt(hidden.shape[1])
    return repeat(hidden, 'b (h w) -> b 1 (h p) (w q)', h=grid, p=side, q=side)


def greyed(x, hidden):
    """Images (B, 3, H, W) in 0..1 with their hidden patches (B, L) grey."""
    side = x.shape[-1] // math.isqrt(hidden.shape[1])
    return torch.where(drawn(hidden, side) > 0, 0.5, x)


# ------------------------------------------------------------------------- protections
# Functions of one signature. x: float images (B, 3, H, W) in 0..1; seeds int64 (B,): what masks
# and noise of each image follow from; mae: the FaceMAE of the fold, or None. They return such
# images.

def reconstructed(x, seeds, cfg, mae):
    """What a masked autoencoder makes of the visible patches."""
    return mae.reconstruct(x, patch_noise(seeds, cfg), cfg.reconstruct.mask_ratio, cfg)


def masked(x, seeds, cfg, mae):
    """The visible patches, the others grey."""
    return greyed(x, hidden_patches(seeds, cfg.reconstruct.mask_ratio, cfg))


def gaussian_blur():
    """torchvision's function, imported here as only a blur is worth the three seconds; InputError
    where torchvision and torch do not fit each other."""
    try:
        return importlib.import_module('torchvision.transforms.v2.functional').gaussian_blur
    except Exception as error:         # of many kinds
        raise InputError(f'torchvision cannot be imported ({" ".join(str(error).split())[:150]}): '
                         'install torch and torchvision together') from None


def blurred(x, seeds, cfg, mae):
    """A Gaussian blur."""
    sigma = cfg.reconstruct.blur_sigma
    return gaussian_blur()(x, 2 * math.ceil(3 * sigma) + 1, sigma)


def pixelated(x, seeds, cfg, mae):
    """Each block x block square at its mean; the last ones of a row or column may be cut."""
    size, block = x.shape[-1], cfg.reconstruct.pixelate_block
    padded = F.pad(x, [0, -size % block] * 2, mode='replicate')
    small = reduce(padded, 'b c (h p) (w q) -> b c h w', 'mean', p=block, q=block)
    return repeat(small, 'b c h w -> b c (h p) (w q)', p=block, q=block)[..., :size, :size]


def noisy(x, seeds, cfg, mae):
    """Normal noise on every pixel."""
    u = batches.uniform(batches.expanded(seeds, x.shape[1:].numel()))
    return x + cfg.reconstruct.noise_std / 255 * math.sqrt(2) * torch.erfinv(2 * u - 1).view_as(x)


def unprotected(x, seeds, cfg, mae):
    """The photos themselves, to compare with."""
    return x


@dataclass
class Method:
    """A line of PROTECTIONS, by its name in reconstruct.method."""
    function: Callable          # of the signature above
    strength: str = ''          # key of section reconstruct that says how strong it is
    draws_mask: bool = False    # whether it hides patches, of which no pixel may then be told


PROTECTIONS = {
    'facemae': Method(reconstructed, strength='mask_ratio', draws_mask=True),
    'mask': Method(masked, strength='mask_ratio', draws_mask=True),
    'blur': Method(blurred, strength='blur_sigma'),
    'pixelate': Method(pixelated, strength='pixelate_block'),
    'noise': Method(noisy, strength='noise_std'),
    'none': Method(unprotected),
}


def method_of(cfg):
    """The Method of a config."""
    return PROTECTIONS[cfg.reconstruct.method]


@dataclass
class Protection:
    """The method of a config, with its settings and, for facemae, its model."""
    cfg: object               # the config
    mae: FaceMAE | None       # of the fold whose people are protected

    @torch.inference_mode()
    def __call__(self, faces, seeds):
        """Images as they are released: uint8 (B, H, W, 3) and seeds int64 (B,) -> uint8 alike."""
        return to_uint8(method_of(self.cfg).function(to_float(faces), seeds, self.cfg, self.mae))

    def encoded(self, faces):
        """Protected images, uint8 (B, H, W, 3), numpy, as they are once encoded and decoded, which
        changes noise most."""
        c = self.cfg.reconstruct

        def both_ways(x):
            file = encode(torch.from_numpy(x).permute(2, 0, 1), c.format, c.quality)
            return decode(file, "an attacker's image").permute(1, 2, 0).numpy()

        if c.format == 'png' or not len(faces):             # PNG loses nothing
            return faces
        with ThreadPoolExecutor(process.cores()) as pool:
            return np.stack(list(pool.map(both_ways, faces)))

    def of_rows(self, chosen, seeds, device):
        """Protect ImageRows with seeds (N,), as whoever decodes a release sees them: uint8
        (N, H, W, 3), numpy. Batches are dealt to the processes."""
        count, batch = len(chosen), self.cfg.reconstruct.batch
        parts = np.array_split(np.arange(count), count // batch + 1)

        def protected(number):
            part = parts[number]
            return self.encoded(self(torch.from_numpy(chosen.take(part).pixels()).to(device),
                                     seeds[part].to(device)).cpu().numpy())

        # To send the few images of one batch around takes longer than to make them
        return np.concatenate(process.dealt(len(parts), protected) if len(parts) > 1
                              else [protected(0)])


