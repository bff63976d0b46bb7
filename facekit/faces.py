"""A face data set as decoded images, and the cache that holds them.

Every image is decoded once into one memory-mapped file of uint8 pixels; from then on a batch is a
gather of rows (batches.py).
"""
import hashlib
import io
import json
import mmap
import os
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from rich.progress import track

from facekit import files, images, run, toy
from facekit.errors import InputError, counted
from facekit.progress import StageLog
from facekit.sources import open_source, say_passed_over


@dataclass
class ImageRows:
    """A choice of images, in an order, without a copy of them."""
    images: np.ndarray        # uint8 (M, H, W, 3) RGB; an array or a memory map
    rows: np.ndarray          # int64 (N,): which of them

    def __len__(self):
        return len(self.rows)

    def take(self, chosen):
        """ImageRows of some of these, by their places."""
        return ImageRows(self.images, self.rows[chosen])

    def pixels(self):
        """uint8 (N, H, W, 3), in memory."""
        return np.asarray(self.images[self.rows])


@dataclass
class FaceSet:
    """A data set as decoded images."""
    path: Path                # where it was read from
    images: np.ndarray        # uint8 (N, size, size, 3) RGB, a memory map
    labels: np.ndarray        # int64 (N,), 0 .. P - 1: whose image
    people: np.ndarray        # str (P,): what the source calls them
    hashes: np.ndarray        # uint64 (N,), of the decoded pixels
    skipped: list             # numbers of the source's images that were left out as damaged
    source: object = None     # RecordSource or FolderSource

    def __len__(self):
        return len(self.labels)

    def where(self, row):
        """Where image `row` stands on disk, for a sentence."""
        numbers = np.delete(np.arange(len(self) + len(self.skipped)), self.skipped)
        return self.source.where(numbers[row])

    def left_out(self):
        """{why: number} of what the source holds and this set does not, or holds twice."""
        counts = {why: len(paths) for why, paths in self.source.passed_over.items()}
        return counts | {'damaged images': len(self.skipped),
                         'images equal to another one': len(self) - len(np.unique(self.hashes))}

    def select(self, rows):
        """ImageRows of some rows."""
        return ImageRows(self.images, rows)

    def digest(self, rows):
        """16 hex digits that tell one choice of images and people from another."""
        content = np.ascontiguousarray(self.hashes[rows]).tobytes() + self.labels[rows].tobytes()
        return files.digest(content)[:16]


# --------------------------------------------------------------------------------- cache

def load(path, cfg, photos=True):
    """The FaceSet at `path`, decoded on first use by one run while others wait.

    `photos` are looked at for their alignment; releases need not look like faces.
    """
    path = Path(path)
    if path == Path(cfg.toy.root or '?'):
        t = cfg.toy
        files.make_once(path, path.exists, lambda: toy.draw_set(
            path, t.identities, t.images, t.test_identities, t.test_pairs, cfg.data.size, t.seed))
    source = open_source(path)
    say_passed_over(source)
    mark = {'source': source.fingerprint(), 'on_size': cfg.data.on_size,
            'on_corrupt': cfg.data.on_corrupt}
    # A set that is decoded in another way has another cache, which may be in use
    way = str(path.resolve()), cfg.data.on_size, cfg.data.on_corrupt
    folder = Path(cfg.data.cache, f'{path.name}-{files.digest(repr(way).encode())[:10]}-'
                                  f'{cfg.data.size}')
    files.make_once(folder, lambda: is_current(folder, mark),
                    lambda: build_cache(folder, mark, source, cfg, photos))
    skipped = json.loads((folder / 'source.json').read_text())['skipped']
    if skipped:
        run.say(f'{path}: {counted(len(skipped), "damaged image")} left out '
                '(data.on_corrupt=skip)')
    labels = np.delete(source.labels, skipped)
    shape = len(labels), cfg.data.size, cfg.data.size, 3
    pixels = np.memmap(folder / 'images.u8', np.uint8, 'r', shape=shape)
    if pixels.nbytes > os.sysconf('SC_PHYS_PAGES') * os.sysconf('SC_PAGE_SIZE') / 2:
        # Of what the kernel reads ahead of random images, little is wanted before it is dropped
        pixels._mmap.madvise(mmap.MADV_RANDOM)
    hashes = np.load(folder / 'hashes.npy', allow_pickle=False)
    if copies := len(hashes) - len(np.unique(hashes)):
        run.say(f'{path}: {counted(copies, "image")} equal to another one of the set')
    return FaceSet(path, pixels, labels, source.people, hashes, skipped, source)


def load_release(variant):
    """The FaceSet of a variant's release, or of somebody else's (the key release)."""
    path = Path(variant.cfg.release or variant.release)
    if not path.exists():
        raise InputError(f'{path} is missing: ' + (
            'check the path' if variant.cfg.release else
            f'first run `{run.command("reconstruct.py")}`'))
    return load(path, variant.cfg, photos=False)


