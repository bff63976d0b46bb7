"""A face data set as it lies on disk: records, or a folder per person. Nothing is decoded here."""

from pathlib import Path

import numpy as np

from facekit.base.errors import InputError, counted
from facekit.base.files import digest, open_bytes
from facekit.data.records import Records

DRAWN = 'drawn.sha256'    # file beside a drawn train.rec: its SHA-256


class RecordSource:
    """The encoded images of a record set. Records carry label numbers for names."""
    formats = 'JPEG', 'PNG'

    def __init__(self, path):
        self.records, self.passed_over = Records(path), {}
        self.path, self.data = self.records.path, self.records.data
        self.files = [self.path]
        names, self.labels = np.unique(self.records.labels, return_inverse=True)
        self.people = names.astype(str)

    def read(self, i):
        """The file of image i, bytes-like."""
        return self.records[i]

    def where(self, i):
        """Where image i stands, for a sentence."""
        return f'{self.path} record {self.records.keys[i]}'


class FolderSource:
    """The image files of a folder with one sub-folder per person, whose name is the person's."""
    formats = 'JPEG', 'PNG', 'WEBP', 'BMP'
    endings = '.jpg', '.jpeg', '.jfif', '.png', '.webp', '.bmp'
    data = None          # each image is a file; of records it is the memory map

    def __init__(self, path):
        """`passed_over` {why: paths} is what is no image of a person."""
        self.path, self.files, self.passed_over = path, [], {}
        folders = sorted(path.iterdir()) if path.is_dir() else []
        for folder in folders:
            if why := self.reason(folder, False):
                self.passed_over.setdefault(why, []).append(folder)
                continue
            for file in sorted(folder.iterdir()):
                if why := self.reason(file, True):
                    self.passed_over.setdefault(why, []).append(file)
                else:
                    self.files.append(file)
        if not self.files:
            raise InputError(f'{path}: no image ({", ".join(self.endings)}) in a sub-folder of '
                             f'it: one sub-folder per person is expected{self.hint()}')
        self.people, self.labels = np.unique([x.parent.name for x in self.files],
                                             return_inverse=True)

    def reason(self, path, inside):
        """Why a file or folder is passed over, or ''; `inside` the folder of a person."""
        if path.name.startswith('.') or path.name == '__MACOSX':
            return 'hidden'
        if not inside:
            return ('link to a folder' if path.is_dir() and path.is_symlink() else
                    '' if path.is_dir() else 'file beside the folders of people')
        if not path.is_file():
            return 'folder inside the folder of a person' if path.is_dir() else 'no file'
        known = path.suffix.lower() in self.endings
        return '' if known else f'file that ends in {path.suffix.lower() or "nothing"}'

    def hint(self):
        """The rest of a sentence on a folder without images: what it holds instead."""
        for record in sorted(self.path.glob('*.rec')):
            return f', or records: for {record.name} name the file itself'
        for folder in self.passed_over.get('folder inside the folder of a person', []):
            return f', which {folder.parent} seems to hold: name that'
        return ' (links to folders are not followed)'

    def read(self, i):
        """The file of image i, bytes-like."""
        return open_bytes(self.files[i])

    def where(self, i):
        """Where image i stands, for a sentence."""
        return str(self.files[i])


def open_source(path):
    """The RecordSource or FolderSource at `path`, told apart by what it holds."""
    if path.suffix == '.idx':
        raise InputError(f'{path} is the index of a record set: name {path.with_suffix(".rec")}')
    if path.suffix == '.rec' or (path / 'train.rec').is_file():
        source = RecordSource(path)
    elif path.is_dir():
        source = FolderSource(path)
    elif path.is_file():
        raise InputError(f'{path} is a file, but no .rec: unpack an archive, and name a folder '
                         'with train.rec, or with one sub-folder of photos a person')
    else:
        raise InputError(f'data set {path} does not exist: set data.root to a folder with '
                         'train.rec, or with one sub-folder of photos a person')
    if len(source.people) < 2:
        raise InputError(f'{counted(len(source.labels), "image")} of {path} and all of one '
                         f'person, {source.people[0]}: pack it anew with a label for each person '
                         '(some sets keep their labels in a list beside the .rec)')
    return source


def passed_over(source):
    """Sentences that name what a source holds beside images of people, one a reason."""
    sentences = []
    for why, paths in source.passed_over.items():
        some = ', '.join(str(path.relative_to(source.path)) for path in paths[:3])
        more = ', ...' if len(paths) > 3 else ''
        sentences.append(f'{source.path}: passed over, {why}: {len(paths)} ({some}{more})')
    return sentences


def fingerprint(source):
    """Hex digits that change when one of the source's files or labels does."""
    state = [(f.name, f.stat().st_size, f.stat().st_mtime_ns) for f in source.files]
    return digest(repr(state).encode() + source.labels.tobytes())


def is_drawn(folder):
    """Whether the record set in a folder (or its train.rec) was drawn by draw_set(), to the last
    byte."""
    folder = Path(folder).parent if Path(folder).name == 'train.rec' else Path(folder)
    try:
        record, told = folder / 'train.rec', (folder / DRAWN).read_text()
        return told == digest(record.read_bytes())
    except (OSError, ValueError):
        return False
