"""A release: its secret, its plan, and what is checked before it appears."""
import hashlib
import itertools
import re
import secrets
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from facekit.base import files, process
from facekit.base.config import CONFIGS, Variant, key_path
from facekit.base.errors import InputError
from facekit.base.made_from import check_made_from, settings
from facekit.data import images
from facekit.data.faces import FaceSet
from facekit.data.people import private_digest
from facekit.data.records import Records
from facekit.data.sources import is_drawn
from facekit.privacy import protect
from facekit.privacy.contents import FILES, check_digests, check_names, manifest_text, refuse
from facekit.privacy.protect import Protection, method_of

LARGEST_KEY = 4096    # bytes of a key file
HASHES = hashlib.algorithms_guaranteed - {'shake_128', 'shake_256'}
SAMPLE = 16       # images of a release that are made once more, chosen anew each time
# A protection that leaves more than this share of the grey levels within CLOSE of the original's
# is none: JPEG at quality 95 alone moves them by less, a mask of 25 % leaves 75 %
UNCHANGED, CLOSE = 0.9, 8
PART = 512        # images that are made at a time
MADE_BY = r'FaceMAE kit ([0-9a-f]{12,40}(-dirty)?|version [0-9.]{1,9})'        # see commit()


def release_secret(cfg):
    """The secret of a run's releases, drawn once: 32 bytes or more."""
    path = key_file(cfg)
    process.make_once(path, path.exists, lambda: draw_secret(path))
    secret = read_secret(path)
    if is_public(secret):
        if not is_drawn(cfg.data.root):
            raise InputError(f'reconstruct.key = {path} is known to everybody, and '
                             f'{cfg.data.root} are no drawn faces: set reconstruct.key= for a '
                             'secret of your own')
    elif path.stat().st_mode & 0o077:
        process.say(f'warning: others can read {path}, from which masks, order and labels of the '
                    f'release follow: chmod 600 {path}')
    return secret


def key_file(cfg):
    """Path of the secret: reconstruct.key, else a file of the run. InputError for a key that is
    named and not there."""
    if cfg.reconstruct.key:
        return key_path(cfg.reconstruct.key)
    return Path(cfg.run.folder) / 'release.key'


def read_secret(path):
    """The bytes of a key file, which holds 64 or more hex digits; InputError for another, and for
    one that somebody could guess."""
    try:
        if path.exists() and not path.is_file():
            raise OSError(0, 'no plain file')      # of a pipe or a device the end may never come
        with path.open('rb') as file:
            content = file.read(LARGEST_KEY + 1)
        secret = bytes.fromhex(content.decode('utf-8-sig').strip())
    except OSError as error:           # whose file may hold a good secret
        raise InputError(f'{path} cannot be read ({error.strerror}): get the right to read it, or '
                         'name your copy of it in reconstruct.key') from None
    except ValueError:
        secret = b''
    if len(secret) < 32 or len(content) > LARGEST_KEY or is_regular(secret):
        raise InputError(f'{path} holds no random secret of 64 hex digits: put the right file '
                         'back, or, if nothing was released with it, delete it to have a new one '
                         'drawn')
    return secret


