"""The secret from which masks, noise, order and labels of a run's releases follow."""
import contextlib
import hashlib
import itertools
import os
import secrets
from pathlib import Path

from facekit import files, run
from facekit.config import CONFIGS
from facekit.errors import InputError
from facekit.toy import is_drawn


def release_secret(cfg):
    """The secret of a run's releases, drawn once: 32 bytes or more."""
    path = Path(cfg.reconstruct.key or Path(cfg.run.folder) / 'release.key')
    if cfg.reconstruct.key and not path.is_file():
        raise InputError(f'reconstruct.key = {path} does not exist: leave it empty to have a new '
                         'secret drawn')
    files.make_once(path, path.exists, lambda: draw_secret(path))
    secret = read_secret(path)
    if is_public(secret):
        if not is_drawn(cfg.data.root):
            raise InputError(f'reconstruct.key = {path} is known to everybody, and '
                             f'{cfg.data.root} are no drawn faces: set reconstruct.key= for a '
                             'secret of your own')
    elif path.stat().st_mode & 0o077:
        run.say(f'warning: others can read {path}, from which masks, order and labels of the '
                f'release follow: chmod 600 {path}')
    return secret


def read_secret(path):
    """The bytes of a key file, which holds 64 or more hex digits; InputError for another, and for
    one that somebody could guess."""
    try:
        secret = bytes.fromhex(path.read_text(encoding='utf-8-sig').strip())
    except OSError as error:           # whose file may hold a good secret
        raise InputError(f'{path} cannot be read ({error.strerror}): get the right to read it, or '
                         'name your copy of it in reconstruct.key') from None
    except ValueError:
        secret = b''
    if len(secret) < 32 or is_regular(secret):
        raise InputError(f'{path} holds no random secret of 64 hex digits: put the right file '
                         'back, or, if nothing was released with it, delete it to have a new one '
                         'drawn')
    return secret


def is_regular(secret):
    """Whether a secret repeats itself, counts, or has few different bytes: no random one does."""
    steps = {(b - a) % 256 for a, b in itertools.pairwise(secret)}
    parts = [secret[:n] for n in range(1, len(secret) // 2 + 1)]
    repeats = any((part * len(secret))[:len(secret)] == secret for part in parts)
    return len(set(secret)) < 16 or len(steps) < 8 or repeats


def is_public(secret):
    """Whether a secret is the toy's, which everybody has, or follows from it."""
    text = (CONFIGS / 'toy.key').read_text()
    known = bytes.fromhex(text)
    forms = known, known[::-1], bytes.fromhex(text.strip()[::-1])
    hashes = [hashlib.new(name, content).digest() for name in (
        'sha256', 'sha512', 'sha3_256', 'blake2b', 'blake2s') for content in (
        known, text.encode(), text.strip().encode())]
    return any(form in secret for form in (*forms, *hashes))


def key_of(secret):
    """The 32 bytes that keyed() has for a key; they are as secret as the secret."""
    return hashlib.sha256(secret).digest()


def which_secret(secret):
    """64 hex digits that tell one secret from another; not those that keyed() has for a key."""
    return files.digest(b'which secret: ' + secret)


def draw_secret(path):
    """Write a new secret that the user alone can read, or refuse where the old one is lost."""
    if any(path.parent.rglob('release.json')):
        raise InputError(f'{path} is missing, but releases were made with it: put it back, or '
                         'use another run.folder')
    with files.replacing(path) as file:
        with contextlib.suppress(OSError):     # file systems without rights; a warning follows
            os.fchmod(file.fileno(), 0o600)
        file.write(secrets.token_hex(32).encode() + b'\n')


def keyed(secret, *what):
    """64 bits, int, from a keyed hash of `what`: BLAKE2b with the secret as key (RFC 7693).

    Without the secret nobody can compute, nor tell from chance, one of these numbers, however many
    others he knows: that is what a keyed hash promises (a pseudorandom function). So who has one
    original and its mask, or another row's release, learns no other image's mask, place or label.
    expanded() makes the bits of one image from its number and can be inverted, but that leads to
    this image's number only.
    """
    text = '\0'.join(map(str, what)).encode(errors='surrogateescape')
    digest = hashlib.blake2b(text, key=key_of(secret), digest_size=8).digest()
    return int.from_bytes(digest, signed=True)
