"""Damaged and hostile files for test_fuzz.py: mutations of sound ones, and some made by hand.

Each function *_files writes sound files into `folder` and returns those to damage (path, content,
what makes check sums right again), the hostile ones (path, content or what makes it), and what
reads them. `evil` is an object whose pickle is a call that leaves a trace.
"""
import io
import json
import os
import pickle
import re
import struct
import zipfile
import zlib
from pathlib import Path

import numpy as np
import onnx
import torch
from PIL import Image

import models
from facekit.base import config
from facekit.base.files import read_json
from facekit.data import bins, images, records, toy
from facekit.data.faces import load
from facekit.data.pairs import read_pairs
from facekit.nets.weights import recogniser

ROOT = Path(__file__).parent.parent
MANY = 10 ** 5
MAGIC = b'\x0a\x23\xd7\xce'
HEADS = re.compile(re.escape(MAGIC) + rb'|\xff[\xc0-\xfe]|PK[\1\3\5]')
ABSURD = [struct.pack(form, number) for form, numbers in (
    ('>H', (0, 1, 0x7fff, 0xffff)), ('<I', (0, 0x1fffffff, 0x7fffffff, 0xfffffff0, 0xffffffff)),
    ('>I', (0, 0xffff, 0x7fffffff, 0xffffffff)), ('<Q', (1 << 40, 1 << 63, (1 << 64) - 1)))
    for number in numbers]
WORDS = [b'-1', b'0', b'99999999999999999999', b'9' * 5000, b'0x_', b'0x' + b'f' * 5000, b'1e999',
         b'.nan', b'~', b'[', b'[[x]]', b'{', b'}', b'&a ', b'*a', b'<<: *a', b'"\\ud800"',
         b'"\\0"', b'!!timestamp x', b'!!bool x', b'!!int ""', b'!!python/name:os.system', b'1:1',
         b'2001-99-99', b'0001-01-01 00:00:00+23:59', b'\t', b'\r', b'\n', b'\xff', b"'", b'#']
# What can stand where a file is expected: opening a pipe waits, /proc/self/mem fails when it is
# read, the last is a terabyte that takes no space
SPECIAL = [os.mkfifo, os.mkdir, Path.touch, lambda path: path.symlink_to(path.name),
           *(lambda path, to=to: path.symlink_to(to) for to in (
               '.', '..', 'nowhere', '/', '/dev/zero', '/proc/self/mem')),
           lambda path: path.touch() or os.truncate(path, 1 << 40)]


class Call:
    """Pickles as a call, which a careless reader makes, and attributes for its result."""

    def __init__(self, function, *arguments, state=None):
        self.call = (function, arguments, state)[:3 if state else 2]

    def __reduce__(self):
        return self.call


def mutated(content, chance):
    """Bytes with one or a few damages, half of them just behind a marker or magic number."""
    content = bytearray(content)
    heads = [m.start() for m in HEADS.finditer(content)]
    values = WORDS if content.isascii() else ABSURD
    for _ in range(chance.choice((1, 1, 2, 3))):
        at, other = (chance.randrange(len(content) + 1) for _ in 'ab')
        if heads and chance.random() < 0.5:
            at = min(chance.choice(heads) + chance.randrange(40), len(content))
        length, value = chance.choice((1, 4, 60, 1000)), chance.choice(values)
        match chance.randrange(10):
            case 0:
                del content[at:]
            case 1 | 2 | 3 | 4 if at < len(content):
                content[at] ^= 1 << chance.randrange(8)
            case 5 | 6:
                content[at:at + chance.choice((0, len(value)))] = value
            case 7:
                del content[at:at + length]
            case 8:
                content[at:at] = chance.randbytes(length)
            case 9:
                content[at:at + length] = content[other:other + length]
    return bytes(content)


def faces(count, form='jpeg'):
    return [images.encode(x, form) for x in toy.draw(np.arange(count), np.arange(count), 16)]


