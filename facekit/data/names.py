"""What people are called, as the eye tells it, and whom a run folder remembers as excluded."""
import hashlib
import re
import secrets
import unicodedata
from pathlib import Path

import numpy as np

from facekit.base import files, process
from facekit.base.errors import InputError

MEMORY = 'excluded.json'      # in a run folder
SALT = 32                     # bytes
# What looks like a Latin letter, in lower case, for which the capital counts where that alone is
# alike: Cyrillic, Greek, others (a Turkish i without its dot); dashes; apostrophes
LIKE_LATIN = str.maketrans('аеорсухіјѕһԁԛԝмтнвк' 'αορνυικτχβεζημ' 'օɑɡı' '‐‑‒–—―⁃−' '’‘ʼ′`',
                           'aeopcyxijshdqwmthbk' 'aopvuiktxbezhm' 'oagi' '--------' "'''''")
# Greek capitals that look like another letter than their small ones do, if a name has no small one
LIKE_CAPITALS = str.maketrans('ΝΥ', 'NY')
SMALL_GREEK = re.compile('[α-ω]')
# What no screen shows, beside control and format characters: Unicode's "default ignorable"
INVISIBLE = re.compile('[\u034f\u115f\u1160\u17b4\u17b5\u180b-\u180f\u2065\ufe00-\ufe0f'
                       '\ufff0-\ufff8\U000e0000-\U000e0fff]')


def look_of(name):
    """A name as it looks: equal for names that differ in composition, case, width, blanks,
    invisible characters, or letters of other alphabets that look alike."""
    text = str(name).replace('´', "'").replace('\u2800', ' ')     # NFKD would make a blank of ´
    text = INVISIBLE.sub('', unicodedata.normalize('NFKD', text))
    text = ''.join(c for c in text if unicodedata.category(c) not in ('Cf', 'Cc'))
    if not SMALL_GREEK.search(text):
        text = text.translate(LIKE_CAPITALS)
    text = text.casefold().translate(LIKE_LATIN).replace('i\u0307', 'i')     # of a Turkish I
    return ' '.join(unicodedata.normalize('NFKC', text).split())


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
        return secrets.token_bytes(SALT), set()
    try:
        saved = files.read_json(path)
        salt, people = bytes.fromhex(saved['salt']), saved['people']
        if len(salt) != SALT or not people or not isinstance(people, list):
            raise ValueError('not as remember_excluded() writes it')
        if not all(re.fullmatch('[0-9a-f]{128}', person) for person in people):
            raise ValueError('no hash')
        return salt, set(people)
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
