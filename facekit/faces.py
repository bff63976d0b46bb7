"""A face data set as decoded images: from a cache that holds them, or decoded as they are read.

Every image is looked at once, by one run while others wait. Where data.decode has a cache, its
pixels go into one memory-mapped file, and from then on a batch is a gather of rows (batches.py);
else only the hash of its file is kept, and the same pixels are decoded whenever they are wanted.
"""
import hashlib
import io
import json
import mmap
import os
import shutil
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

MEMORY = os.sysconf('SC_PHYS_PAGES') * os.sysconf('SC_PAGE_SIZE')    # bytes of this machine
RELEASE = 1 << 30     # bytes of a decoded release that data.decode = auto keeps


class StreamedImages:
    """Images of a source that are decoded when they are asked for, on this process's cores.

    Indexed like the array uint8 (N, size, size, 3) of their pixels, with int64 (B,) or a slice.
    """

    def __init__(self, source, numbers, cfg):
        """source: RecordSource or FolderSource; numbers int64 (N,): which of its images."""
        self.source, self.numbers, self.data = source, numbers, cfg.data
        self.shape = len(numbers), cfg.data.size, cfg.data.size, 3
        self.threads = torch.get_num_threads()         # the cores divided by the processes
        self.pool = ThreadPoolExecutor(self.threads)

    def __len__(self):
        return len(self.numbers)

    def __getitem__(self, rows):
        numbers = self.numbers[rows]
        out = np.empty((len(numbers), *self.shape[1:]), np.uint8)

        def decode(places):
            for place in places:
                i, where = numbers[place], self.source.where(numbers[place])
                image = images.decode(self.source.read(i), where, self.source.formats)
                out[place] = images.fitted(image, where, self.data.size, self.data.on_size)

        list(self.pool.map(decode, np.array_split(np.arange(len(numbers)), 4 * self.threads)))
        return out


