"""insightface record sets, read and written without mxnet.

    records = Records('casia')                        # a folder with train.rec, or a .rec file
    image = decode(records[0], 'casia, image 0')      # see images.py
    write_records('out', files, labels, size=112)     # insightface trains on it as it is

The format is that of mxnet (dmlc recordio, IRHeader) and of insightface's recognition code.
A record is `<II` magic and length (29 bits; above them 0 whole, 1 first, 2 middle, 3 last part),
then the payload, padded to 4 bytes. A payload is `<IfQQ` flag, label, id, id2, then `flag` float32
labels, then the image file.
"""
import itertools
import os
import struct
from dataclasses import dataclass, fields
from pathlib import Path

import numpy as np

from facekit.base.errors import InputError
from facekit.base.files import open_bytes, replacing

MAGIC = struct.pack('<I', 0xced7230a)
LONGEST = (1 << 29) - 1  # bytes of one part of a record; also the mask of its length bits
EXACT = 1 << 24  # above it float32, in which labels and the header are kept, skips integers


def read_index(path):
    """int64 keys, ascending, and byte offsets of an .idx file of lines `key<TAB>offset`."""
    text = bytes(open_bytes(path)).rstrip() + b'\n'
    # What is left without digits tells in one comparison whether every line has its two columns
    lines, values = text.count(b'\n'), ()
    if text.translate(None, b'0123456789\r') == b'\t\n' * lines:
        values = np.fromstring(text, np.int64, sep=' ')
    if len(values) != 2 * lines:
        raise InputError(f'{path}: not all lines are `key<TAB>offset`: copy it again')
    keys, offsets = values.reshape(-1, 2).T
    order = np.argsort(keys, kind='stable')
    return keys[order], offsets[order]


@dataclass
class RecordHeads:
    """What stands before the image file in each of N records."""
    keys: np.ndarray     # int64 (N,), ascending
    begin: np.ndarray    # int64 (N,), byte at which the record begins
    image: np.ndarray    # int64 (N,), byte at which its image file begins
    end: np.ndarray      # int64 (N,), byte after the first part of the record
    part: np.ndarray     # uint32 (N,), 0 = whole record, 1 = first of several parts
    flag: np.ndarray     # int64 (N,), number of labels in the payload; 0 = one, in the head
    labels: np.ndarray   # float32 (N,), the first label

    def __getitem__(self, rows):
        """The heads of some records."""
        return RecordHeads(*(getattr(self, field.name)[rows] for field in fields(self)))

    @property
    def empty(self):
        """bool (N,): records without an image, as those of identities are."""
        return (self.part == 0) & (self.image >= self.end)


