"""From a data set on disk to decoded images: cache, and the split into public and private people.

Every image is decoded once into one memory-mapped file of uint8 pixels; from then on a batch is a
gather of rows (batches.py).
"""
import hashlib
import io
import json
import mmap
import os
import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
import torch.nn.functional as F
from rich.progress import track

import checkpoint
import records
import runtime
import toy
from records import InputError


# --------------------------------------------------------------------------------- cache

def open_source(path):
    """A data set on disk: (read, name, labels, fingerprint); read(i) is encoded image i.

    Records are told from a folder per identity by what the path holds. name(i) says where image
    i stands, labels are as in the source, int64 (N,). The fingerprint changes with the source.
    """
    path = Path(path)
    if path.suffix == '.rec' or (path / 'train.rec').is_file():
        source = records.Records(path)
        return (source.__getitem__, lambda i: f'{source.path} record {source.keys[i]}',
                source.labels, fingerprint([source.path], source.labels))
    if not path.is_dir():
        raise InputError(f'data set {path} does not exist: set data.root to a folder with '
                         'train.rec, or with one sub-folder of photos a person')
    files, labels = records.face_folders(path)
    labels = np.asarray(labels, np.int64)
    # A name can hold line breaks, but a sentence that names it shall not
    return (lambda i: records.open_bytes(files[i]), lambda i: repr(str(files[i]))[1:-1], labels,
            fingerprint(files, labels))


def fingerprint(files, labels):
    state = [(f.name, f.stat().st_size, f.stat().st_mtime_ns) for f in map(Path, files)]
    return hashlib.sha256(repr(state).encode() + labels.tobytes()).hexdigest()


def pixels(image, where, size, on_size):
    """uint8 (3, H, W) -> uint8 (size, size, 3); another size is resized or refused."""
    if image.shape[1:] != (size, size):
        if on_size == 'refuse':
            raise InputError(f'{where} is {image.shape[2]}x{image.shape[1]} pixels, data.size is '
                             f'{size}: set data.size alike, or data.on_size=resize')
        image = F.interpolate(image[None].float(), (size, size), mode='bilinear',
                              antialias=True, align_corners=False)[0].round_().byte()
    return image.permute(1, 2, 0).numpy()


def load(path, cfg):
    """A data set as uint8 pixels, decoded on first use into a memory-mapped cache.

    Returns a namespace: `images` uint8 memmap (N, size, size, 3), `labels` int64 (N,) as in the
    source, `hashes` uint64 (N,) of the decoded pixels, `skipped`, the images that were left out
    as damaged. Built by rank 0, the others wait.
    """
    path = Path(path)
    if cfg.toy.identities and path == Path(cfg.data.root):
        t = cfg.toy
        checkpoint.make_once(path, path.exists, lambda: toy.draw_set(
            path, t.identities, t.images, t.test_identities, t.test_pairs, cfg.data.size, t.seed))
    read, name_of, labels, mark = open_source(path)
    size = cfg.data.size
    mark = {'source': mark, 'on_size': cfg.data.on_size, 'on_corrupt': cfg.data.on_corrupt}
    name = f'{path.name}-{hashlib.sha256(str(path.resolve()).encode()).hexdigest()[:10]}'
    folder = Path(cfg.data.cache) / f'{name}-{cfg.data.size}'
    checkpoint.make_once(
        folder, lambda: is_current(folder, mark),
        lambda: build_cache(folder, mark, path, read, name_of, len(labels), cfg))
    skipped = json.loads((folder / 'source.json').read_text())['skipped']
    if skipped:
        runtime.say(f'{path}: {len(skipped)} damaged images are left out (data.on_corrupt=skip)')
    labels = np.delete(labels, skipped)
    images = np.memmap(folder / 'images.u8', np.uint8, 'r', shape=(len(labels), size, size, 3))
    if images.nbytes > os.sysconf('SC_PHYS_PAGES') * os.sysconf('SC_PAGE_SIZE') / 2:
        # Of what the kernel reads ahead of random images, little is wanted before it is dropped
        images._mmap.madvise(mmap.MADV_RANDOM)
    return SimpleNamespace(
        images=images, hashes=np.load(folder / 'hashes.npy', allow_pickle=False), labels=labels,
        path=path, skipped=skipped)


def is_current(folder, mark):
    """Whether the cache is of this source, and its files are as long as when they were made."""
    try:
        found = json.loads((folder / 'source.json').read_text())
        return found['mark'] == mark and all(
            (folder / name).stat().st_size == size for name, size in found['bytes'].items())
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return False