def is_current(folder, mark):
    """Whether the cache is of this source, and its files are as long as when they were made."""
    try:
        about = json.loads((folder / 'source.json').read_text())
        return about['mark'] == mark and all(
            (folder / name).stat().st_size == size for name, size in about['bytes'].items())
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return False


def build_cache(folder, mark, source, cfg, photos):
    """Decode all images of a source on all cores into `folder`.

    A damaged image ends it or is left out, as data.on_corrupt says. `photos`: see load().
    """
    size, count = cfg.data.size, len(source.labels)
    with files.replacing_folder(folder) as draft:
        with open(draft / 'images.u8', 'wb') as file:
            # A full disk is an error here; while the map is written it would be a crash
            os.posix_fallocate(file.fileno(), 0, count * size * size * 3)
        pixels = np.memmap(draft / 'images.u8', np.uint8, 'r+', shape=(count, size, size, 3))
        hashes, skipped, cut = np.zeros(count, np.uint64), [], []
        log = StageLog(cfg.run.folder, f'cache/{folder.name}', count)
        with ThreadPoolExecutor(run.cores()) as pool:
            parts = pool.map(lambda first: decode_part(
                range(first, min(first + 256, count)), source, cfg, pixels, hashes, skipped, cut),
                range(0, count, 256))
            for _ in track(parts, f'decoding {source.path}', -(-count // 256), transient=True):
                pass
        good = np.delete(np.arange(count), sorted(skipped))
        if not len(good):
            raise InputError(f'{source.path}: not one image can be read: copy the data set again')
        for place, i in enumerate(good) if skipped else ():
            pixels[place] = pixels[i]
        pixels.flush()
        os.truncate(draft / 'images.u8', len(good) * size * size * 3)
        content = io.BytesIO()     # np.save into a file hides from its error that the disk is full
        np.save(content, hashes[good])
        (draft / 'hashes.npy').write_bytes(content.getvalue())
        log(count, count, skipped=len(skipped))
        lengths = {name: (draft / name).stat().st_size for name in ('images.u8', 'hashes.npy')}
        (draft / 'source.json').write_text(json.dumps(
            {'mark': mark, 'skipped': sorted(skipped), 'bytes': lengths}))
        if cut:
            run.say(f'warning: {counted(len(cut), "image")} of {source.path} not square: the '
                    f'middle was cut out, as of {source.where(min(cut))}')
        if photos and not toy.is_drawn(source.path):
            warn_if_unaligned(pixels[:len(good)], source.path)


def decode_part(numbers, source, cfg, pixels, hashes, skipped, cut):
    """Decode the images `numbers` into their places in pixels (N, S, S, 3) and hashes (N,);
    append to `skipped` those that are damaged and may be left out, to `cut` those that are not
    square."""
    for i in numbers:
        try:
            image = images.decode(source.read(i), source.where(i), source.formats)
        except InputError as error:
            if cfg.data.on_corrupt == 'stop':
                raise InputError(f'{error}, or set data.on_corrupt=skip') from None
            run.say(f'left out: {error}')
            skipped.append(i)
            continue
        if image.shape[1] != image.shape[2]:
            cut.append(i)
        pixels[i] = images.fitted(image, source.where(i), cfg.data.size, cfg.data.on_size)
        hashes[i] = int.from_bytes(hashlib.blake2b(pixels[i], digest_size=8).digest())


def warn_if_unaligned(photos, path):
    """Say so if uint8 photos (N, H, W, 3) do not look aligned to ArcFace's 112-pixel template.

    Where the template has the eyes, the mean of aligned faces is darker than between them and on
    the cheeks. On 400 photos of LFW the difference is 1.1 standard deviations, on profiles of CFP
    0.75, on LFW shifted by a tenth or shrunk to three quarters below 0.64. Single photos scatter
    by 0.5, so that of a few only the place of the eyes is told.
    """
    template = 'the ArcFace template (eyes at 38,52 and 74,52 of 112 pixels)'
    if len(photos) < 50:
        return run.say(f'{path}: {counted(len(photos), "image")}, too few to tell whether they '
                       f'are aligned to {template}: look at them')
    some = torch.as_tensor(np.array(photos[::max(1, len(photos) // 500)]))
    grey = F.interpolate(some.float().mean(3)[:, None], (112, 112), mode='bilinear')[:, 0]
    grey = grey - grey.mean((1, 2), keepdim=True)
    face = (grey / (grey.square().mean((1, 2), keepdim=True).sqrt() + 1e-6)).mean(0)
    left, right, bridge, left_cheek, right_cheek = (
        face[y - 4:y + 5, x - 5:x + 6].mean()
        for x, y in ((38, 52), (74, 52), (56, 52), (38, 72), (74, 72)))
    if (bridge + left_cheek + right_cheek) / 3 - (left + right) / 2 < 0.7:
        run.say(f'warning: the faces in {path} do not look aligned to {template}: align them '
                'first, for example with insightface.utils.face_align.norm_crop, or results will '
                'be poor')
