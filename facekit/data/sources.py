"""A face data set as it lies on disk: records, or a folder per person. Nothing is decoded here."""
from pathlib import Path

import numpy as np

from facekit.base.errors import InputError
from facekit.base.files import digest, open_bytes
from facekit.data.names import check_looks
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
        for folder in sorted(path.iterdir()):
            if folder.name.startswith('.') or folder.name == '__MACOSX':
                self.pass_over('hidden', folder)
            elif folder.is_symlink() or not folder.is_dir():
                self.pass_over('no folder of a person', folder)
            else:
                self.look_into(folder)
        if not self.files:
            raise InputError(f'{path}: no image ({", ".join(self.endings)}) in a sub-folder of '
                             'it: name a folder with one sub-folder per person, or a .rec file')
        self.people, self.labels = np.unique([x.parent.name for x in self.files],
                                             return_inverse=True)

    def pass_over(self, why, path):
        self.passed_over.setdefault(why, []).append(path)

    def look_into(self, folder):
        """Take the image files of a person."""
        for file in sorted(folder.iterdir()):
            if file.name.startswith('.'):
                self.pass_over('hidden', file)
            elif not file.is_file():
                self.pass_over('no file', file)
            elif file.suffix.lower() not in self.endings:
                self.pass_over(f'file that ends in {file.suffix.lower() or "nothing"}', file)
            else:
                self.files.append(file)

    def read(self, i):
        """The file of image i, bytes-like."""
        return open_bytes(self.files[i])

    def where(self, i):
        """Where image i stands, for a sentence."""
        return str(self.files[i])


def open_source(path):
    """The RecordSource or FolderSource at `path`, told apart by what it holds."""
    if path.suffix == '.rec' or (path / 'train.rec').is_file():
        source = RecordSource(path)
    elif path.is_dir():
        source = FolderSource(path)
        check_looks(source.people, path)
    else:
        raise InputError(f'data set {path} {"is no .rec" if path.exists() else "does not exist"}: '
                         'set data.root to a .rec, or to a folder with train.rec, or with one '
                         'sub-folder of photos a person')
    if len(source.people) < 2:
        raise InputError(f'{path} has images of one person only, {source.people[0]}: pack it anew '
                         'with a label for each (some sets keep theirs in a list beside the .rec)')
    return source


def fingerprint(source):
    """Hex digits that change when the source's files or labels do."""
    state = [(f.name, f.stat().st_size, f.stat().st_mtime_ns) for f in source.files]
    return digest(repr(state).encode() + source.labels.tobytes())


def is_drawn(folder):
    """Whether the record set in a folder (or its train.rec) was drawn by draw_set(), to the last
    byte."""
    folder = Path(folder).parent if Path(folder).name == 'train.rec' else Path(folder)
    try:
        return (folder / DRAWN).read_text() == digest((folder / 'train.rec').read_bytes())
    except (OSError, ValueError):
        return False
