"""Image files: JPEG and PNG, from strangers, to pixels and back."""
import io
import re
import warnings

import numpy as np
import torch
import torch.nn.functional as F
from PIL import BmpImagePlugin, Image

from facekit.base.errors import InputError

warnings.filterwarnings('ignore', module='PIL')    # of damaged EXIF data, which is passed over
BmpImagePlugin.USE_RAW_ALPHA = True    # else Pillow drops the transparency of those it writes
MAX_PIXELS = 16 << 20      # a few bytes can promise an image of any size
SMALL = 8                  # grey levels a side by which copies of a picture are told
MAX_SCANS = 500            # of a progressive JPEG: real ones have ten or so, and each takes long
# What ends a scan of a JPEG: any marker but a stuffed byte (00) or a restart (D0 to D7)
MARKER = re.compile(rb'\xff+([^\x00\xff\xd0-\xd7])')
ORIENTATION = 0x112        # the EXIF tag, and what brings an image with each value upright
UPRIGHT = {2: Image.Transpose.FLIP_LEFT_RIGHT, 3: Image.Transpose.ROTATE_180,
           4: Image.Transpose.FLIP_TOP_BOTTOM, 5: Image.Transpose.TRANSPOSE,
           6: Image.Transpose.ROTATE_270, 7: Image.Transpose.TRANSVERSE,
           8: Image.Transpose.ROTATE_90}


def decode(data, where, formats=('JPEG', 'PNG')):
    """uint8 RGB (3, height, width) of an image file (bytes-like) of one of Pillow's formats.

    EXIF orientation is applied; grey, palette and 16 bit become 8-bit RGB; what is transparent
    becomes grey, as a maker may have erased it so; of several pictures the first is taken.
    InputError, naming `where`, for other formats, damage and more than 16 megapixels.
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
        if image.format in ('JPEG', 'MPO'):
            check_jpeg(bytes(data))
        upright = UPRIGHT.get(orientation(image))
        image = opaque(image)
        image = image if upright is None else image.transpose(upright)
        return torch.from_numpy(np.array(image)).permute(2, 0, 1)
    except Exception as error:
        raise InputError(f'{where}: damaged or cut off ({type(error).__name__} in decoding): copy '
                         'or remove the image') from None


def orientation(image):
    """The EXIF orientation of a Pillow image, 1..8; 1 where there is none, or none to be read."""
    try:
        return image.getexif().get(ORIENTATION, 1)
    except Exception:      # a broken tag raises of many kinds, and costs no picture
        return 1


def opaque(image):
    """A Pillow image as 8-bit RGB, on grey where it is transparent."""
    if image.mode.startswith('I'):
        if 'transparency' in image.info:
            raise ValueError('16 bit with a transparent grey level')
        image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
    if image.format == 'BMP' and image.getextrema()[3:] == ((0, 0),):
        image = image.convert('RGB')       # most writers leave the fourth byte of a pixel empty
    if 'A' in image.getbands() or 'a' in image.getbands() or 'transparency' in image.info:
        grey = Image.new('RGBA', image.size, (128, 128, 128, 255))
        image = Image.alpha_composite(grey, image.convert('RGBA'))
    return image if image.mode == 'RGB' else image.convert('RGB')         # which copies


def check_jpeg(data):
    """ValueError for a JPEG that Pillow would fill with grey, or decode for minutes. Bytes behind
    its end, in which phones keep a film or a second picture, are not looked at."""
    at, scans = 2, 0
    while found := MARKER.search(data, at):
        marker, at = found[1][0], found.end()
        if marker == 0xd9:
            return
        scans += marker == 0xda
        if scans > MAX_SCANS:
            raise ValueError('too many scans')
        at += int.from_bytes(data[at:at + 2])             # the segment, whose length counts itself
    raise ValueError('its last scan has no end, as in a sparse copy')


def encode(image, form='jpeg', quality=95):
    """The file (bytes, no metadata) of a uint8 image (3, H, W); quality 1..100 is of 'jpeg'."""
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
            raise InputError(f'{where} is {width}x{height} pixels, data.size is {size}: change '
                             'it, or use data.on_size=resize')
        square = middle_square(image)[None].contiguous().float()
        image = F.interpolate(square, (size, size), mode='bilinear', antialias=True,
                              align_corners=False)[0].round_().byte()
    return image.permute(1, 2, 0).numpy()


def middle_square(image):
    """The middle (3, S, S) of an image (3, H, W), S the shorter side."""
    height, width = image.shape[1:]
    side = min(height, width)
    top, left = (height - side) // 2, (width - side) // 2
    return image[:, top:top + side, left:left + side]


def small_grey(image):
    """What copies of a picture have in common, int8 (64,): 8 x 8 grey levels of the middle square
    of uint8 (3, H, W), without their mean and scaled to -127..127; 0 where all are equal."""
    square = middle_square(image).permute(1, 2, 0).float()
    grey = square @ torch.tensor([0.299, 0.587, 0.114])             # ITU-R BT.601
    grey = F.adaptive_avg_pool2d(grey[None], SMALL).flatten()
    grey = grey - grey.mean()
    return (grey / grey.abs().amax().clamp(min=1e-3) * 127).round().to(torch.int8).numpy()


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
