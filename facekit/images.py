"""Image files: JPEG and PNG, from strangers, to pixels and back."""
import io
import warnings

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageOps

from facekit.errors import InputError

warnings.filterwarnings('ignore', module='PIL')    # of damaged EXIF data, which is passed over
MAX_PIXELS = 16 << 20      # a few bytes can promise an image of any size
MAX_SCANS = 500            # of a progressive JPEG: real ones have ten or so, and each takes long


def decode(data, where, formats=('JPEG', 'PNG')):
    """uint8 RGB (3, height, width) of an image file (bytes-like) of one of Pillow's formats.

    A JPEG's EXIF orientation is applied; grey, palette, alpha and 16 bit become 8-bit RGB. Threads
    decode at once. Raises InputError, naming `where`, for other formats, damage and more than
    16 megapixels.
    """
    try:
        image = Image.open(io.BytesIO(data), formats=formats)
    except Exception:      # Pillow raises of many kinds
        raise InputError(f'{where}: no {" or ".join(formats)} that can be read: convert, copy or '
                         'remove the image') from None
    if not 0 < image.width * image.height <= MAX_PIXELS or len(data) > 8 * MAX_PIXELS:
        raise InputError(f'{where}: {image.width} x {image.height} pixels, not 1 to {MAX_PIXELS}: '
                         'shrink or remove the image')
    try:
        if image.format == 'JPEG':
            check_jpeg(bytes(data))
            ImageOps.exif_transpose(image, in_place=True)
        if image.mode.startswith('I'):
            image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
        image = image if image.mode == 'RGB' else image.convert('RGB')    # which copies
        return torch.from_numpy(np.array(image)).permute(2, 0, 1)
    except Exception as error:
        raise InputError(f'{where}: damaged or cut off ({type(error).__name__} in decoding): copy '
                         'or remove the image') from None


def check_jpeg(data):
    """ValueError for a JPEG that Pillow would fill with grey, or decode for minutes."""
    if data.rfind(b'\xff\xd9') < data.rfind(b'\xff\xda'):
        raise ValueError('its last scan has no end, as in a sparse copy')
    if data.count(b'\xff\xda') > MAX_SCANS:
        raise ValueError('too many scans')


def encode(image, form='jpeg', quality=95):
    """The file (bytes, no metadata) of a uint8 image (3, H, W); quality 1..100 is of 'jpeg'."""
    if form not in ('jpeg', 'png') or not 1 <= quality <= 100:
        raise InputError(f'no image format {form!r}, {quality}: give png, or jpeg with 1..100')
    file = io.BytesIO()
    pixels = np.ascontiguousarray(image.permute(1, 2, 0).numpy())
    Image.fromarray(pixels).save(file, form, quality=quality)
    return file.getvalue()


def fitted(image, where, size, on_size):
    """uint8 (3, H, W) -> uint8 (size, size, 3), numpy; `on_size` says whether an image of another
    size is resized or refused. Of one that is not square the middle is cut out."""
    height, width = image.shape[1:]
    if (height, width) != (size, size):
        if on_size == 'refuse':
            alike = 'set data.size alike, or ' if height == width else ''
            raise InputError(f'{where} is {width}x{height} pixels, data.size is {size}: {alike}'
                             'use data.on_size=resize')
        side = min(height, width)
        top, left = (height - side) // 2, (width - side) // 2
        square = image[None, :, top:top + side, left:left + side].contiguous().float()
        image = F.interpolate(square, (size, size), mode='bilinear', antialias=True,
                              align_corners=False)[0].round_().byte()
    return image.permute(1, 2, 0).numpy()


def to_float(images):
    """uint8 (B, H, W, 3) -> float32 (B, 3, H, W) in 0..1."""
    return images.permute(0, 3, 1, 2).float() / 255


def to_uint8(images):
    """float (B, 3, H, W) in 0..1 -> uint8 (B, H, W, 3), rounded and clamped."""
    return (images.clamp(0, 1) * 255).permute(0, 2, 3, 1).round().byte()


def psnr_and_ssim(released, originals, device):
    """Mean PSNR, dB, and SSIM (Wang et al. 2004: 11 x 11 Gaussian, sigma 1.5; grey) of uint8
    images (N, H, W, 3), numpy: {'psnr', 'ssim'}."""
    psnr, ssim, parts = [], [], len(released) // 256 + 1
    for a, b in zip(np.array_split(released, parts), np.array_split(originals, parts)):
        a, b = (torch.as_tensor(x).to(device).permute(0, 3, 1, 2).double() for x in (a, b))
        error = (a - b).square().mean((1, 2, 3)).clamp(min=1e-10)
        psnr.append(10 * torch.log10(255 ** 2 / error))
        ssim.append(structural_similarity(a.mean(1, keepdim=True), b.mean(1, keepdim=True)))
    return {'psnr': torch.cat(psnr).mean().item(), 'ssim': torch.cat(ssim).mean().item()}


def structural_similarity(a, b):
    """SSIM, float64 (N,), of grey images (N, 1, H, W), float64 in 0..255."""
    line = torch.exp(-torch.arange(-5.0, 6.0) ** 2 / (2 * 1.5 ** 2))
    window = (line[:, None] * line / line.sum() ** 2)[None, None].to(a)
    mean_a, mean_b, aa, bb, ab = (F.conv2d(x, window) for x in (a, b, a * a, b * b, a * b))
    c1, c2 = (0.01 * 255) ** 2, (0.03 * 255) ** 2
    value = ((2 * mean_a * mean_b + c1) * (2 * (ab - mean_a * mean_b) + c2) /
             ((mean_a ** 2 + mean_b ** 2 + c1) * (aa - mean_a ** 2 + bb - mean_b ** 2 + c2)))
    return value.mean((1, 2, 3))
