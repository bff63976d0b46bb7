"""What lies in the folder of a release, byte for byte."""
import json
import shutil

import PIL
import torch
from PIL import features

from facekit.base import files, process
from facekit.base.errors import InputError
from facekit.data.records import Records, write_records

FILES = 'README.md', 'manifest.json', 'property', 'train.idx', 'train.rec'


def refuse(wrong, path, text):
    """InputError about a release, if something is wrong."""
    if wrong:
        raise InputError(f'{path} {text}: it must not be published; delete it, make it again, and '
                         'report this if it stays')


def manifest_text(facts):
    """manifest.json of a release."""
    return json.dumps(facts, indent=1) + '\n'


def digests(folder):
    """{name: SHA-256} of the files of a release."""
    return {name: files.digest(files.open_bytes(folder / name)) for name in FILES}


def check_names(folder):
    """Refuse a release that holds anything but its FILES. A link is none of them: what it leads to
    can be another file tomorrow."""
    refuse(folder.is_symlink(), folder, 'is a link')
    foreign = sorted(path.name for path in folder.iterdir() if path.name not in FILES)
    if foreign:
        raise InputError(f'{folder} holds {foreign[:3]}, which is no part of a release: move it '
                         'out of that folder')
    for path in map(folder.joinpath, FILES):
        refuse(path.is_symlink() or not path.is_file(), path, 'is no plain file')


def check_digests(variant):
    """Refuse a finished release of which a file was changed since it was published."""
    saved = files.read_json(variant.folder / 'release.json')
    check_names(variant.release)
    refuse(digests(variant.release) != saved.get('files'), variant.release,
           'has other files than when it was published')


def made_with(cfg, device):
    """Text of all that rounds pixels or encodes them beside the kit: where it is the same, the
    same images become the same bytes, on a GPU if it was told to be deterministic."""
    libraries = ', '.join(f'{name} {features.version(name)}' for name in ('jpg', 'zlib'))
    return (f'Pillow {PIL.__version__}, {libraries}, torch {torch.__version__}, '
            f'{process.device_name(device)}, {cfg.run.precision}, '
            f'batches of {cfg.reconstruct.batch}, '
            f'deterministic: {cfg.run.deterministic}')


def check_records(variant, labels, encoded, device):
    """Refuse records of a release that are not, byte for byte, what is written of image files
    `encoded`, an iterable of bytes, and labels (N,), both in the order of its plan.

    Only where it was made_with() something else may the bytes of an image differ, whose pixels
    PlannedRelease.check_images() compares. Returns what to say of the release. Needs as much room
    on the disk as the release takes.
    """
    folder, others = variant.release, []
    released, draft = Records(folder), folder.with_name(f'{folder.name}.tmp')

    def images_of_release():
        for i, image in enumerate(encoded):
            if released[i] != image:
                others.append(i)
            yield bytes(released[i])

    if process.rank():
        for _ in encoded:               # none: what this process makes is sent to process 0
            pass
        return ''
    shutil.rmtree(draft, ignore_errors=True)           # of an interrupted run
    files.make_private(draft)
    try:
        write_records(draft, images_of_release(), labels, variant.cfg.data.size)
        expected = {path.name: files.digest(files.open_bytes(path)) for path in draft.iterdir()}
    finally:
        shutil.rmtree(draft)
    refuse(digests(folder) != digests(folder) | expected, folder,
           'holds more than its images and labels')
    if not others:
        return 'finished and sound'
    then = files.read_json(variant.folder / 'release.json').get('made_with')
    now = made_with(variant.cfg, device)
    exact = device.type == 'cpu' or variant.cfg.run.deterministic
    refuse(exact and then == now, folder,
           f'stores {len(others)} images in other bytes than they are made of')
    return (f'finished; its images look as they should, but {len(others)} of {len(labels)} are '
            f'stored in other bytes than here ({now}; {then} when they were made), which could '
            'hide something: delete the release and make it again to be sure')