@dataclass
class ImageRows:
    """A choice of images, in an order, without a copy of them."""
    images: np.ndarray        # uint8 (M, H, W, 3) RGB: array, memory map or StreamedImages
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
    images: np.ndarray        # uint8 (N, size, size, 3) RGB: a memory map, or StreamedImages
    labels: np.ndarray        # int64 (N,), 0 .. P - 1: whose image
    people: np.ndarray        # str (P,): what the source calls them
    hashes: np.ndarray        # uint64 (N,), of the image files (of pixels in older caches)
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
    """The FaceSet at `path`, looked at on first use by one run while others wait.

    `photos` are looked at for their alignment; releases, of which a comparison has many, need not
    look like faces.
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
    cached = run.on_rank_0(lambda: wants_cache(folder, mark, source, cfg, photos))
    needs = ['hashes.npy', 'images.u8'][:1 + cached]
    files.make_once(folder, lambda: is_current(folder, mark, needs),
                    lambda: look_at_all(folder, mark, source, cfg, photos, cached))
    skipped = json.loads((folder / 'source.json').read_text())['skipped']
    if skipped:
        run.say(f'{path}: {counted(len(skipped), "damaged image")} left out '
                '(data.on_corrupt=skip)')
    labels = np.delete(source.labels, skipped)
    if cached:
        shape = len(labels), cfg.data.size, cfg.data.size, 3
        pixels = np.memmap(folder / 'images.u8', np.uint8, 'r', shape=shape)
    else:
        numbers = np.delete(np.arange(len(source.labels)), skipped)
        pixels = StreamedImages(source, numbers, cfg)
    mapped = pixels._mmap if cached else source.mapped()
    if mapped and len(mapped) > MEMORY / 2:
        # Of what the kernel reads ahead of random images, little is wanted before it is dropped
        mapped.madvise(mmap.MADV_RANDOM)
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


def wants_cache(folder, mark, source, cfg, photos):
    """Whether the images of a source are kept decoded, by data.decode; says how it decides.

    auto: where they are already, or take at most a quarter of the free space on the disk of
    data.cache and half of this machine's memory; those of a release at most 1 GiB.
    """
    if is_current(folder, mark, ['images.u8', 'hashes.npy']):
        return cfg.data.decode != 'stream'
    needed = len(source.labels) * cfg.data.size ** 2 * 3
    folder.parent.mkdir(parents=True, exist_ok=True)
    limit = min(shutil.disk_usage(folder.parent).free / 4, MEMORY / 2)
    cached = needed <= (limit if photos else min(limit, RELEASE))
    if cfg.data.decode != 'auto':
        cached = cfg.data.decode == 'cache'
    run.say(f'{source.path}: {len(source.labels)} images, {needed / 1e9:.3g} GB decoded: ' + (
        f'kept in {folder}' if cached else 'decoded whenever they are read') + ' (data.decode)')
    return cached


def is_current(folder, mark, needs):
    """Whether the cache is of this source, and the files it `needs` are as long as when they were
    made."""
    try:
        about = json.loads((folder / 'source.json').read_text())
        return about['mark'] == mark and all(
            (folder / name).stat().st_size == about['bytes'][name] for name in needs)
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return False


def look_at_all(folder, mark, source, cfg, photos, cached):
    """Decode all images of a source once, on all cores: `folder` gets the hashes of their files
    and, if `cached`, their pixels.

    A damaged image ends it or is left out, as data.on_corrupt says. `photos`: see load().
    """
    count = len(source.labels)
    with files.replacing_folder(folder) as draft:
        pixels = room_for(draft / 'images.u8', count, cfg.data.size) if cached else None
        hashes, skipped, cut = np.zeros(count, np.uint64), [], []
        log = StageLog(cfg.run.folder, f'cache/{folder.name}', count)
        with ThreadPoolExecutor(run.cores()) as pool:
            parts = pool.map(lambda first: look_at_part(
                range(first, min(first + 256, count)), source, cfg, pixels, hashes, skipped, cut),
                range(0, count, 256))
            for _ in track(parts, f'decoding {source.path}', -(-count // 256), transient=True):
                pass
        good = np.delete(np.arange(count), sorted(skipped))
        if not len(good):
            raise InputError(f'{source.path}: not one image can be read: copy the data set again')
        if cached:
            for place, i in enumerate(good) if skipped else ():
                pixels[place] = pixels[i]
            pixels.flush()
            os.truncate(draft / 'images.u8', len(good) * pixels[0].nbytes)
        content = io.BytesIO()     # np.save into a file hides from its error that the disk is full
        np.save(content, hashes[good])
        (draft / 'hashes.npy').write_bytes(content.getvalue())
        log(count, count, skipped=len(skipped))
        lengths = {path.name: path.stat().st_size for path in draft.iterdir()}
        (draft / 'source.json').write_text(json.dumps(
            {'mark': mark, 'skipped': sorted(skipped), 'bytes': lengths}))
        if cut:
            run.say(f'warning: {counted(len(cut), "image")} of {source.path} not square: the '
                    f'middle was cut out, as of {source.where(min(cut))}')
        if photos and not toy.is_drawn(source.path):
            warn_if_unaligned(pixels[:len(good)] if cached else StreamedImages(source, good, cfg),
                              source.path)


def room_for(path, count, size):
    """A map of a new file of `count` images, uint8 (count, size, size, 3)."""
    with open(path, 'wb') as file:
        # A full disk is an error here; while the map is written it would be a crash
        os.posix_fallocate(file.fileno(), 0, count * size * size * 3)
    return np.memmap(path, np.uint8, 'r+', shape=(count, size, size, 3))


def look_at_part(numbers, source, cfg, pixels, hashes, skipped, cut):
    """Decode the images `numbers` into their places in pixels (N, S, S, 3), unless it is None,
    and the hashes of their files into hashes (N,); append to `skipped` those that are damaged and
    may be left out, to `cut` those that are not square."""
    for i in numbers:
        try:
            content = source.read(i)
            image = images.decode(content, source.where(i), source.formats)
        except InputError as error:
            if cfg.data.on_corrupt == 'stop':
                raise InputError(f'{error}, or set data.on_corrupt=skip') from None
            run.say(f'left out: {error}')
            skipped.append(i)
            continue
        if image.shape[1] != image.shape[2]:
            cut.append(i)
        image = images.fitted(image, source.where(i), cfg.data.size, cfg.data.on_size)
        if pixels is not None:
            pixels[i] = image
        hashes[i] = int.from_bytes(hashlib.blake2b(content, digest_size=8).digest())


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
    some = torch.from_numpy(photos[np.arange(0, len(photos), max(1, len(photos) // 500))])
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
