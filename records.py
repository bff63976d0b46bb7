"""Face data on disk: insightface records, verification .bin files and folders, read and written.

    records = Records('casia')                        # a folder with train.rec, or a .rec file
    image = decode(records[0], 'casia, image 0')      # uint8 RGB, (3, height, width)
    write_records('out', files, labels, size=112)     # insightface trains on it as it is
    images, same = read_bin('lfw.bin')                # images 2i and 2i + 1 are pair i

The formats are those of mxnet (dmlc recordio, IRHeader) and of insightface's recognition code.
A record is `<II` magic and length (29 bits; above them 0 whole, 1 first, 2 middle, 3 last part),
then the payload, padded to 4 bytes. A payload is `<IfQQ` flag, label, id, id2, then `flag` float32
labels, then the image file. Nothing that is read here can run code.
"""
import contextlib
import io
import itertools
import mmap
import pickle
import re
import struct
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torchvision.io import ImageReadMode, decode_image, encode_jpeg, encode_png

MAGIC = struct.pack('<I', 0xced7230a)
LONGEST = (1 << 29) - 1  # bytes of one part of a record; also the mask of its length bits
EXACT = 1 << 24  # above it float32, in which labels and the header are kept, skips integers
MAX_PIXELS = 16 << 20  # a few bytes can promise an image of any size


class InputError(ValueError):
    """A wrong input: one sentence that names what, where and the remedy."""


def open_bytes(path):
    """The bytes of a file, mapped into memory; InputError if it cannot be read."""
    try:
        if not Path(path).is_file():  # to open a pipe would wait for ever
            raise ValueError('no such file')
        with open(path, 'rb') as file:
            return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    except (OSError, ValueError) as error:  # ValueError: an empty file cannot be mapped
        raise InputError(f'{str(path)!r} cannot be read ({error}): check the path, copy the file '
                         'again; a .rec needs its .idx beside it') from None


def _read_index(path):
    """int64 keys, ascending, and byte offsets of an .idx file of lines `key<TAB>offset`."""
    text = bytes(open_bytes(path)).rstrip() + b'\n'
    lines = text.count(b'\n')
    values = ()
    # What is left without digits tells in one comparison whether every line has its two columns.
    if text.translate(None, b'0123456789\r') == b'\t\n' * lines:
        values = np.fromstring(text, np.int64, sep=' ')
    if len(values) != 2 * lines:
        wrong = (number for number, line in enumerate(text.split(b'\n'), 1)
                 if not re.fullmatch(rb'\d+\t\d+\r?', line))
        raise InputError(f'{path}: line {next(wrong)} is not `key<TAB>offset`: copy it again')
    keys, offsets = values.reshape(-1, 2).T
    order = np.argsort(keys, kind='stable')
    return keys[order], offsets[order]


