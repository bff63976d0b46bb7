"""Files of a run: written whole or not at all, and read without running code."""
import contextlib
import errno
import hashlib
import json
import mmap
import os
import shutil
from pathlib import Path

from facekit.base.errors import InputError

LARGEST_JSON = 1 << 28       # bytes; a comparison of a hundred rows takes some MB
DEEPEST_JSON = 50            # objects and lists in one another


@contextlib.contextmanager
def replacing(path, private=False):
    """A binary file to write that takes the place of `path` once it is whole; what a killed run
    left of it is overwritten by the next. One run at a time, see process.only_writer(). Others
    than this user cannot read it if it is `private` and the file system knows rights."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = path.with_name(path.name + '.tmp')
    try:
        with open(draft, 'wb') as file:
            if private:
                with contextlib.suppress(OSError):
                    os.fchmod(file.fileno(), 0o600)
            yield file
            file.flush()
            os.fsync(file.fileno())     # a power cut shall not leave an empty file behind a name
        draft.replace(path)
    except OSError as error:            # one of write() does not name the file
        error.filename = error.filename or str(path)
        raise
    finally:
        draft.unlink(missing_ok=True)


def make_private(path):
    """Make a folder that this user alone can enter, and one of that name so, where the file system
    knows rights: it holds pictures of originals."""
    Path(path).mkdir(mode=0o700, parents=True, exist_ok=True)
    with contextlib.suppress(OSError):            # it is another user's, or there are no rights
        os.chmod(path, 0o700)


@contextlib.contextmanager
def replacing_folder(path):
    """An empty folder to fill that takes the place of the folder `path` once it is whole."""
    draft = path.with_name(path.name + '.tmp')
    shutil.rmtree(draft, ignore_errors=True)
    draft.mkdir(parents=True)
    yield draft
    shutil.rmtree(path, ignore_errors=True)
    os.sync()                           # see replacing()
    draft.rename(path)


def write_json(path, content, private=False):
    """Write numbers and plain values as JSON; `private`: see replacing()."""
    with replacing(path, private) as file:
        file.write(json.dumps(content, indent=1).encode() + b'\n')


def open_bytes(path):
    """The bytes of a file, mapped into memory; InputError if it cannot be read."""
    try:
        if not Path(path).is_file():    # to open a pipe would wait for ever
            raise ValueError('no such file')
        with open(path, 'rb') as file:
            try:
                return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
            except OSError as error:
                if error.errno == errno.ENOMEM:
                    raise
                return file.read()      # the file system maps none
    except (OSError, ValueError) as error:          # ValueError: an empty file cannot be mapped
        beside = ''
        if Path(path).suffix in ('.rec', '.idx'):
            beside = '; a .rec needs its .idx beside it'
        raise InputError(f'{str(path)!r} cannot be read ({error}): check the path, copy the file '
                         f'again{beside}') from None


def parsed(text):
    """The object in JSON text, str or bytes in UTF-8, from a file that can hold anything;
    ValueError if it is none, or is longer, deeper or has longer numbers than what we write."""
    if len(text) > LARGEST_JSON:
        raise ValueError('too long')
    try:
        content = json.loads(text, parse_int=short_number)
    except RecursionError:
        content = None
    if not isinstance(content, dict):
        raise ValueError('no object')
    level = [content]
    for _ in range(DEEPEST_JSON):
        inside = [x.values() if isinstance(x, dict) else x for x in level
                  if isinstance(x, dict | list)]
        level = [x for values in inside for x in values]
    if level:
        raise ValueError('too deep')
    return content


def short_number(digits):
    """A whole number of JSON: float() cannot take one of 400 digits."""
    if len(digits) > 25:
        raise ValueError('too long a number')
    return int(digits)


def read_json(path):
    """The object in a JSON file of a run; InputError where it is none that we could have
    written."""
    try:
        return parsed(open_bytes(path)[:LARGEST_JSON + 1])
    except ValueError:                              # an InputError is one
        raise InputError(f'{path} is missing or damaged: put it back, or delete what was made '
                         'with it') from None


def entry(mapping, key):
    """mapping[key] if it is a dict, else an empty one."""
    value = mapping.get(key)
    return value if isinstance(value, dict) else {}


def digest(content):
    """SHA-256 of bytes, 64 hex digits."""
    return hashlib.sha256(content).hexdigest()
