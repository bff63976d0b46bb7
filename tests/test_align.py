"""tools/align.py on a drawn face, with a detector that knows where it drew it, and, where dlib is
installed, on what it finds itself."""
import importlib.util
import math
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from PIL import Image, ImageDraw

from facekit.data.sources import open_source
from tools import align

DRAWN = np.array([(38, 52), (74, 52), (56, 72), (42, 92), (71, 92)], float)


def drawn_face():
    """A face of 112 pixels, as ArcFace's template has it, with one colour at each point."""
    image = Image.new('RGB', (112, 112), (200, 160, 130))
    for (x, y), colour in zip(DRAWN, ('red', 'green', 'blue', 'yellow', 'magenta')):
        ImageDraw.Draw(image).ellipse((x - 4, y - 4, x + 4, y + 4), fill=colour)
    return image


def pasted(face, angle, scale, left, top, size=(900, 700)):
    """A photo with a face turned by `angle` degrees and scaled, and where its points are then."""
    cosine, sine = math.cos(math.radians(angle)), math.sin(math.radians(angle))
    matrix = scale * np.array([[cosine, -sine], [sine, cosine]])
    shift = np.array([left, top])
    inverse = np.linalg.inv(np.vstack([np.column_stack([matrix, shift]), [0, 0, 1]]))[:2]
    photo = face.transform(size, Image.Transform.AFFINE, inverse.flatten(),
                           Image.Resampling.BICUBIC, fillcolor=(90, 110, 90))
    return photo, DRAWN @ matrix.T + shift


@pytest.mark.parametrize('angle, scale', [(0, 1), (25, 0.6), (-40, 2.5), (170, 5), (10, 0.3)])
def test_a_face_comes_back_to_the_template_wherever_it_was_pasted(angle, scale):
    photo, points = pasted(drawn_face(), angle, scale, 450, 350)
    out = np.asarray(align.cut_out(photo, points), int)
    target = align.TEMPLATE[1]                       # the green eye
    green = (out[..., 1] > out[..., 0] + 30) & (out[..., 1] > out[..., 2] + 30)
    green &= np.hypot(*(np.indices((112, 112)) - target[::-1, None, None])) < 12
    y, x = np.nonzero(green)
    assert math.dist((x.mean(), y.mean()), target) < 2
    assert out.shape == (112, 112, 3)


def test_photos_go_to_the_same_place_and_names_do_not_collide(tmp_path):
    photos = tmp_path / 'photos'
    (photos / 'ann').mkdir(parents=True)
    for name in ('a.jpg', 'a.png', 'ann/1.JPEG', '.hidden.jpg', 'text.txt'):
        (photos / name).touch()
    where = align.targets(align.photos_in(photos), photos, tmp_path / 'faces')
    assert sorted(str(t.relative_to(tmp_path / 'faces')) for t in where.values()) == [
        'a.png', 'a.png.png', 'ann/1.png']


@pytest.mark.parametrize('photos, faces, wrong', [
    ('missing', 'faces', 'is no folder'), ('photos', 'photos/faces', 'lies in'),
    ('photos', 'photos', 'exists'), ('photos', 'new', 'has no photo')])
def test_wrong_folders_are_refused(tmp_path, photos, faces, wrong):
    (tmp_path / 'photos').mkdir()
    if faces != 'new':
        (tmp_path / 'photos' / 'a.jpg').touch()
    with pytest.raises(align.InputError, match=wrong):
        align.targets(align.photos_in(tmp_path / photos), tmp_path / photos, tmp_path / faces)


def test_a_list_of_photos_becomes_a_list_of_the_faces_that_were_found(tmp_path, monkeypatch):
    """The detector finds a face in red pictures; a photo that no line names stays out."""
    photos, out = tmp_path / 'photos', tmp_path / 'faces'
    photos.mkdir()
    for name, colour in (('0.jpg', 'red'), ('b 1.jpg', 'grey'), ('b 2.jpg', 'red'),
                         ('3.jpg', 'red')):
        Image.new('RGB', (200, 200), colour).save(photos / name)
    (photos / 'who.txt').write_text('0.jpg,7\nb 1.jpg,7\nb 2.jpg,Li Ann\n')
    monkeypatch.setattr(align, 'detectors', lambda: None)
    monkeypatch.setattr(align, 'ProcessPoolExecutor', ThreadPoolExecutor)
    monkeypatch.setattr(align, 'five_points', lambda photo: (
        align.TEMPLATE, int(photo.getpixel((0, 0))[0] > 200)))
    monkeypatch.setattr(sys, 'argv', ['align.py', str(photos / 'who.txt'), str(out)])
    align.main()
    source = open_source(out / 'who.txt')
    assert [file.name for file in source.files] == ['0.png', 'b 2.png']
    assert source.people[source.labels].tolist() == ['7', 'Li Ann'] and not source.passed_over


def test_the_script_names_who_has_no_face(tmp_path):
    for package in ('dlib', 'face_recognition_models'):
        if not importlib.util.find_spec(package):
            pytest.skip(f'{package} is not installed')
    (tmp_path / 'photos').mkdir()
    Image.new('RGB', (300, 200), 'grey').save(tmp_path / 'photos' / 'wall.png')
    (tmp_path / 'photos' / 'broken.jpg').write_bytes(b'no image')
    run = subprocess.run([sys.executable, 'tools/align.py', tmp_path / 'photos',
                          tmp_path / 'faces'], capture_output=True, text=True)
    assert run.returncode == 0 and 'wall.png' in run.stdout and 'broken.jpg' in run.stdout
    assert '0 of 2 photos aligned' in run.stdout
