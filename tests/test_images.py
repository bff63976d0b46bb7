"""Image files as people have them: turned, transparent, with a film behind the picture."""
import io

import numpy as np
import pytest
import torch
from PIL import Image, TiffImagePlugin

from facekit.base.errors import InputError
from facekit.data import images

ALL = 'JPEG', 'PNG', 'WEBP', 'BMP'


def photo(height=24, width=16):
    """uint8 (height, width, 3): smooth, so that a JPEG keeps it, and without symmetry."""
    y, x = np.mgrid[:height, :width]
    return np.stack([8 * y, 12 * x, 4 * (x + y)], 2).clip(0, 255).astype(np.uint8)


def saved(pixels, form, mode=None, **options):
    image, file = Image.fromarray(pixels), io.BytesIO()
    (image.convert(mode) if mode else image).save(file, form, **options)
    return file.getvalue()


def decoded(data):
    return images.decode(data, 'a photo', ALL).permute(1, 2, 0).numpy()


def exif(value, **broken):
    tags = Image.Exif()
    tags[images.ORIENTATION] = value
    for tag, content in broken.items():
        tags[int(tag[1:])] = content
    return tags


@pytest.mark.parametrize('value, turned', [
    (1, lambda x: x), (2, lambda x: x[:, ::-1]), (3, lambda x: x[::-1, ::-1]),
    (4, lambda x: x[::-1]), (5, lambda x: x.transpose(1, 0, 2)),
    (6, lambda x: np.rot90(x, -1)), (7, lambda x: np.rot90(x[::-1], 1)),
    (8, lambda x: np.rot90(x, 1)), (99, lambda x: x)])
@pytest.mark.parametrize('form', ['JPEG', 'PNG', 'WEBP', 'MPO'])
def test_a_photo_stands_upright_whatever_its_format(form, value, turned):
    options = {'quality': 95, 'lossless': True} if form == 'WEBP' else {'quality': 95}
    if form == 'MPO':
        options |= {'save_all': True, 'append_images': [Image.fromarray(photo()[::-1].copy())]}
    data = saved(photo(), form, exif=exif(value), **options)
    error = np.abs(decoded(data).astype(int) - turned(photo()))
    assert error.max() <= (12 if form in ('JPEG', 'MPO') else 0)


def test_an_orientation_beside_broken_tags_is_read():
    broken = exif(6, _282=TiffImagePlugin.IFDRational(1, 1), _305='maker').tobytes()
    broken = broken.replace(b'maker', b'\xff\xfe\xfd\x00\xff')
    assert decoded(saved(photo(), 'JPEG', exif=broken)).shape == (16, 24, 3)
    assert decoded(saved(photo(), 'JPEG', exif=broken[:20])).shape == (24, 16, 3)   # cut off


def test_bytes_behind_a_jpeg_are_passed_over():
    whole = saved(photo(), 'JPEG')
    for progressive in (False, True):
        data = saved(photo(), 'JPEG', progressive=progressive)
        for more in (b'\xff\xda film', b'\xff\xda' * 900, whole[:-40], bytes(5000)):
            np.testing.assert_array_equal(decoded(data + more), decoded(data))


def test_truncated_and_foreign_images_are_refused():
    noise = np.random.default_rng(0).integers(0, 256, (112, 112, 3), np.uint8)
    jpeg, png = saved(noise, 'JPEG'), saved(noise, 'PNG')
    cases = [data[:length] for data in (jpeg, png) for length in (
        0, 10, 300, len(data) // 2, len(data) - 40)] + [saved(noise, 'GIF'), saved(noise, 'BMP')]
    scans = jpeg[:-2], jpeg[:-1], jpeg[:-200] + bytes(200), jpeg[:2000] + bytes(len(jpeg) - 2000)
    for data, words in (*((x, 'image 7') for x in cases), *((x, 'damaged or') for x in scans)):
        with pytest.raises(InputError, match=words) as error:
            images.decode(data, 'image 7')
        assert '\n' not in str(error.value) and len(str(error.value)) < 400


def test_grey_palette_alpha_and_16_bit_become_rgb():
    colour = np.random.default_rng(3).integers(0, 256, (20, 30, 3), dtype=np.uint8)
    grey = colour[..., 0]
    files = [saved(grey, 'PNG'), saved(grey.astype(np.uint16) * 256 + 17, 'PNG'),
             saved(colour, 'PNG'), *(saved(colour, 'PNG', mode) for mode in ('RGBA', 'LA', 'P')),
             saved(grey, 'JPEG'), saved(colour, 'JPEG', 'CMYK')]
    files.append(files[6][:2] + b'\xff' * 7 + files[6][2:])  # fill bytes before a marker are legal
    found = [images.decode(memoryview(data), 'x') for data in files]
    assert all(x.dtype == torch.uint8 and x.shape == (3, 20, 30) for x in found)
    for image, expected in zip(found, (grey, grey, colour.transpose(2, 0, 1))):
        assert (image.numpy() == expected).all()


def test_encoded_images_come_back():
    smooth = torch.from_numpy(photo().transpose(2, 0, 1).copy())
    assert torch.equal(images.decode(images.encode(smooth, 'png'), 'x'), smooth)
    coarse, fine = ((images.decode(images.encode(smooth, quality=q), 'x').float() - smooth).abs()
                    .mean() for q in (50, 95))
    assert fine < coarse and fine < 4
    assert b'Exif' not in images.encode(smooth) and images.encode(smooth) == images.encode(smooth)


def test_what_is_transparent_is_grey_whatever_colour_it_had():
    pixels = np.dstack([photo(), np.full((24, 16), 255, np.uint8)])
    pixels[:12, :, 3] = 0
    for form in ('PNG', 'WEBP', 'BMP'):
        found = decoded(saved(pixels, form, **({'lossless': True, 'exact': True}
                                               if form == 'WEBP' else {})))
        assert (found[:12] == 128).all()
        np.testing.assert_array_equal(found[12:], photo()[12:])
    pixels[:, :, 3] = 0                              # a fourth byte that is not used
    np.testing.assert_array_equal(decoded(saved(pixels, 'BMP')), photo())
    palette, grey = Image.fromarray(photo()).quantize(8), Image.fromarray(photo()[:, :, 0])
    for image, clear in (palette, palette.getpixel((0, 0))), (grey, 0):
        file = io.BytesIO()
        image.save(file, 'PNG', transparency=clear)
        assert (decoded(file.getvalue())[0, 0] == 128).all()
