"""Image files as people have them: turned, transparent, with a film behind the picture."""
import io

import numpy as np
import pytest
from PIL import Image, TiffImagePlugin

from facekit.base.errors import InputError
from facekit.data import images

ALL = 'JPEG', 'PNG', 'WEBP', 'BMP'


def photo(height=24, width=16):
    """uint8 (height, width, 3): smooth, so that a JPEG keeps it, and without symmetry."""
    y, x = np.mgrid[:height, :width]
    return np.stack([8 * y, 12 * x, 4 * (x + y)], 2).clip(0, 255).astype(np.uint8)


def saved(pixels, form, **options):
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, form, **options)
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


@pytest.mark.parametrize('damage', [
    lambda x: x[:-2], lambda x: x[:len(x) // 2], lambda x: x[:-200] + bytes(200)])
def test_a_jpeg_whose_scan_does_not_end_is_damaged(damage):
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8)
    with pytest.raises(InputError, match='damaged or cut off'):
        decoded(damage(saved(noise, 'JPEG')))


def test_what_is_transparent_is_grey_whatever_colour_it_had():
    pixels = np.dstack([photo(), np.full((24, 16), 255, np.uint8)])
    pixels[:12, :, 3] = 0
    for form in ('PNG', 'WEBP'):
        found = decoded(saved(pixels, form, **({'lossless': True, 'exact': True}
                                               if form == 'WEBP' else {})))
        assert (found[:12] == 128).all()
        np.testing.assert_array_equal(found[12:], photo()[12:])
    palette = Image.fromarray(photo()).quantize(8)
    file = io.BytesIO()
    palette.save(file, 'PNG', transparency=palette.getpixel((0, 0)))
    assert (decoded(file.getvalue())[0, 0] == 128).all()
    grey = Image.fromarray(photo()[:, :, 0])
    file = io.BytesIO()
    grey.save(file, 'PNG', transparency=0)
    assert (decoded(file.getvalue())[0] == 128).all()
