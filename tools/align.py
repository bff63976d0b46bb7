# SPDX-License-Identifier: MIT
"""Faces of photos, turned and cut as recognisers expect them (ArcFace's template, 112 pixels).

    pip install dlib-bin face-recognition-models
    python tools/align.py PHOTOS FACES

Of each photo in the folder PHOTOS and in its sub-folders the largest face is written to the same
place in the new folder FACES, as PNG. PHOTOS may also be a list of who is who (.txt): then FACES
gets a list of the same name that fits. Photos without a face are left out and named; those with
several are named. PHOTOS is not changed. All CPU cores work; one takes about 0.1 to 0.3 s a photo.
"""
import argparse
import sys
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np
from PIL import Image
from rich.progress import track

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from facekit.base import files, process
from facekit.base.errors import InputError, counted, optional, printable
from facekit.data import images
from facekit.data.sources import FolderSource, ListSource
from facekit.nets.published import dlib_weights

SIZE = 112
# Where eyes, nose and corners of the mouth lie in it, x and y (insightface's face_align.py)
TEMPLATE = np.array([[38.2946, 51.6963], [73.5318, 51.5014], [56.0252, 71.7366],
                     [41.5493, 92.3655], [70.7299, 92.2041]])
# Which of dlib's 68 points are averaged for each of them
POINTS = [range(36, 42), range(42, 48), [30], [48], [54]]
LARGEST = 1000     # pixels of a photo's longer side in which faces are looked for, for speed


@dataclass
class Aligned:
    """What became of a photo."""
    photo: Path
    faces: int = 0        # how many were found in it
    error: str = ''       # why it cannot be read


@cache
def detectors():
    """dlib's face detector and its predictor of 68 points, loaded once a process."""
    dlib = optional('dlib', 'dlib-bin')
    points = dlib_weights().with_name('shape_predictor_68_face_landmarks.dat')
    return dlib.get_frontal_face_detector(), dlib.shape_predictor(str(points))


def five_points(photo):
    """Eyes, nose and corners of the mouth of the largest face in a Pillow image, float64 (5, 2),
    and the number of faces; without a face None and 0."""
    detector, predictor = detectors()
    shrunk = min(1.0, LARGEST / max(photo.size))
    pixels = np.asarray(photo.resize([max(1, round(side * shrunk)) for side in photo.size]))
    # Faces of fewer than 80 pixels are found in an image of twice the size alone
    boxes = detector(pixels) or detector(pixels, 1)
    if not boxes:
        return None, 0
    found = predictor(pixels, max(boxes, key=lambda box: box.area()))
    every = np.array([[point.x, point.y] for point in found.parts()]) / shrunk
    return np.stack([every[list(numbers)].mean(0) for numbers in POINTS]), len(boxes)


def similarity(points, target):
    """The matrix (2, 3) of the rotation, scale and shift, without a reflection, that take points
    (N, 2) nearest to target (N, 2) (Umeyama 1991, IEEE TPAMI 13(4))."""
    # In complex numbers such a map is z -> a z + b, which least squares finds
    z, w = points @ [1, 1j], target @ [1, 1j]
    a = np.vdot(z - z.mean(), w - w.mean()) / np.vdot(z - z.mean(), z - z.mean()).real
    b = w.mean() - a * z.mean()
    return np.array([[a.real, -a.imag, b.real], [a.imag, a.real, b.imag]])


def cut_out(photo, points):
    """The face with these points, float64 (5, 2), as a Pillow image of SIZE pixels."""
    scale = np.linalg.norm(similarity(points, TEMPLATE)[:, 0])
    # Shrunk first, as a transform that skips pixels makes jagged edges
    factor = min(1.0, 2 * scale)
    size = [max(1, round(side * factor)) for side in photo.size]
    small = photo.resize(size, Image.Resampling.LANCZOS)
    matrix = similarity(points * np.divide(size, photo.size), TEMPLATE)
    inverse = np.linalg.inv(np.vstack([matrix, [0, 0, 1]]))[:2]
    return small.transform((SIZE, SIZE), Image.Transform.AFFINE, inverse.flatten(),
                           Image.Resampling.BICUBIC)


def align(photo, target):
    """Write the largest face of the photo at one path to the other; returns an Aligned."""
    try:
        pixels = images.decode(files.open_bytes(photo), printable(str(photo)),
                               FolderSource.formats)
    except InputError as error:
        return Aligned(photo, error=str(error))
    image = Image.fromarray(pixels.permute(1, 2, 0).numpy())
    points, count = five_points(image)
    if count:
        target.parent.mkdir(parents=True, exist_ok=True)
        cut_out(image, points).save(target)
    return Aligned(photo, count)


def photos_in(folder):
    """All image files in a folder and its sub-folders, but hidden ones."""
    if not folder.is_dir():
        raise InputError(f'{folder} is no folder: name one with photos, or a list of them (.txt)')
    every = sorted(path for path in folder.rglob('*') if path.is_file()
                   and path.suffix.lower() in FolderSource.endings
                   and not any(part.startswith('.') for part in path.relative_to(folder).parts))
    if not every:
        raise InputError(f'{folder} has no photo ({", ".join(FolderSource.endings)}): name '
                         'another folder')
    return every


def targets(every, photos, faces):
    """{photo: path of its face in the new folder `faces`} of photos in the folder `photos`."""
    if faces.resolve().is_relative_to(photos.resolve()) or faces.exists():
        raise InputError(f'{faces} exists, or lies in {photos}: name a new folder outside of it')
    where = {}
    for path in every:
        target = faces / path.relative_to(photos).with_suffix('.png')
        if target in where.values():           # a.jpg and a.png in one folder
            target = target.with_name(f'{path.name}.png')
        where[path] = target
    return where


def write_list(path, listed, results, where):
    """Write a list of who is on the faces that were found, of a ListSource's photos."""
    names = dict(zip(listed.files, listed.people[listed.labels]))
    with files.replacing(path) as file:
        for result in results:
            if result.faces:
                face = where[result.photo].relative_to(path.parent)
                file.write(f'{face},{names[result.photo]}\n'.encode())


def report(title, results):
    """Name the photos of some results, one a line."""
    if results:
        print(f'{counted(len(results), "photo")} {title}:')
        for result in results:
            print(f'  {result.error or printable(str(result.photo))}')


def main():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('photos', type=Path, metavar='PHOTOS')
    parser.add_argument('faces', type=Path, metavar='FACES')
    arguments = parser.parse_args()
    detectors()                                # says before anything else what is not installed
    listed = ListSource(arguments.photos) if arguments.photos.suffix == '.txt' else None
    folder = listed.folder if listed else arguments.photos
    every = listed.files if listed else photos_in(folder)
    where = targets(every, folder, arguments.faces)
    with ProcessPoolExecutor(process.cores()) as pool:
        results = list(track(pool.map(align, where, where.values()), 'aligning', len(where)))
    if listed:
        write_list(arguments.faces / arguments.photos.name, listed, results, where)
    report('cannot be read', [r for r in results if r.error])
    report('without a face, left out', [r for r in results if not r.error and not r.faces])
    report('with several faces, of which the largest is taken',
           [r for r in results if r.faces > 1])
    done = sum(r.faces > 0 for r in results)
    print(f'{done} of {counted(len(results), "photo")} aligned to {SIZE} pixels: '
          f'{printable(str(arguments.faces))}')


if __name__ == '__main__':
    try:
        main()
    except InputError as error:
        sys.exit(f'error: {error}')
    except KeyboardInterrupt:
        sys.exit('stopped: delete the folder of faces before you start again')
