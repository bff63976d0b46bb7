"""Verification pairs as insightface's .bin files have them, read and written.

    images, same = read_bin('lfw.bin')                # images 2i and 2i + 1 are pair i

Such a file is a pickle. Nothing that is read here can run code.
"""
import pickle

import numpy as np

from facekit.base.errors import InputError
from facekit.base.files import open_bytes, replacing


class _Bin(pickle._Unpickler):
    """Pickle without imports and calls: a global is a mere name, and three are understood.

    In pure Python, because there its opcodes can be chosen and no memo index allocates gigabytes.
    """
    dispatch = {code: pickle._Unpickler.dispatch[code] for code in
                b'(.\x80\x95IJKML\x8aN\x88\x89STUBC\x8eVX\x8c\x8d'
                b')t\x85\x86\x87]laepqr\x94ghjc\x93'}

    def find_class(self, module, name):
        if f'{module}.{name}'.replace('_core', 'core') not in (
                '_codecs.encode', 'numpy.dtype', 'numpy.core.multiarray.scalar'):
            raise InputError(f'{self.path}: names {f"{module}.{name}"!r:.60}, which no such .bin '
                             'needs: do not use it, as it may be malicious; if it holds numpy '
                             'arrays, pack it anew with image.tobytes() for each')
        return name

    def load_reduce(self):
        arguments = self.stack.pop()
        match self.stack.pop(), *arguments:
            case 'encode', str(text), 'latin1' if len(text) <= self.left:
                self.left -= len(text)  # a short file could encode one text over and over
                self.append(text.encode('latin1'))
            case 'dtype', 'b1' | b'b1', *_:
                self.append('bool')
            case 'scalar', 'bool', b'\0' | b'\1' as value:
                self.append(value == b'\1')
            case _:
                raise pickle.UnpicklingError('not an image and not a bool')

    def load_build(self):
        self.stack.pop()  # a dtype's byte order and the like, of which a bool has none

    dispatch |= {pickle.REDUCE[0]: load_reduce, pickle.BUILD[0]: load_build}


def read_bin(path):
    """The list of 2P image files (bytes) of a .bin, also of Python 2, and bool (P,): images 2i and
    2i + 1 are of the same person where element i is True. Runs no code."""
    data = open_bytes(path)
    reader = _Bin(data, encoding='bytes')
    reader.path, reader.left = path, len(data)
    try:
        images, same = reader.load()
        if {type(x) for x in same} == {int} and set(same) <= {0, 1}:       # home-made files
            same = [bool(x) for x in same]
        good = len(images) == 2 * len(same) > 0 and {type(x) for x in same} == {bool}
        good = good and all(type(x) is bytes and x for x in images)
    except InputError:
        raise
    except Exception:  # damage can make any sequence of opcodes
        good = False
    if not good:
        raise InputError(f'{path}: read to byte {data.tell()}, it is no pickle of two image files '
                         '(bytes) for each bool: copy it again or pack it anew')
    return images, np.array(same)


def write_bin(path, images, same):
    """Writes 2P image files (bytes) and P bools as read_bin reads them (pickle protocol 4)."""
    with replacing(path) as file:
        pickle.dump(([bytes(x) for x in images], [bool(x) for x in same]), file, protocol=4)
