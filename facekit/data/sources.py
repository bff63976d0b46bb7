"""A face data set as it lies on disk: records, a folder per person, or a list of who is who.
Nothing is decoded here."""
import os
from pathlib import Path

import numpy as np

from facekit.base.errors import InputError, quoted
from facekit.base.files import digest, open_bytes
from facekit.data.names import check_looks
from facekit.data.records import Records

DRAWN = 'drawn.sha256'    # file beside a drawn train.rec: its SHA-256


def read_lines(path):
    """The lines of a text file in UTF-8 that are not empty, each with its number."""
    try:
        text = bytes(open_bytes(path)).decode('utf-8-sig')
    except UnicodeDecodeError:
        raise InputError(f'{path} is no text in UTF-8: save it as such') from None
    return [(number, line) for number, line in enumerate(text.splitlines(), 1) if line.strip()]


def separated(line):
    """The words of a line of a list: between commas if it has any, else between tabs if it has
    any, else between blanks."""
    for mark in (',', '\t'):
        if mark in line:
            return [word.strip() for word in line.split(mark)]
    return line.split()


class RecordSource:
    """The encoded images of a record set. Records carry label numbers for names."""
    formats = 'JPEG', 'PNG'

    def __init__(self, path):
        self.records, self.passed_over = Records(path), {}
        self.path, self.data = self.records.path, self.records.data
        self.files = [self.path]
        names = self.records.labels
        beside = self.path.with_name('list.txt')
        if (names == names[0]).all() and beside.is_file():
            names = self.names_of(beside)
        names, self.labels = np.unique(names, return_inverse=True)
        self.people = names.astype(str)

    def names_of(self, path):
        """Whose image each record is, str (N,), by a list of lines `key<TAB>person/image.jpg`, as
        DCFace has it beside records that all bear one label."""
        folders = {}
        for number, line in read_lines(path):
            key, _, image = line.partition('\t')
            person = os.path.dirname(os.path.normpath(image))
            if not key.isdecimal() or not person or person.startswith(('..', os.sep)):
                raise InputError(f'{path}: line {number} is not `key<TAB>person/image.jpg`, which '
                                 'says whose image a record is: mend it')
            if key in folders:
                raise InputError(f'{path}: line {number} names its record once more: keep the '
                                 'line of the person whom it shows')
            folders[key] = person
        keys = self.records.keys.astype(str).tolist()
        if missing := [key for key in keys if key not in folders]:
            raise InputError(f'{path} has no line for record {missing[0]} of {self.path}: copy '
                             'both files again')
        names = np.array([folders[key] for key in keys])
        check_looks(np.unique(names), path)
        return names

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
        self.path, self.folder, self.files, self.passed_over = path, path, [], {}
        for folder in sorted(path.iterdir()):
            if folder.name.startswith('.') or folder.name == '__MACOSX':
                self.pass_over('hidden', folder)
            elif folder.is_symlink() or not folder.is_dir():
                self.pass_over('no folder of a person', folder)
            else:
                self.look_into(folder)
        if not self.files:
            raise InputError(f'{path}: no image ({", ".join(self.endings)}) in a sub-folder of '
                             'it: name a folder with one sub-folder per person, or a .rec file, '
                             'or a list of who is who (.txt)')
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


class ListSource(FolderSource):
    """The image files that a list names, with whose each is: lines such as `000001.jpg 2880`."""

    def __init__(self, path):
        """`passed_over` {why: paths} is which images of these folders stand in no line."""
        self.path, self.folder, self.passed_over = path, path.parent, {}
        names = {}                         # {image file: whose it is}
        for number, line in read_lines(path):
            words = separated(line)
            if len(words) != 2 or not all(words):
                raise InputError(f'{path}: line {number} is no image and its person, such as '
                                 '`000001.jpg 2880`: names with blanks need a comma between them')
            image = os.path.normpath(words[0])
            file = self.folder / image
            if os.path.isabs(image) or image.split(os.sep)[0] == '..':
                raise InputError(f'{path}: line {number} names {quoted(image)}, outside of the '
                                 'list\'s folder: put the list above all its images')
            if not os.path.isfile(file):           # False, too, for a path that no file can have
                raise InputError(f'{path}: line {number} names {quoted(str(file))}, which is not '
                                 'there: copy it there, or remove the line')
            if file in names:
                raise InputError(f'{path}: line {number} names {file} once more: remove one line')
            names[file] = words[1]
        if not names:
            raise InputError(f'{path} names no image: give lines such as `000001.jpg 2880`')
        self.files = sorted(names)
        self.people, self.labels = np.unique([names[file] for file in self.files],
                                             return_inverse=True)
        for folder in sorted({file.parent for file in self.files}):
            for file in sorted(folder.iterdir()):
                if file.suffix.lower() in self.endings and file not in names:
                    self.pass_over('in no line of the list', file)


def open_source(path):
    """The RecordSource, FolderSource or ListSource at `path`, told apart by what it holds."""
    if path.suffix == '.rec' or (path / 'train.rec').is_file():
        source = RecordSource(path)
    elif path.is_dir():
        source = FolderSource(path)
    elif path.suffix == '.txt' and path.is_file():
        source = ListSource(path)
    else:
        raise InputError(f'data set {path} {"is no .rec" if path.exists() else "does not exist"}: '
                         'set data.root to a .rec, to a folder with train.rec, or with one '
                         'sub-folder of photos a person, or to a list of who is who (.txt)')
    if not isinstance(source, RecordSource):
        check_looks(source.people, path)
    if len(source.people) < 2:
        raise InputError(f'{path} has images of one person only, {source.people[0]}: give each '
                         'image its label (DCFace keeps them in list.txt beside the .rec)')
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