def record_files(folder, evil):
    # A comment with the magic at every offset of a word makes a record of several parts
    comment = b'\xff\xfe' + struct.pack('>H', 42) + (MAGIC + b'\0') * 8
    files = [x[:2] + comment + x[2:] for x in faces(4)] + faces(4, 'png')
    records.write_records(folder, files, [0, 0, 0, 1, 1, 2, 2, 2], 16)
    rec, index = folder / 'train.rec', folder / 'train.idx'
    lines = [b'0\t-4', b'0\t' + b'9' * MANY, b'9' * MANY + b'\t0', b'1\r2\t3\n\t4', b'\t\n',
             b'0\t0\n' * MANY, b'\0' * MANY, b'0\t0' + b'\r' * MANY]

    def read():
        found = records.Records(rec)
        for i in range(len(found)):
            images.decode(found[i], f'{rec} record {i}')
    return ([(path, path.read_bytes(), None) for path in (rec, rec, index)],
            [(index, x) for x in lines + SPECIAL] + [(rec, x) for x in SPECIAL], read)


def bin_files(folder, evil):
    path, pair = folder / 'pairs.bin', faces(4)
    sound = [pickle.dumps((pair, same), protocol) for protocol in range(5)
             for same in ([True, False], [np.bool_(True), np.bool_(False)])]
    hostile = [pickle.dumps(x, protocol) for protocol in range(5) for x in (
        evil, (pair, [True, evil]), (pair, []), Call(bytearray, 1 << 40), {'a': 1})]
    hostile += [b']' * MANY + b'a' * MANY + b'.', b'(' * MANY + b'.', b'L' + b'9' * MANY,
                b'N' + b'q\0h\0' * MANY + b'.', b'Np%d\n.' % 10 ** 12, b'P1\n.',
                b'cnumpy\ndtype\n(Vevil\ntR.', b'cnumpy\ndtype\n(VO8\nI0\nI1\ntR.',
                b'c_codecs\nencode\n(Vabc\nVrot13\ntR.', b'\x80\x02\x82\x01.',
                *(b'\x80\x04' + op + struct.pack('<Q', 1 << 34) + b'abc' for op in (
                    b'\x8e', b'\x8d', b'\x96', b'\x95')), b'\x80\x04Nr\xff\xff\xff\x3f.',
                *(op + b'\xff\xff\xff\x7fabc' for op in (b'\x80\x04B', b'T', b'X', b'\x8b')),
                b'X' + struct.pack('<I', 1 << 20) + b'a' * (1 << 20) + b'q\0'
                + b'c_codecs\nencode\nq\1h\0X\6\0\0\0latin1\x86R' * 1000 + b'.', *SPECIAL]

    def read():
        for i, image in enumerate(bins.read_bin(path)[0]):
            images.decode(image, f'{path} image {i}')
    return [(path, x, None) for x in sound], [(path, x) for x in hostile], read


def chunk(kind, body):
    return struct.pack('>I', len(body)) + kind + body + struct.pack('>I', zlib.crc32(kind + body))


PIXELS = zlib.compress(bytes(17 * 16))


def png(*chunks, width=16, height=16, pixels=PIXELS):
    head = chunk(b'IHDR', struct.pack('>IIBBBBB', width, height, 8, 0, 0, 0, 0))
    return b''.join([b'\x89PNG\r\n\x1a\n', head, *chunks, chunk(b'IDAT', pixels),
                     chunk(b'IEND', b'')])


def with_sums(content):
    """A PNG whose chunks have the right check sums, so that their damage is looked at."""
    at = 8
    while at + 12 <= len(content):
        end = at + 8 + struct.unpack_from('>I', content, at)[0]
        content = content[:end] + struct.pack('>I', zlib.crc32(content[at + 4:end])) + content[
            end + 4:]
        at = end + 4
    return content