def is_regular(secret):
    """Whether a secret repeats itself, counts, is text or has few different bytes: no random one
    does."""
    steps = {(b - a) % 256 for a, b in itertools.pairwise(secret)}
    parts = [secret[:n] for n in range(1, len(secret) // 2 + 1)]
    repeats = any((part * len(secret))[:len(secret)] == secret for part in parts)
    return len(set(secret)) < 16 or len(steps) < 8 or repeats or secret.isascii()


def is_public(secret):
    """Whether a secret is the toy's, which everybody has, or follows from it: turned, read
    backwards, inverted, changed in some places, or hashed once or twice."""
    text = (CONFIGS / 'toy.key').read_text().strip()
    known = bytes.fromhex(text)
    contents = {known, text.encode(), f'{text}\n'.encode()}
    for _ in range(2):
        digests = {hashlib.new(name, content, usedforsecurity=False).digest()
                   for name in HASHES for content in contents}
        contents |= digests | {digest.hex().encode() for digest in digests}
    if any(content[:16] in secret for content in contents):
        return True
    backwards = bytes.fromhex(text[::-1])                       # by digits
    parts = [int.from_bytes(secret[i:i + 32]) for i in range(len(secret) - 31)]
    for form in (known, known[::-1], backwards, backwards[::-1]):
        number = int.from_bytes(form)
        for turn in range(256):
            turned = (number >> turn | number << 256 - turn) % 2**256
            # Of a random secret 128 bits differ, with a standard deviation of 8
            if any(abs((part ^ turned).bit_count() - 128) > 56 for part in parts):
                return True
    return False


def key_of(secret):
    """The 32 bytes that keyed() has for a key; they are as secret as the secret."""
    return hashlib.sha256(secret).digest()


def draw_secret(path):
    """Write a new secret that the user alone can read, or refuse where the old one is lost."""
    if any(path.parent.rglob('release.json')):
        raise InputError(f'{path} is missing, but releases were made with it: put it back, as '
                         'with another secret the same photos would show other patches')
    with files.replacing(path, private=True) as file:
        file.write(secrets.token_hex(32).encode() + b'\n')


def keyed(secret, *what):
    """64 bits, int, from a keyed hash of `what`: BLAKE2b with the secret as key (RFC 7693).

    Without the secret nobody can tell one of these numbers from chance, however many others he
    knows (a pseudorandom function): who has one original and its mask, or another row's release,
    learns no other image's mask, place or label. expanded(), which makes the bits of one image
    from its number, can be inverted, but that leads to this image's number only.
    """
    text = '\0'.join(map(str, what)).encode(errors='surrogateescape')
    digest = hashlib.blake2b(text, key=key_of(secret), digest_size=8).digest()
    return int.from_bytes(digest, signed=True)


@dataclass
class ReleasePlan:
    """Which private image becomes which released one; N released images, in their order."""
    fold: np.ndarray          # int64 (N,): position in the list of folds
    image: np.ndarray         # int64 (N,): row of the private FaceSet
    label: np.ndarray         # int64 (N,): 0 .. people - 1, rising
    seeds: torch.Tensor       # int64 (N,): what decides the mask or noise of each

    @property
    def people(self):
        """Number of people who are released."""
        return int(self.label[-1]) + 1


def plan_release(folds, secret, cfg):
    """The ReleasePlan of a config: a pure function of the private images and the secret.

    Everything is drawn for this row, seed and strength: two releases share no mask, order or
    label. It is drawn by names and contents: when somebody is added or taken out, the masks and
    the relative order of others stay, while label numbers close up.
    """
    c, private = cfg.reconstruct, folds[0].private
    strength = method_of(cfg).strength
    release = cfg.run.row, cfg.run.seed, c.method, getattr(c, strength) if strength else ''
    fold = np.repeat(np.arange(len(folds)), [len(f.released) for f in folds])
    image = np.concatenate([f.released for f in folds])
    people, person = np.unique(private.labels[image], return_inverse=True)
    by_person = np.array([keyed(secret, *release, 'person', private.people[p]) for p in people])
    label = by_person.argsort().argsort()[person]
    contents = private.hashes[image].tolist()
    by_image = np.array([keyed(secret, *release, 'order', content) for content in contents])
    order = np.lexsort((image, by_image, label))       # equal pictures in the order of the source
    seeds = torch.tensor([keyed(secret, *release, 'mask', contents[i], private.people[
        private.labels[image[i]]]) for i in order])
    fold, image, label = fold[order], image[order], label[order]
    if c.images_per_person:
        first = np.searchsorted(label, label)              # where this person's images begin
        within = np.flatnonzero(np.arange(len(label)) - first < c.images_per_person)
        fold, image, label, seeds = fold[within], image[within], label[within], seeds[within]
    return ReleasePlan(fold, image, label, seeds)


def release_made_from(cfg, folds, maes, secret):
    """What a release is made from, {what: text} (see made_from.py); maes: see load_maes()."""
    private = folds[0].private
    names = private.people[np.unique(private.labels[np.concatenate([f.released for f in folds])])]
    keys = ['reconstruct', 'data.size', 'data.folds', 'data.release_folds', 'run.seed']
    if method_of(cfg).draws_mask:
        keys.append('mae.patch')
    made_from = settings(cfg, keys) | {
        'set of images': private_digest(folds),
        'set of names': files.digest('\0'.join(names).encode(errors='surrogateescape')),
        # Tells one secret from another, and is not what keyed() has for a key
        'secret': files.digest(b'which secret: ' + secret)}
    if maes[0]:
        made_from['mae'] = files.digest(''.join(mae.digest() for mae in maes).encode())
    return made_from


@dataclass
class PlannedRelease:
    """A release that is to be made, checked or attacked, with all that decides it."""
    variant: Variant
    private: FaceSet
    protections: list         # the Protection of each fold
    secret: bytes
    plan: ReleasePlan
    made_from: dict           # see release_made_from()
    device: torch.device

    def check_published(self):
        """Refuse a finished release that was made with another config, secret, model, images or
        names, whose images would match no originals, and look private; and one of which a file was
        changed since it was published."""
        folder = self.variant.release
        saved = files.read_json(self.variant.folder / 'release.json')
        check_made_from(folder, files.entry(saved, 'made_from'), self.made_from,
                        'give the other settings a row of their own (compare); people are taken '
                        'out by reconstruct.remove=[NAME]')
        process.on_rank_0(lambda: check_digests(self.variant))

    def check_files(self, folder, facts, card):
        """Refuse a release whose files are not exactly what it may hold.

        facts: what manifest.json may say, whatever version of the kit made it; card: a function
        that makes README.md from it. So no path, name or label of the source needs to be searched
        for.
        """
        check_names(folder)
        made_by = str(files.read_json(folder / 'manifest.json').get('made_by'))
        is_ours = re.fullmatch(MADE_BY, made_by)
        manifest = facts | {'made_by': made_by}
        texts = {'manifest.json': manifest_text(manifest), 'README.md': card(manifest)}
        for name, text in texts.items():
            found = files.open_bytes(folder / name)[:]
            refuse(not is_ours or found != text.encode(), folder, f'has another {name}')
        keys = self.secret, key_of(self.secret)
        forms = [form for key in keys
                 for form in (key, key.hex().encode(), key.hex().upper().encode())]
        for path in map(folder.joinpath, FILES):
            content = files.open_bytes(path)
            refuse(any(content.find(form) >= 0 for form in forms), path, 'holds the secret')

    def check_images(self, folder, all_images=False):
        """Refuse a release whose labels and images are not those of its plan: SAMPLE images at
        random, or `all_images`, are made once more and compared, see made_again()."""
        released = Records(folder)
        refuse(not np.array_equal(released.labels, self.plan.label), folder,
               'has other labels than its plan')
        sample = np.arange(len(released))
        if not all_images:
            sample = np.sort(np.random.default_rng().permutation(sample)[:SAMPLE])
        for chosen, expected in self.made_again(sample):
            for i, image in zip(chosen, expected):
                found = images.decode(released[i], f'{folder} image {i}').permute(1, 2, 0).numpy()
                # Other hardware rounds otherwise; another image differs by ten times as much
                error = np.abs(found.astype(int) - image).mean()
                refuse(error > 2, folder,
                       f'has another image at {i} than its plan ({error:.1f})')

    def check_protections(self):
        """Refuse what made_again() refuses of a few originals, before anything is made."""
        some = np.unique(np.linspace(0, len(self.plan.image) - 1, SAMPLE).astype(int))
        for _ in self.made_again(some):
            pass

    def made_again(self, rows):
        """Protect the originals of some released images, by their numbers (n,), part by part: the
        numbers (B,) and what is made of them, encoded and decoded, uint8 (B, H, W, 3), numpy.
        Refuses a protection that hardly changes them, or that tells a hidden pixel."""
        for k in np.unique(self.plan.fold[rows]):
            protection, of_fold = self.protections[k], rows[self.plan.fold[rows] == k]
            for chosen in np.split(of_fold, range(PART, len(of_fold), PART)):
                originals = self.private.select(self.plan.image[chosen]).tensor().to(self.device)
                seeds = self.plan.seeds[chosen].to(self.device)
                protected = protection(originals, seeds)
                check_strength(protection.cfg, originals, protected)
                if method_of(protection.cfg).draws_mask:
                    check_hidden(protection, originals, seeds, protected, self.variant.release)
                yield chosen, protection.encoded(protected.cpu().numpy())


def planned_release(variant, folds, device):
    """The PlannedRelease of a Variant; InputError where its nets or its secret are not there."""
    maes = protect.load_maes(variant, folds, device)
    secret = release_secret(variant.cfg)
    return PlannedRelease(
        variant, folds[0].private, [Protection(variant.cfg, mae) for mae in maes], secret,
        plan_release(folds, secret, variant.cfg),
        release_made_from(variant.cfg, folds, maes, secret), device)


def check_strength(cfg, originals, protected):
    """Refuse a protection that hardly changes originals; both uint8 (B, H, W, 3)."""
    if cfg.reconstruct.method == 'none':
        return
    close = (originals.int() - protected.int()).abs() <= CLOSE
    unchanged = close.flatten(1).float().mean(1).cpu().median().item()
    if unchanged > UNCHANGED:
        strength = method_of(cfg).strength
        raise InputError(
            f'reconstruct.{strength} = {getattr(cfg.reconstruct, strength)} protects nothing: '
            f'{100 * unchanged:.0f} % of the grey levels stay within {CLOSE} of the original\'s: '
            'give a greater strength, or use reconstruct.method=none to compare with originals')


def check_hidden(protection, originals, seeds, protected, folder):
    """Refuse a protection that makes other images once hidden pixels are changed; originals,
    protected uint8 (B, H, W, 3)."""
    cfg = protection.cfg
    hidden = protect.hidden_patches(seeds, cfg.reconstruct.mask_ratio, cfg)
    pixels = protect.drawn(hidden, cfg.mae.patch).permute(0, 2, 3, 1)               # (B, H, W, 1)
    changed = torch.where(pixels > 0, 255 - originals, originals)
    refuse(not torch.equal(protection(changed, seeds), protected), folder,
           'would tell hidden pixels')
