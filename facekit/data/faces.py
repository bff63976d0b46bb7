"""A face data set: its images, which are decoded as they are read, and whose they are.

Every image is looked at once, by one run while others wait: the hash of its file and whether it is
damaged are kept in the run folder. Pixels are not: SourceImages.keep() decodes those that will be
read many times into memory.
"""
import hashlib
import io
import math
import mmap
import os
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

from facekit.base import files, process
from facekit.base.errors import InputError, counted
from facekit.base.launch import command
from facekit.base.log import StageLog
from facekit.data import batches, images, toy
from facekit.data.sources import FolderSource, fingerprint, is_drawn, open_source

PART = 256        # images that a thread decodes at a time: a run that is stopped waits for them
AT_ONCE = 4096    # images that are on the host at a time on their way into memory


class SourceImages:
    """The images of a source. They are decoded whenever they are read, but for those that keep()
    has decoded into memory.

    Indexed like the tensor uint8 (N, size, size, 3) of their pixels, with int64 (B,) or a slice.
    """

    def __init__(self, source, numbers, cfg):
        """source: see sources.open_source(); numbers int64 (N,): which of its images."""
        self.source, self.numbers, self.data = source, numbers, cfg.data
        self.threads = max(1, process.cores() // process.on_this_node())
        self.pool = ThreadPoolExecutor(self.threads)
        self.kept = None                            # uint8 (M, size, size, 3), see keep()
        self.place = np.full(len(numbers), -1)      # int64 (N,): where in it each row is, or -1
        self.said = ''                              # what keep() told the user last

    def __len__(self):
        return len(self.numbers)

    def __getitem__(self, rows):
        if not self.has(rows):
            return self.decoded(self.numbers[rows])
        place = batches.to_device(torch.from_numpy(self.place[rows]), self.kept.device)
        return self.kept.index_select(0, place)     # ten times as fast as kept[place] on a CPU

    def has(self, rows):
        """Whether keep() has decoded all of these rows."""
        return bool((self.place[rows] >= 0).all())

    def keep(self, rows, device):
        """Decode rows that will be read many times, int64 (M,), into memory, see memory_for(), and
        drop earlier ones. Where they do not fit, they are decoded as they are read."""
        if self.has(rows):
            return
        self.kept = None
        self.place[:] = -1
        shape = len(rows), self.data.size, self.data.size, 3
        memory, how = memory_for(math.prod(shape), device)
        text = (f'{self.source.path}: {counted(len(rows), "image")}, '
                f'{math.prod(shape) / 1e6:,.1f} MB: decoded {how}')
        if text != self.said:
            process.say(text)
            self.said = text
        if memory is None:
            return self.expect_random_order()
        kept = torch.empty(shape, dtype=torch.uint8, device=memory)
        for first in range(0, len(rows), AT_ONCE):
            part = slice(first, first + AT_ONCE)
            kept[part] = self.decoded(self.numbers[rows[part]])
        self.kept = kept
        self.place[rows] = np.arange(len(rows))

    def decoded(self, numbers):
        """uint8 (B, size, size, 3) of images of the source, int64 (B,), on all threads."""
        out = np.empty((len(numbers), self.data.size, self.data.size, 3), np.uint8)

        def decode(places):
            for place in places:
                i, where = numbers[place], self.source.where(numbers[place])
                image = images.decode(self.source.read(i), where, self.source.formats)
                out[place] = images.fitted(image, where, self.data.size, self.data.on_size)

        parts = max(4 * self.threads, len(numbers) // PART)
        list(self.pool.map(decode, np.array_split(np.arange(len(numbers)), parts)))
        return torch.from_numpy(out)

    def expect_random_order(self):
        """Tell the kernel not to read ahead in a file of which it can hold only a part."""
        data = self.source.data
        if data and len(data) > process.free_memory(torch.device('cpu')):
            data.madvise(mmap.MADV_RANDOM)


def memory_for(size, device):
    """Where `size` bytes are kept, and how that is called: the device, or else the host, or None.
    They may take half of what is free there, which on the host the processes of this run share."""
    if device.type == 'cuda' and size < process.free_memory(device) / 2:
        return device, "into the GPU's memory"
    host = torch.device('cpu')
    if size < process.free_memory(host) / 2 / process.on_this_node():
        return host, 'into memory'
    return None, 'as they are read'


@dataclass
class ImageRows:
    """A choice of images, in an order, without a copy of them."""
    images: object            # uint8 (M, H, W, 3) RGB: an array, or SourceImages
    rows: np.ndarray          # int64 (N,): which of them

    def __len__(self):
        return len(self.rows)

    def take(self, chosen):
        """ImageRows of some of these, by their places."""
        return ImageRows(self.images, self.rows[chosen])

    def on_gpu(self):
        """Whether they are read from a GPU's memory."""
        kept = getattr(self.images, 'kept', None)              # an array has none
        return kept is not None and kept.is_cuda

    def tensor(self):
        """uint8 (N, H, W, 3) on the device where the images are."""
        return torch.as_tensor(self.images[self.rows])

    def pixels(self):
        """uint8 (N, H, W, 3), numpy."""
        return self.tensor().cpu().numpy()


@dataclass
class FaceSet:
    """A face data set."""
    path: Path                # where it was read from
    images: SourceImages      # uint8 (N, size, size, 3) RGB
    labels: np.ndarray        # int64 (N,), 0 .. P - 1: whose image
    people: np.ndarray        # str (P,): what the source calls them
    hashes: np.ndarray        # uint64 (N,), of the image files
    skipped: list             # numbers of the source's images that were left out as damaged
    look: Path | None = None  # file of first_look(); None where nobody has looked at the images
    source: object = None     # see sources.open_source()

    def __len__(self):
        return len(self.labels)

    def where(self, row):
        """Where image `row` stands on disk, for a sentence."""
        return self.source.where(self.images.numbers[row])

    def left_out(self):
        """{why: number} of what the source holds and this set does not, or holds twice."""
        counts = {why: len(paths) for why, paths in self.source.passed_over.items()}
        return counts | {'damaged images': len(self.skipped),
                         'images equal to another one': len(self) - len(np.unique(self.hashes))}

    def select(self, rows):
        """ImageRows of some rows."""
        return ImageRows(self.images, rows)

    def small_greys(self):
        """images.small_grey() of all images, int8 (N, 64)."""
        with np.load(self.look, allow_pickle=False) as look:
            return look['small_greys']

    def digest(self, rows):
        """16 hex digits that tell one choice of images and people from another."""
        content = np.ascontiguousarray(self.hashes[rows]).tobytes() + self.labels[rows].tobytes()
        return files.digest(content)[:16]


def load(path, cfg, photos=True):
    """The FaceSet at `path`; of `photos` the alignment is looked at, too."""
    path = Path(path)
    if path == Path(cfg.toy.root or '?'):
        t = cfg.toy
        process.make_once(path, path.exists, lambda: toy.draw_set(
            path, t.identities, t.images, t.test_identities, t.test_pairs, cfg.data.size, t.seed))
    source = open_source(path)
    if photos:
        check_apart(source, cfg)
    for why, paths in source.passed_over.items():
        some = ', '.join(str(file.relative_to(source.folder)) for file in paths[:3])
        more = ', ...' if len(paths) > 3 else ''
        process.say(f'{path}: passed over, {why}: {len(paths)} ({some}{more})')
    look = first_look(path, source, cfg, photos)
    with np.load(look, allow_pickle=False) as content:
        hashes, skipped = content['hashes'], content['skipped'].tolist()
    if skipped:
        process.say(f'{path}: {counted(len(skipped), "damaged image")} left out '
                    '(data.on_corrupt=skip)')
    if copies := len(hashes) - len(np.unique(hashes)):
        process.say(f'{path}: {counted(copies, "image")} equal to another one of the set')
    numbers = np.delete(np.arange(len(source.labels)), skipped)
    return FaceSet(path, SourceImages(source, numbers, cfg), source.labels[numbers],
                   source.people, hashes, skipped, look, source)


def check_apart(source, cfg):
    """Refuse a folder of people that holds the run folder, whose pictures would become a person of
    it, or lies in it."""
    if type(source) is not FolderSource:       # of a list, or records, nothing else is taken
        return
    data, run = (Path(os.path.realpath(path)) for path in (source.folder, cfg.run.folder))
    if run.is_relative_to(data) or data.is_relative_to(run):
        raise InputError(f'run.folder = {cfg.run.folder} and the photos in {source.folder} '
                         'contain one another: set run.folder to a place of its own')


def load_release(variant):
    """The FaceSet of a variant's release, or of somebody else's (the key release)."""
    path = Path(variant.cfg.release or variant.release)
    if not path.exists():
        raise InputError(f'{path} is missing: check the path, or first run '
                         f'`{command("reconstruct.py")}`')
    return load(path, variant.cfg, photos=False)


def first_look(path, source, cfg, photos):
    """Path of a file in the run folder, kept for as long as the source stays the same: the hashes,
    uint64 (N,), of its sound image files, their small_greys, int8 (N, 64), and the numbers of the
    damaged ones, which are `skipped`."""
    asked = str(path.resolve()), cfg.data.size, cfg.data.on_size, cfg.data.on_corrupt
    mark, name = fingerprint(source), files.digest(repr(asked).encode())[:10]
    saved = Path(cfg.run.folder, 'looks', f'{path.name}-{name}.npz')
    process.make_once(saved, lambda: is_current(saved, mark, len(source.labels)),
                      lambda: look_at_all(saved, mark, source, cfg, photos))
    return saved


def is_current(saved, mark, count):
    """Whether a file of first_look() is whole and of this source of `count` images."""
    if not saved.is_file():    # to open a pipe would wait for ever
        return False
    try:
        with np.load(saved, allow_pickle=False) as look:
            hashes, small_greys, skipped = (look[name] for name in (          # check sums, too
                'hashes', 'small_greys', 'skipped'))
            kinds = hashes.dtype, small_greys.dtype, skipped.dtype
            return (look['mark'].item() == mark and kinds == (np.uint64, np.int8, np.int64)
                    and hashes.shape == (count - len(skipped),)
                    and small_greys.shape == (len(hashes), images.SMALL ** 2)
                    and bool(((skipped >= 0) & (skipped < count)).all()))
    except Exception:          # damage can make any of many kinds
        return False


def look_at_all(saved, mark, source, cfg, photos):
    """Decode all images of a source once, on all cores, and write what first_look() keeps. A
    damaged image ends it or is left out, as data.on_corrupt says."""
    count, damaged, cut = len(source.labels), [], 0
    hashes, small_greys = np.zeros(count, np.uint64), np.zeros((count, images.SMALL ** 2), np.int8)
    log = StageLog(cfg.run.folder, f'look/{saved.stem}', count)
    parts = [range(first, min(first + PART, count)) for first in range(0, count, PART)]
    with ThreadPoolExecutor(process.cores()) as pool:
        looks = pool.map(lambda part: look_at(part, source, cfg, hashes, small_greys), parts)
        for part, (some_damaged, some_cut) in zip(parts, looks):
            log.announce(f'looking at {source.path}, image {part.start} of {count}')
            damaged += some_damaged
            cut += some_cut
    sound = np.delete(np.arange(count), damaged)
    if not len(sound):
        raise InputError(f'{source.path}: not one image can be read: copy the data set again')
    if cut:
        process.say(f'warning: {counted(cut, "image")} of {source.path} not square: the middle is '
                    'taken')
    if photos and not is_drawn(source.path):
        warn_if_unaligned(SourceImages(source, sound, cfg), source.path)
    content = io.BytesIO()     # np.savez into a file hides from its error that the disk is full
    np.savez(content, mark=mark, hashes=hashes[sound], small_greys=small_greys[sound],
             skipped=np.array(damaged, np.int64))
    files.make_private(saved.parent)           # small_greys are pictures, if small ones
    with files.replacing(saved, private=True) as file:
        file.write(content.getvalue())
    log(count, count, skipped=len(damaged))


def look_at(numbers, source, cfg, hashes, small_greys):
    """Decode the images `numbers`, and put the hashes of their files into hashes (N,) and what
    copies have in common into small_greys (N, 64); returns which of them are damaged, to be left
    out, and how many are not square."""
    damaged, cut = [], 0
    for i in numbers:
        try:
            content = source.read(i)
            image = images.decode(content, source.where(i), source.formats)
        except InputError as error:
            if cfg.data.on_corrupt == 'stop':
                raise InputError(f'{error}, or set data.on_corrupt=skip') from None
            process.say(f'left out: {error}')
            damaged.append(i)
            continue
        cut += image.shape[1] != image.shape[2]
        if cfg.data.on_size == 'refuse':
            images.fitted(image, source.where(i), cfg.data.size, 'refuse')
        small_greys[i] = images.small_grey(image)
        hashes[i] = int.from_bytes(hashlib.blake2b(content, digest_size=8).digest())
    return damaged, cut


def warn_if_unaligned(photos, path):
    """Say so if uint8 photos (N, H, W, 3) do not look aligned to ArcFace's 112-pixel template.

    Where the template has the eyes, the mean of aligned faces is darker than between them and on
    the cheeks: on 400 photos of LFW by 1.1 standard deviations, on profiles of CFP by 0.75, on LFW
    shifted by a tenth or shrunk to three quarters by less than 0.64. Single photos scatter by 0.5.
    """
    template = 'the ArcFace template (eyes at 38,52 and 74,52 of 112 pixels)'
    if len(photos) < 50:
        return process.say(f'{path}: {counted(len(photos), "image")}, too few to tell whether '
                           f'they are aligned to {template}: look at them')
    some = torch.as_tensor(photos[np.arange(0, len(photos), max(1, len(photos) // 500))])
    grey = F.interpolate(some.float().mean(3)[:, None], (112, 112), mode='bilinear')[:, 0]
    grey = grey - grey.mean((1, 2), keepdim=True)
    face = (grey / (grey.square().mean((1, 2), keepdim=True).sqrt() + 1e-6)).mean(0)
    left, right, bridge, left_cheek, right_cheek = (
        face[y - 4:y + 5, x - 5:x + 6].mean()
        for x, y in ((38, 52), (74, 52), (56, 52), (38, 72), (74, 72)))
    if (bridge + left_cheek + right_cheek) / 3 - (left + right) / 2 < 0.7:
        process.say(f'warning: the faces in {path} do not look aligned to {template}: align them '
                    'first, by `python tools/align.py PHOTOS FACES`')