def image_files(folder, evil):
    path, bomb = folder / 'face.jpg', zlib.compress(bytes(1 << 27), 1)
    large = png(width=13000, height=13000, pixels=zlib.compress(bytes(13001 * 13000), 1))
    file = io.BytesIO()
    Image.new('L', (4000, 4000)).save(file, 'JPEG', progressive=True)
    begin, scan = re.fullmatch(rb'(.*(\xff\xda.*))\xff\xd9', file.getvalue(), re.DOTALL).groups()
    hostile = [png(width=60000, height=60000), png(width=1 << 31, height=1), png(width=0), large,
               png()[:33] + large[8:], png(pixels=bomb), png(chunk(b'zTXt', b'a\0\0' + bomb)),
               png(chunk(b'iTXt', b'a\0\1\0\0\0' + bomb)), png(chunk(b'iCCP', b'a\0\0' + bomb)),
               begin + scan * 20000 + b'\xff\xd9', b'\xff\xd8' + b'\xff' * MANY, b'']
    jpegs, pngs = faces(2), faces(2, 'png')
    turned = b'Exif\0\0MM\0*\0\0\0\x08\0\1\1\x12\0\3\0\0\0\1\0\6\0\0'
    for mode in ('RGB', 'L', 'CMYK', 'P', 'LA', '1', 'I;16'):
        file, form = io.BytesIO(), 'JPEG' if mode in ('RGB', 'L', 'CMYK') else 'PNG'
        image = Image.open(io.BytesIO(jpegs[0])).convert('L').convert(mode)
        image.save(file, form, **({'progressive': True, 'exif': turned} if form == 'JPEG' else {}))
        (jpegs if form == 'JPEG' else pngs).append(file.getvalue())
    for x in jpegs:
        at = re.search(rb'\xff[\xc0-\xc2]', x).start() + 5
        hostile.append(x[:at] + struct.pack('>HH', 60000, 60000) + x[at + 4:])
    return ([(path, x, None) for x in jpegs + pngs] + [(path, x, with_sums) for x in pngs],
            [(path, x) for x in hostile], lambda: images.decode(path.read_bytes(), path))