def build_cache(folder, mark, path, read, name_of, count, cfg):
    """Decode images read(0 .. count-1) on all cores into `folder`, whole or not at all.

    A damaged image, named by name_of(i), ends it or is left out, as data.on_corrupt says.
    """
    size, temporary = cfg.data.size, folder.with_name(folder.name + '.tmp')
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    with open(temporary / 'images.u8', 'wb') as f:      # a full disk is an error here; while the
        os.posix_fallocate(f.fileno(), 0, count * size * size * 3)      # map is written, a crash
    images = np.memmap(temporary / 'images.u8', np.uint8, 'r+', shape=(count, size, size, 3))
    hashes, skipped = np.zeros(count, np.uint64), []
    log = runtime.Log(cfg.run.folder, f'cache/{folder.name}', count)

    def decode(first):
        for i in range(first, min(first + 256, count)):
            try:
                image = records.decode(read(i), name_of(i))
            except InputError as e:
                if cfg.data.on_corrupt == 'stop':
                    raise InputError(f'{e}, or set data.on_corrupt=skip') from None
                runtime.say(f'left out: {e}')
                skipped.append(i)
                continue
            images[i] = pixels(image, name_of(i), size, cfg.data.on_size)
            hashes[i] = int.from_bytes(hashlib.blake2b(images[i], digest_size=8).digest())

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        for _ in track(pool.map(decode, range(0, count, 256)), f'decoding {path}',
                       total=-(-count // 256), transient=True):
            pass
    kept = np.delete(np.arange(count), sorted(skipped))
    if not len(kept):
        raise InputError(f'{path}: not one image can be read: copy the data set again')
    if skipped:
        for place, i in enumerate(kept):
            images[place] = images[i]
    images.flush()
    os.truncate(temporary / 'images.u8', len(kept) * size * size * 3)
    content = io.BytesIO()      # np.save into a file hides from its error that the disk is full
    np.save(content, hashes[kept])
    (temporary / 'hashes.npy').write_bytes(content.getvalue())
    log(count, count, skipped=len(skipped))
    whole = {name: (temporary / name).stat().st_size for name in ('images.u8', 'hashes.npy')}
    (temporary / 'source.json').write_text(json.dumps(
        {'mark': mark, 'skipped': sorted(skipped), 'bytes': whole}))
    if path.is_dir() and not (path / 'train.rec').exists():
        warn_if_unaligned(images[:len(kept)], path)
    shutil.rmtree(folder, ignore_errors=True)
    os.sync()                           # a power cut shall not leave empty files behind a name
    temporary.rename(folder)


def warn_if_unaligned(images, path):
    """Say so if uint8 photos (N, H, W, 3) do not look aligned to ArcFace's 112-pixel template.

    Where the template has the eyes, the mean of aligned faces is darker than between them and on
    the cheeks. On 600 photos of LFW the difference is 1.1 standard deviations, on the same photos
    shifted by a tenth or shrunk to three quarters below 0.7; single photos scatter too much.
    """
    some = torch.as_tensor(np.array(images[::max(1, len(images) // 500)]))
    grey = F.interpolate(some.float().mean(3)[:, None], (112, 112), mode='bilinear')[:, 0]
    grey = grey - grey.mean((1, 2), keepdim=True)
    face = (grey / (grey.square().mean((1, 2), keepdim=True).sqrt() + 1e-6)).mean(0)
    left, right, bridge, cheek, other = (
        face[y - 4:y + 5, x - 5:x + 6].mean()
        for x, y in ((38, 52), (74, 52), (56, 52), (38, 72), (74, 72)))
    if len(some) >= 5 and (bridge + cheek + other) / 3 - (left + right) / 2 < 0.75:
        runtime.say(f'warning: the faces in {path} do not look aligned to the ArcFace template '
                    '(eyes at 38,52 and 74,52 of 112 pixels): align them first, for example with '
                    'insightface.utils.face_align.norm_crop, or results will be poor')


def load_release(row):
    """The released images of a row, or those of somebody else."""
    path = Path(row.cfg.release or row.folder / 'reconstructed')
    if not path.exists():
        raise InputError(f'{path} is missing: ' + ('check the path' if row.cfg.release else
                         f'first run `{runtime.again("reconstruct.py")}`'))
    return load(path, row.cfg)


# -------------------------------------------------------------------------------- splits

def not_excluded(found, cfg):
    """Which images of a data set are of nobody in data.exclude: bool (N,)."""
    return ~np.isin(found.labels, cfg.data.exclude)


def renumber(labels):
    """Labels with gaps -> 0 .. C-1, in order of size."""
    return np.unique(labels, return_inverse=True)[1].reshape(-1)


def split(cfg):
    """Who is public and who is private: a list of folds.

    Each fold is a namespace of the public and the private set with index arrays: `data`
    (the public set), `train` (images of public identities that train recognisers), `mae`
    (the same and people with too few images), `validation` (public identities kept from all
    training), `private_data`, `private`. With data.public, one fold; otherwise the identities of
    data.root fall into data.folds groups by a seeded hash, and each group is private in its fold.
    """
    whole = load(cfg.data.root, cfg)
    public = load(cfg.data.public, cfg) if cfg.data.public else whole
    kept = not_excluded(whole, cfg)
    names, inverse, counts = np.unique(whole.labels, return_inverse=True, return_counts=True)
    many = (counts >= cfg.data.min_images)[inverse] & kept
    if cfg.data.public:
        groups = np.zeros(len(names), int)
        wanted = [0]
    else:
        if cfg.data.folds < 2:
            raise InputError('data.folds = 1 leaves nobody public: set data.folds=2 or more, '
                             'or data.public to another data set')
        groups = ordered_by_hash(names, cfg.data.split_seed).argsort() % cfg.data.folds
        wanted = cfg.data.release_folds or range(cfg.data.folds)
        if max(wanted) >= cfg.data.folds:
            raise InputError(f'data.release_folds = {wanted} names a group that does not exist: '
                             f'data.folds = {cfg.data.folds} makes 0..{cfg.data.folds - 1}')
    folds = []
    for k in wanted:
        private = many & (groups == k)[inverse]
        open_to_mae = np.ones(len(public.labels), bool) if cfg.data.public else kept & ~private
        trainable = open_to_mae if cfg.data.public else many & ~private
        people = np.unique(public.labels[trainable])
        held = people[ordered_by_hash(people, cfg.data.split_seed + 1)]
        held = held[:round(cfg.data.validation * len(people))]
        validation = np.isin(public.labels, held)
        fold = SimpleNamespace(
            k=k, data=public, private_data=whole, train=np.flatnonzero(trainable & ~validation),
            mae=np.flatnonzero(open_to_mae & ~validation),
            validation=np.flatnonzero(trainable & validation), private=np.flatnonzero(private))
        check_disjoint(fold, same_set=not cfg.data.public)
        folds.append(fold)
    return folds


def ordered_by_hash(names, seed):
    """Order of identity labels by a seeded hash: int64 (len(names),)."""
    return np.argsort([hashlib.sha256(f'{seed} {n}'.encode()).digest() for n in names])


def check_disjoint(fold, same_set):
    """Refuse a fold that shares an identity or an image between public and private."""
    if not len(fold.private) or not len(fold.train):
        raise InputError(f'fold {fold.k} has {len(fold.train)} public and {len(fold.private)} '
                         'private images: change data.folds, data.min_images or data.validation')
    public = np.union1d(fold.mae, fold.validation)
    shared = np.intersect1d(fold.data.labels[public], fold.private_data.labels[fold.private])
    if same_set and len(shared):
        raise InputError(f'identity {shared[0]} of {fold.data.path} is public and private: '
                         'this is an error of the split, please report it')
    shared, a, b = np.intersect1d(fold.data.hashes[public],
                                  fold.private_data.hashes[fold.private], return_indices=True)
    if len(shared):
        people = np.unique(fold.private_data.labels[fold.private[b]]).tolist()
        a, b = public[a[0]], fold.private[b[0]]
        raise InputError(
            f'image {a} of {fold.data.path} (identity {fold.data.labels[a]}) is the same picture '
            f'as private image {b} of {fold.private_data.path} (identity '
            f'{fold.private_data.labels[b]}), {len(shared)} such in all: leave these private '
            f'people out with data.exclude={people}')


def digest(found, rows):
    """16 hex digits that tell one set of training images and labels from another."""
    content = np.ascontiguousarray(found.hashes[rows]).tobytes() + found.labels[rows].tobytes()
    return hashlib.sha256(content).hexdigest()[:16]


def private_digest(folds):
    """What tells these private images, in this split, from others."""
    return digest(folds[0].private_data, np.concatenate([f.private for f in folds]))