class Records:
    """The images of an insightface or im2rec record set, in ascending order of their keys.

    path: a folder that holds train.rec and train.idx, or a .rec file with its .idx beside it.
    The .rec may not be shortened while it is open. Labels may have gaps.

    .path    Path of the .rec file
    .data    its memory map
    .keys    int64 (N,), ascending
    .labels  int64 (N,), 0 .. 2**24 - 1; where a record has several labels, the first
    len(r)   N, at least 1
    r[i]     the image file of image i, bytes-like (a view of the file unless it lies in parts)

    Raises InputError for what is missing, truncated, damaged or ambiguous. All checks are made in
    bulk, because a set has millions of records.
    """

    def __init__(self, path):
        self.path = Path(path) / 'train.rec' if Path(path).is_dir() else Path(path)
        self.data = open_bytes(self.path)
        self.keys, begin = read_index(self.path.with_suffix('.idx'))
        heads = self._read_heads(begin)
        order = np.argsort(begin, kind='stable')
        shared = np.append(False, self.keys[1:] == self.keys[:-1])
        shared[order[1:]] |= heads.end[order[:-1]] > begin[order[1:]]
        self._refuse(shared, 'shares its key or its bytes with another record: pack the set anew '
                     'with a key for each image')
        if (self.keys[0], heads.flag[0], heads.end[0] - begin[0]) == (0, 2, 40):
            heads = heads[1:self._end_of_images(heads)]      # what insightface's header counts
        self._heads, self.keys = heads, heads.keys
        self._refuse(heads.empty, 'has no image: pack the set anew without it')
        labels = heads.labels
        wrong = ~((labels >= 0) & (labels < EXACT) & (labels == np.floor(labels)))
        self._refuse(wrong, f'has no label from 0 to {EXACT - 1}: pack the set anew')
        self.labels = labels.astype(np.int64)

    def _refuse(self, wrong, text):
        """InputError about the first record where wrong (N,) is true."""
        if wrong.any():
            raise InputError(f'{self.path}: key {self.keys[wrong.argmax()]} {text}')

    def _read_heads(self, begin):
        """RecordHeads at the bytes `begin`; each check makes the next access safe."""
        size, damaged = len(self.data), 'is no whole record: copy the .rec and the .idx again'
        self._refuse((begin > size - 32) | (begin % 4 > 0), damaged)
        words, at = np.frombuffer(self.data, '<u4', size // 4), begin // 4
        magic, flag = words[at], words[at + 2].astype(np.int64)
        part, length = words[at + 1] >> 29, (words[at + 1] & LONGEST).astype(np.int64)
        image, end = begin + 32 + 4 * flag, begin + 8 + length
        self._refuse((magic != int.from_bytes(MAGIC, 'little')) | (part > 1) | (end > size)
                     | (length < np.where(flag > 0, 28, 24)), damaged)
        labels = words.view('<f4')[np.where(flag > 0, at + 8, at + 3)]
        return RecordHeads(self.keys, begin, image, end, part, flag, labels)

    def _end_of_images(self, heads):
        """The key after the last image by insightface's header: there its identities begin.

        The header is a float32, which above 2**24 can be off by its spacing; then the first
        record without an image is the end.
        """
        end = heads.labels[0]
        if end >= EXACT and np.isfinite(end):
            empty = np.flatnonzero(heads.empty[1:])
            first = heads.keys[empty[0] + 1] if len(empty) else len(heads.keys)
            end = first if abs(float(first) - float(end)) <= np.spacing(end) else end
        if not 2 <= end <= len(heads.keys) or heads.keys[int(end) - 1] != int(end) - 1:
            raise InputError(f'{self.path}: the header (key 0) puts the images at keys 1 to '
                             f'{end - 1:.0f}, but the index lacks some: copy both files again')
        return int(end)

    def __len__(self):
        return len(self.keys)

    def __getitem__(self, i):
        begin, image = self._heads.begin[i], self._heads.image[i]
        if self._heads.part[i] == 0:
            return memoryview(self.data)[image:self._heads.end[i]]
        parts, at, kind = [], int(begin), 1
        while kind != 3:
            magic, word = struct.unpack('<4sI', self.data[at:at + 8].ljust(8, b'\0'))
            kind, end = word >> 29, at + 8 + (word & LONGEST)
            if magic != MAGIC or kind not in ((2, 3) if parts else (1,)) or end > len(self.data):
                raise InputError(f'{self.path}: key {self.keys[i]} lacks the part of its record '
                                 f'at byte {at}: copy the file again')
            parts.append(self.data[at + 8:end])
            at = end + (-word & 3)
        return MAGIC.join(parts)[image - begin - 8:]


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


def write_records(folder, images, labels, size):
    """Write a set in insightface's layout, or nothing: train.rec, train.idx and property.

    images: image files, an iterable of bytes, of which one is in memory at a time; labels: as many
    integers, those of identity 0 first, then 1, and so on; size: width and height in pixels.
    Returns the number of images. Without a header, see has_header(), keys are 0, 1, ... as im2rec
    writes them, and arcface_torch then reads all of them.
    """
    folder = Path(folder)
    # The files appear when they are left, train.rec last
    with (replacing(folder / 'train.rec') as rec, replacing(folder / 'train.idx') as index,
          replacing(folder / 'property') as about):
        count, identities = put_records(rec, index, images, labels, folder)
        about.write(b'%d,%d,%d' % (identities, size, size))
        for file in (rec, index, about):         # a full disk is said before the first appears
            file.flush()
            os.fsync(file.fileno())
    return count


def put_records(rec, index, images, labels, folder):
    """Write the records of a set, see write_records(), and their index; returns how many images
    and identities it has."""
    first = 1 if has_header(labels) else 0     # key of the first image
    count, starts = 0, []                      # images; key of each identity's first one

    def put(label, key, image):
        index.write(b'%d\t%d\n' % (key, rec.tell()))
        rec.write(pack(payload(label, key, image)))

    if first:
        put([0, 0], 0, b'')                    # holds the place of the header
    for image, label in itertools.zip_longest(images, labels):
        allowed = range(max(len(starts) - 1, 0), len(starts) + 1)
        if label not in allowed or image is None or not 0 < len(image) < LONGEST - 24:
            raise InputError(f'{folder}: image {count} and label {label} do not fit: give one '
                             'image file for each label, sorted by identity, counted from 0')
        if label == len(starts):
            starts.append(first + count)
        put(int(label), first + count, image)
        count += 1
    end = first + count
    if not starts or len(starts) > EXACT or (first and end + len(starts) > EXACT):
        raise InputError(f'{folder}: {count} images of {len(starts)} identities make no set: give '
                         'at least one, and labels as an array if they are many')
    if first:
        for number, bounds in enumerate(itertools.pairwise([*starts, end])):
            put(list(bounds), end + number, b'')
        rec.seek(0)
        rec.write(pack(payload([end, end + len(starts)], 0, b'')))
    return count, len(starts)


def has_header(labels):
    """Whether a set with these labels, rising from 0, begins with insightface's header: unless
    its float32 could not count their images and identities."""
    if not hasattr(labels, '__len__') or not len(labels):
        return True
    return len(labels) + labels[-1] + 2 <= EXACT