def yaml_files(folder, evil):
    path, sound = folder / 'run.yaml', (ROOT / 'tests' / 'tiny.yaml').read_bytes()
    hostile = ['run: &a [*a]', '[' * MANY, '{a: ' * MANY, '- ' * MANY,
               'base: run.yaml', 'base: .', 'base: /dev/zero', 'base: /proc/self/mem',
               'base: ' + 'a' * 300, 'base: "\\0"', 'mae: {lr: 1' + '0' * 400 + '}',
               'run: {seed: 0x' + 'f' * 5000 + '}', 'run: {seed: ' + '1:' * MANY + '1}',
               'run: {folder: "a\\0b"}', 'run: {folder: "\\ud800"}', 'run: {folder: "a\\nb"}',
               'data: {release_folds: [x]}', 'fr: {margin_warmup: [0.1]}', 'compare: {a: [[[]]]}',
               'a: [' + '1,' * (MANY // 3) + ']', 'a: ' + 'b' * MANY, '? [a]\n: b', '!!set {a}',
               '!!python/object/apply:os.system [touch x]', 'compare_seeds: [x]',
               *(f'run: {{seed: {word.decode("latin1")}}}' for word in WORDS)]

    def read():
        list(config.variants(config.namespace(config.resolve(path)), compare=True))
    return ([(path, sound, None)],
            [(path, x.encode()) for x in hostile] + [(path, x) for x in SPECIAL], read)


def saved(state, **options):
    """What torch.save writes."""
    file = io.BytesIO()
    torch.save(state, file, **options)
    return file.getvalue()


def zipped(entries, how=zipfile.ZIP_STORED):
    """A zip file of {name: content}, with the right check sums."""
    file = io.BytesIO()
    with zipfile.ZipFile(file, 'w', how) as archive:
        for name, content in entries.items():
            archive.writestr(name, content)
    return file.getvalue()


def unzipped(content):
    """{name: content} of a zip file."""
    with zipfile.ZipFile(io.BytesIO(content)) as archive:
        return {name: archive.read(name) for name in archive.namelist()}


def bombs():
    """{what: a checkpoint of some KB that would take far more memory, or that torch and Python's
    zipfile read otherwise}."""
    sound = saved({'a': torch.ones(1000)})
    entries = unzipped(sound)
    old = saved({'a': torch.ones(1)}, _use_new_zipfile_serialization=False)
    return {'packed': zipped({**entries, 'archive/data/1': bytes(1 << 24)}, zipfile.ZIP_DEFLATED),
            'one name twice': zipped({**entries, 'archive/DATA/0': b''}),
            'old form': old, 'old form before a zip file': old + sound}


def lies():
    """{what: a checkpoint that torch.load reads, or refuses, with a tensor that the file does not
    hold}."""
    one = torch.ones(1)
    tensors = {'compressed rows': torch.eye(4).to_sparse_csr(),
               'compressed blocks': torch.eye(4).to_sparse_bsr((2, 2)),
               'conjugate': torch.ones(4, dtype=torch.cfloat).conj(),
               'jagged': torch.nested.nested_tensor([one, torch.ones(2)], layout=torch.jagged),
               'nested': torch.nested.nested_tensor([one, torch.ones(2)]),
               'expanded': one.expand(1 << 34), 'overlapping': torch.ones(999).unfold(0, 500, 1),
               'sparse': torch.sparse_coo_tensor(torch.zeros(1, 1), one, [1 << 34],
                                                 check_invariants=True),
               'meta': torch.ones(1 << 34, device='meta')}
    entries, length = unzipped(saved({'a': torch.ones(1000)})), b'M\xe8\x03'
    pickled = entries['archive/data.pkl']
    assert pickled.count(length) == 2                 # 1,000: of the storage, and of the tensor
    wrong = {'larger storage': pickled.replace(length, b'M\xff\xff'),
             'larger tensor': b'M\xff\xff'.join(pickled.rsplit(length, 1))}
    return {what: saved({'a': tensor}) for what, tensor in tensors.items()} | {
        what: zipped({**entries, 'archive/data.pkl': x}) for what, x in wrong.items()}


def checkpoint_files(folder, evil):
    path, net = folder / 'net.pt', models.IResNet((1, 1, 1, 1), 2, 16, 4).state_dict()
    state = {'net': net, 'step': 3, 'steps': 3, 'images': '', 'config': {'data': {'size': 16}}}
    entries = unzipped(saved(state))

    def with_pickle(content, how=zipfile.ZIP_STORED):
        return zipped({**entries, 'archive/data.pkl': content}, how)

    bomb = with_pickle(b'0' * (1 << 20), zipfile.ZIP_DEFLATED)
    bomb = bomb.replace(struct.pack('<I', 1 << 20), b'\xf0\xff\xff\xff')
    pickles = [pickle.dumps(evil, 2), pickle.dumps({'net': {'fc.weight': evil}}, 2),
               pickle.dumps(Call(bytearray, 1 << 40), 2),
               b'\x80\x02' + b']' * MANY + b'a' * (MANY - 1) + b'.', b'\x80\x02}' + b'(' * MANY]
    parts = [{**state, **x} for x in (
        {'step': 'a'}, {'step': [1], 'steps': None}, {'step': torch.zeros(3)}, {'config': 3},
        {'config': {}}, *({'config': {'data': {'size': x}}} for x in (
            'a', None, 0, -5, 1 << 62, float('inf'), float('nan'), 35200)))]
    fc, one = net['fc.weight'], torch.zeros(1)           # which can claim to be terabytes
    parts += [{**state, 'net': {**net, **x}} for x in (
        {'fc.weight': one.expand(1 << 34, 16), 'fc.bias': one.expand(1 << 34),
         **{k: one.expand(1 << 34) for k in net if 'features.' in k and net[k].ndim}},
        {'fc.weight': fc.to('meta')}, {'fc.weight': fc.to_sparse()}, {'fc.weight': fc.cfloat()},
        *({'fc.weight': wrong} for wrong in (fc[0], fc[0, 0], 3, fc * np.nan)),
        {'bn2.weight': torch.zeros(0)}, {1: fc}, {'a\n' * 9999: fc}, {'layer1.': fc})]
    parts += [{'net': 3}, {1: fc}, [net], 3, {}, {'net': []}, {'net': {'net': net}}]
    return ([(path, saved(state), None), (path, entries['archive/data.pkl'], with_pickle)],
            [(path, x) for x in (*map(with_pickle, pickles), *pickles, *map(saved, parts),
                                 *SPECIAL, *bombs().values(), *lies().values(), bomb)],
            lambda: recogniser(path, torch.device('cpu')))


def photos_in(folder):
    """A folder of two people, and a config."""
    root = folder / 'faces'
    for i, image in enumerate(faces(6)):
        (root / f'{i % 2}').mkdir(parents=True, exist_ok=True)
        (root / f'{i % 2}' / f'{i}.jpg').write_bytes(image)
    return root, config.namespace(config.resolve(ROOT / 'tests' / 'tiny.yaml', [
        'data.size=16', 'toy.identities=0', f'run.folder={folder}/run']))


def look_files(folder, evil):
    root, cfg = photos_in(folder)
    path = load(root, cfg).look
    content = path.read_bytes()
    entries = unzipped(content)
    parts = [{**entries, 'hashes.npy': x} for x in (b'', pickle.dumps(evil), entries['mark.npy'])]
    file = io.BytesIO()
    np.savez(file, mark=evil, hashes=evil, small_greys=evil, skipped=evil)
    return ([(path, content, None)], [(path, x) for x in (
        b'', pickle.dumps(evil), file.getvalue(), zipped({}), *map(zipped, parts),
        *(x for x in SPECIAL if x is not os.mkdir))],
        lambda: load(root, cfg))


def pairs_files(folder, evil):
    for i, image in enumerate(faces(4)):
        (folder / f'p{i}').mkdir()
        (folder / f'p{i}' / f'p{i}_0001.jpg').write_bytes(image)
    a, b = 'p0/p0_0001.jpg', 'p1/p1_0001.jpg'
    lfw, listed = folder / 'pairs.txt', folder / 'list.txt'
    lists = [f'{a} {b} 0\n{a} {a} 1\n' * 5, f'{a}, {b}, False\n{b}, {b}, True\n' * 5]
    lines = ['/', '', ' ', '..', 'p0', '\0', 'a' * 5000, '\ud800', '*', '[', '-1', '9' * 5000]
    hostile = [(lfw, f'10\n{name}\t1\t2\n') for name in lines]
    hostile += [(lfw, f'10\np0\t{number}\tp1\t1\n') for number in lines]
    hostile += [(listed, f'{name} {b} 1\n') for name in lines]
    hostile += [(listed, f'{name}, {b}, {same}\n') for name in lines for same in (0, 'yes')]
    readers = {lfw: folder, listed: listed}

    def read():
        for path in readers:
            if path.exists() or path.is_symlink():
                read_pairs(readers[path])
    return ([(listed, x.encode(), None) for x in lists]
            + [(lfw, b'10\t2\np0\t1\tp1\t1\np0\t1\t1\n', None)],
            [(path, x.encode(errors='surrogatepass')) for path, x in hostile]
            + [(path, x) for path in readers for x in SPECIAL if x is not os.mkdir], read)


def onnx_files(folder, evil):
    h, path = onnx.helper, folder / 'net.onnx'
    form = [h.make_tensor_value_info(name, onnx.TensorProto.FLOAT, shape)
            for name, shape in (('input', ('n', 3, 16, 16)), ('out', ('n', 4)))]
    weight = onnx.numpy_helper.from_array(np.ones((768, 4), np.float32), 'weight')
    graph = h.make_graph([h.make_node('Flatten', ['input'], ['flat']),
                          h.make_node('MatMul', ['flat', 'weight'], ['out'])],
                         'net', form[:1], form[1:], [weight])
    model = h.make_model(graph, opset_imports=[h.make_opsetid('', 17)], ir_version=8)
    sound = model.SerializeToString()
    for name in ('/etc/passwd', '../../faces', str(folder)):           # weights in other files
        graph.initializer[0].ClearField('raw_data')
        graph.initializer[0].data_location = onnx.TensorProto.EXTERNAL
        graph.initializer[0].external_data.add(key='location', value=name)
    return ([(path, sound, None)], [(path, x) for x in (
        model.SerializeToString(), pickle.dumps(evil), b'\x0a' + b'\xff' * MANY, *SPECIAL)],
        lambda: recogniser(path, torch.device('cpu')))


def json_files(folder, evil):
    path, deep = folder / 'release.json', MANY
    sound = json.dumps({'made_from': {'set of images': 'abc', 'data.size': '32'},
                        'rows': [1, 2.5, None], 'names': {'José': [True, 'x'] * 9}}).encode()
    hostile = (b'', b'{', b'[]', b'3', b'null', b'"a"', b'\xff\xfe{}', b'{"a": \xe9}',
               '{}'.encode('utf-16'), b'{"a": ' + b'9' * 400 + b'}', b'[' * deep, b'{"a":' * deep,
               b'{"a":' * 200 + b'1' + b'}' * 200, b'{"a": ' + b'[' * 60 + b']' * 60 + b'}',
               b'{"a": ' + b'[' * deep + b']' * deep + b'}')

    def read():
        found = read_json(path)
        float(sum(x for x in found.values() if isinstance(x, int)))    # of 400 digits: it fails
    return [(path, sound, None)], [(path, x) for x in (*hostile, *SPECIAL)], read


def folder_files(folder, evil):
    root, cfg = photos_in(folder)
    photo = root / '0' / '0.jpg'
    return ([(photo, photo.read_bytes(), None)],
            [(path, x) for path in (photo, root / '0' / 'new\n.png', root / 'new.jpg',
                                    root / 'train.rec', root / 'train.idx') for x in SPECIAL],
            lambda: load(root, cfg))