class Records:
    """The images of an insightface or im2rec record set, in ascending order of their keys.

    path: a folder that holds train.rec and train.idx, or a .rec file with its .idx beside it.
    The .rec may not be shortened while it is open. Labels may have gaps.

    .path    Path of the .rec file
    .keys    int64 (N,), ascending
    .labels  int64 (N,), 0 .. 2**24 - 1; where a record has several labels, the first
    len(r)   N, at least 1
    r[i]     the image file of image i, bytes-like (a view of the file unless it lies in parts)

    Raises InputError, naming file and key, for what is missing, truncated, damaged or ambiguous.
    """

    def __init__(self, path):
        self.path = Path(path) / 'train.rec' if Path(path).is_dir() else Path(path)
        self._data = open_bytes(self.path)
        keys, offsets = _read_index(self.path.with_suffix('.idx'))

        def refuse(wrong, text):
            if wrong.any():
                i = wrong.argmax()
                raise InputError(f'{self.path}: key {keys[i]} at byte {offsets[i]} {text}')

        # In bulk, because a set has millions of records. Each check makes the next access safe.
        size = len(self._data)
        refuse((offsets > size - 32) | (offsets % 4 > 0),
               f'can be no record of these {size} bytes: copy the .rec and the .idx again')
        words = np.frombuffer(self._data, '<u4', size // 4)
        at = offsets // 4
        magic, flag = words[at], words[at + 2].astype(np.int64)
        part, length = words[at + 1] >> 29, (words[at + 1] & LONGEST).astype(np.int64)
        image, end = offsets + 32 + 4 * flag, offsets + 8 + length
        refuse((magic != int.from_bytes(MAGIC, 'little')) | (part > 1) | (end > size)
               | (length < np.where(flag > 0, 28, 24)),
               'is no whole record: copy the .rec and the .idx again')
        order = np.argsort(offsets, kind='stable')
        shared = np.append(False, keys[1:] == keys[:-1])
        shared[order[1:]] |= end[order[:-1]] > offsets[order[1:]]
        refuse(shared, 'shares its key or its bytes with another record: copy the .idx again')
        labels = words.view('<f4')[np.where(flag > 0, at + 8, at + 3)]

        if (keys[0], flag[0], length[0]) == (0, 2, 32):  # insightface's header
            first = labels[0]  # the key where the identity records begin, behind the images
            if not 2 <= first <= len(keys) or keys[int(first) - 1] != first - 1:
                raise InputError(f'{self.path}: the header (key 0) puts the images at keys 1 to '
                                 f'{first - 1}, but the index lacks some: copy both files again')
            keys, labels, offsets, image, end, part = (
                x[1:int(first)] for x in (keys, labels, offsets, image, end, part))
        refuse((part == 0) & (image >= end), 'has no image: pack the file anew without it')
        wrong = ~((labels >= 0) & (labels < EXACT) & (labels == np.floor(labels)))
        refuse(wrong, f'has the label {labels[wrong][:1]}, but labels are integers from 0 to '
               f'{EXACT - 1}: pack the file anew')
        self.keys, self.labels = keys, labels.astype(np.int64)
        self._begin, self._image, self._end, self._part = offsets, image, end, part

    def __len__(self):
        return len(self.keys)

    def __getitem__(self, i):
        if self._part[i] == 0:
            return memoryview(self._data)[self._image[i]:self._end[i]]
        parts, at, kind = [], int(self._begin[i]), 1
        while kind != 3:
            magic, word = struct.unpack('<4sI', self._data[at:at + 8].ljust(8, b'\0'))
            kind, begin, end = word >> 29, at + 8, at + 8 + (word & LONGEST)
            expected = (2, 3) if parts else (1,)
            if magic != MAGIC or kind not in expected or end > len(self._data):
                raise InputError(f'{self.path}: key {self.keys[i]} lacks the part of its record '
                                 f'at byte {at}: copy the file again')
            parts.append(self._data[begin:end])
            at = end + (-word & 3)
        return MAGIC.join(parts)[self._image[i] - self._begin[i] - 8:]


def payload(label, key, image):
    """The bytes of one record: its label (or a list of labels), its key, its image file."""
    many = label if isinstance(label, list) else []
    head = struct.pack('<IfQQ', len(many), 0 if many else label, key, 0)
    return head + struct.pack(f'<{len(many)}f', *many) + image


def pack(data):
    """Frames a payload (under 2**29 bytes) as dmlc recordio does: split at aligned magic words."""
    parts, begin, at = [], 0, data.find(MAGIC)
    while at >= 0:
        if at % 4 == 0:
            parts.append(data[begin:at])
            begin = at + 4
        at = data.find(MAGIC, at + 1)
    parts.append(data[begin:])
    kinds = [1] + [2] * (len(parts) - 2) + [3] if len(parts) > 1 else [0]
    return b''.join(MAGIC + struct.pack('<I', kind << 29 | len(x)) + x + bytes(-len(x) % 4)
                    for kind, x in zip(kinds, parts))


@contextlib.contextmanager
def _replacing(path):
    """A file to write that takes the place of `path` once it is whole."""
    draft = path.with_name(path.name + '.tmp')
    try:
        with open(draft, 'wb') as file:
            yield file
        draft.replace(path)
    finally:
        draft.unlink(missing_ok=True)


def write_records(folder, images, labels, size):
    """Writes train.rec, train.idx and property in insightface's layout; returns their number.

    images: iterable of image files (bytes), `size` pixels wide and high; labels: iterable of as
    many integers, those of identity 0 first, then 1, and so on. Memory does not grow with the set.
    Raises InputError for other labels, no images, or more than float32 keys can count.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    starts = []  # the key of each identity's first image
    with (_replacing(folder / 'train.rec') as rec,  # renamed last, and with it the set is there
          _replacing(folder / 'train.idx') as index,
          _replacing(folder / 'property') as about):

        def put(label, key, image):
            index.write(b'%d\t%d\n' % (key, rec.tell()))
            rec.write(pack(payload(label, key, image)))

        put([0, 0], 0, b'')  # holds the place of the header, whose numbers are known at the end
        end = 1
        for image, label in itertools.zip_longest(images, labels):
            length = len(image or b'')
            allowed = range(max(len(starts) - 1, 0), len(starts) + 1)
            if not 0 < length < LONGEST - 24 or label not in allowed:
                raise InputError(f'{folder}: image {end - 1} ({length} bytes) has label '
                                 f'{label} after {len(starts)} identities: give one image file '
                                 'for each label, sorted by identity, counted from 0')
            if label == len(starts):
                starts.append(end)
            put(int(label), end, image)
            end += 1
        if not starts or end + len(starts) > EXACT:
            raise InputError(f'{folder}: {end - 1} images of {len(starts)} identities do not make '
                             'a set: give at least one, and in sum less than 16777216')
        for number, bounds in enumerate(itertools.pairwise([*starts, end])):
            put(list(bounds), end + number, b'')
        rec.seek(0)
        rec.write(pack(payload([end, end + len(starts)], 0, b'')))
        about.write(b'%d,%d,%d' % (len(starts), size, size))
    return end - 1


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
                             'needs, so that the file may be malicious: do not use it')
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
    """Reads insightface's verification pairs: list of 2P image files (bytes), bool (P,).

    Images 2i and 2i + 1 are of the same person where element i is True. The file is a pickle
    (images, same), also of Python 2; it runs no code. Raises InputError for anything else.
    """
    data = open_bytes(path)
    reader = _Bin(data, encoding='bytes')
    reader.path, reader.left = path, len(data)
    try:
        images, same = reader.load()
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
    images, same = [bytes(x) for x in images], [bool(x) for x in same]
    if len(images) != 2 * len(same) or not all(images):
        raise InputError(f'{path}: {len(images)} images (none may be empty) do not make '
                         f'{len(same)} pairs: give two for each')
    with _replacing(Path(path)) as file:
        pickle.dump((images, same), file, protocol=4)


def image_size(data, where='image'):
    """(height, width) in pixels that a JPEG or PNG file (bytes-like) names in its header.

    As stored, before an EXIF orientation is applied. Raises InputError, naming `where`, for other
    formats, damage and more than 16 megapixels. (PIL takes longer for it than a face to decode.)
    """
    size, at = (0, 0), 2
    if data[:8] == b'\x89PNG\r\n\x1a\n' and len(data) >= 24:
        size = struct.unpack_from('>II', data, 16)[::-1]
    while data[:2] == b'\xff\xd8' and at + 9 <= len(data):
        mark, marker, length = struct.unpack_from('>BBH', data, at)
        if mark != 0xff or marker < 0xc0 or 0xd0 <= marker <= 0xda:
            break  # damage, or pixels without a frame
        if marker <= 0xcf and marker not in (0xc4, 0xc8, 0xcc):  # a frame, of any coding
            size = struct.unpack_from('>HH', data, at + 5)
            break
        at += 1 if marker == 0xff else 2 + length
    if not 0 < size[0] * size[1] <= MAX_PIXELS or len(data) > 8 * MAX_PIXELS:
        raise InputError(f'{where}: no JPEG or PNG of 1 to {MAX_PIXELS} pixels (its header says '
                         f'{size[0]} x {size[1]}): convert, copy or remove the image')
    return size


def decode(data, where):
    """uint8 RGB (3, height, width) of a JPEG or PNG file (bytes-like).

    A JPEG's EXIF orientation is applied; grey, palette, alpha and 16 bit become 8-bit RGB. Threads
    decode at once. Raises InputError, naming `where`, for damage and for what image_size refuses.
    """
    size = image_size(data, where)
    try:
        if data[0] == 0xff:
            if bytes(data).count(b'\xff\xda') > 500:  # scans: there are ten or so, each takes long
                raise ValueError('too many scans')
            return decode_image(torch.from_numpy(np.frombuffer(data, np.uint8).copy()),
                                ImageReadMode.RGB, apply_exif_orientation=True)
        image = Image.open(io.BytesIO(data), formats=['PNG'])  # torchvision's crashes on damage
        if image.size != size[::-1]:
            raise ValueError('two headers')
        if image.mode.startswith('I'):
            image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
        return torch.from_numpy(np.array(image.convert('RGB'))).permute(2, 0, 1).contiguous()
    except Exception as error:  # PIL raises of many kinds
        raise InputError(f'{where}: damaged or cut off ({type(error).__name__} in decoding): copy '
                         'or remove the image') from None


def encode(image, form='jpeg', quality=95):
    """The file (bytes, no metadata) of a uint8 image (3, H, W); quality 1..100 is of 'jpeg'."""
    if form not in ('jpeg', 'png') or not 1 <= quality <= 100:
        raise InputError(f'no image format {form!r}, {quality}: give png, or jpeg with 1..100')
    file = encode_jpeg(image, quality) if form == 'jpeg' else encode_png(image)
    return file.numpy().tobytes()


def face_folders(path):
    """Lists a folder per identity: image paths and int64 labels (N,), both in order of name.

    Labels count the sub-folders with .jpg, .jpeg or .png, but no links; InputError if none has.
    """
    files = [x for x in sorted(Path(path).glob('*/*')) if x.is_file()
             and x.suffix.lower() in ('.jpg', '.jpeg', '.png') and not x.parent.is_symlink()]
    if not files:
        raise InputError(f'{path}: no .jpg, .jpeg or .png in a sub-folder of it: one sub-folder '
                         'per person is expected (links to folders are not followed)')
    return files, np.unique([x.parent.name for x in files], return_inverse=True)[1]
