"""What people are called, as the eye tells it, and whom a run folder remembers as excluded."""
import hashlib
import secrets
import unicodedata
from pathlib import Path

import numpy as np

from facekit.base import files, process
from facekit.base.errors import InputError

MEMORY = 'excluded.json'      # in a run folder
# Letters that look like a Latin one, once they are lower case: Cyrillic, Greek, dashes,
# apostrophes, a Turkish i without its dot; what is dropped is the dot that a Turkish I keeps
LIKE_LATIN = str.maketrans('аеорсухіјѕһԁԛԝмтнвк' 'αορνυικτχ' '‐‑‒–—−' '’ʼı', 'aeopcyxijshdqwmthbk'
                           'aopvuiktx' '------' "''i", '\u0307')


def look_of(name):
    """A name as it looks: equal for names that differ in composition, case, width, blanks,
    invisible characters, or letters of other alphabets that look alike."""
    text = unicodedata.normalize('NFKC', unicodedata.normalize('NFKC', str(name)).casefold())
    text = ''.join(c for c in text if unicodedata.category(c) not in ('Cf', 'Cc'))
    return ' '.join(text.translate(LIKE_LATIN).split())


def looks_of(names):
    """look_of() of names (P,), str array alike."""
    return np.array([look_of(name) for name in names], str)


def check_looks(names, path):
    """Refuse names (P,) of one set of which two look alike: they may be one person, of whom a part
    would stay in when the other is excluded."""
    first = {}
    for name in map(str, names):
        if (other := first.setdefault(look_of(name), name)) != name:
            raise InputError(f'{path} has {other!r} and {name!r}, which look alike: give them '
                             'one name if they are one person, else rename one')


def remembered(folder):
    """The salt of a run folder's memory, bytes, and the hashes of who was ever excluded there, a
    set of texts; InputError if the file is damaged."""
    path = Path(folder, MEMORY)
    if not path.exists():
        return secrets.token_bytes(32), set()
    try:
        saved = files.read_json(path)
        return bytes.fromhex(saved['salt']), set(saved['people'])
    except (KeyError, TypeError, ValueError):      # of read_json(), too; a file can hold anything
        raise InputError(f'{path}, which remembers who was excluded, is damaged: put a copy back, '
                         'or delete it and name everybody in data.exclude again') from None


def hashed_look(look, salt):
    """The text by which a run folder remembers a name."""
    return hashlib.blake2b(look.encode(errors='surrogateescape'), key=salt).hexdigest()


def excluded_people(people, cfg):
    """Who of people (P,) is excluded, bool (P,): by data.exclude, or by an earlier command in the
    run folder."""
    named = {look_of(name) for name in cfg.data.exclude}
    salt, hashes = remembered(cfg.run.folder)
    if not named and not hashes:       # of millions of people each look takes its time
        return np.zeros(len(people), bool)
    return np.array([look in named or hashed_look(look, salt) in hashes
                     for look in looks_of(people)], bool)


def remember_excluded(cfg):
    """Keep in the run folder who is excluded, as keyed hashes, so that no later command with a
    shorter list releases them; all processes call it."""
    def write():
        with process.only_writer(path):
            salt, hashes = remembered(cfg.run.folder)
            new = {hashed_look(look_of(name), salt) for name in cfg.data.exclude}
            if not new <= hashes:
                files.write_json(path, {'salt': salt.hex(), 'people': sorted(hashes | new)},
                                 private=True)

    path = Path(cfg.run.folder, MEMORY)
    if cfg.data.exclude:
        process.on_rank_0(write)
