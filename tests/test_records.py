"""Records and .bin files: exact against mxnet; what is wrong is one sentence.

Damage by chance and hostile files: test_fuzz.py.
"""
import codecs
import hashlib
import itertools
import json
import os
import pickle
import resource
import struct
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from facekit.base.errors import InputError
from facekit.data import records
from facekit.data.bins import read_bin, write_bin
from facekit.data.images import encode
from facekit.data.records import EXACT, RecordHeads, Records, pack, payload, write_records
from hostile import MAGIC, Call

FIXTURE = Path(__file__).parent / 'fixtures' / 'mxnet_records'


def refused(words, do, *arguments):
    """Check that do() raises an InputError of one sentence that has all the words."""
    with pytest.raises(InputError) as error:
        do(*arguments)
    text = str(error.value)
    assert text and '\n' not in text and '. ' not in text and len(text) < 400, text
    assert all(word in text for word in words), text


def memory():
    """The most memory that this process had, KiB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def noise(seed, height=16, width=16):
    rng = np.random.default_rng(seed)
    return torch.from_numpy(rng.integers(0, 256, (3, height, width), dtype=np.uint8))


# --------------------------------------------------------------------------- records

def walk(data):
    """A reader of its own kind: record by record, [(offset, payload)]."""
    at, found = 0, []
    while at < len(data):
        start, joined, kind = at, None, None
        while kind not in (0, 3):
            magic, word = struct.unpack_from('<4sI', data, at)
            assert magic == MAGIC
            kind, length = word >> 29, word & 0x1fffffff
            part = data[at + 8:at + 8 + length]
            assert len(part) == length
            joined = part if joined is None else joined + MAGIC + part
            padding = (4 - length % 4) % 4
            assert data[at + 8 + length:at + 8 + length + padding] == bytes(padding)
            at += 8 + length + padding
        found.append((start, joined))
    return found


def raw_set(folder, payloads, keys=None):
    """Write payloads as train.rec and train.idx without write_records()."""
    rec, lines = b'', []
    for key, data in zip(keys or range(len(payloads)), payloads):
        lines.append(f'{key}\t{len(rec)}\n')
        rec += pack(data)
    (folder / 'train.rec').write_bytes(rec)
    (folder / 'train.idx').write_text(''.join(lines))
    return folder


def test_reads_and_frames_as_mxnet_does():
    """Taken apart and packed again, mxnet's file is the same, multi-part record included."""
    expected = json.loads((FIXTURE / 'expected.json').read_text())['images']
    for path in (FIXTURE, str(FIXTURE), FIXTURE / 'train.rec'):
        found = Records(path)
        assert len(found) == len(expected) == 12
        assert found.keys.dtype == found.labels.dtype == np.int64
        for key, label, image, x in zip(found.keys, found.labels, found, expected):
            assert (key, label, len(image)) == (x['key'], x['label'], x['bytes'])
            assert hashlib.sha256(image).hexdigest() == x['sha256']
    assert bytes(found[-1]) == bytes(found[11])
    with pytest.raises(IndexError):
        found[12]
    data = (FIXTURE / 'train.rec').read_bytes()
    parts = walk(data)
    assert any(MAGIC in x for _, x in parts)
    assert b''.join(pack(x) for _, x in parts) == data
    for key, (_, x) in enumerate(parts):  # payload too
        flag, label = struct.unpack_from('<If', x)
        many = list(struct.unpack_from(f'<{flag}f', x, 24))
        assert payload(many or label, key, x[24 + 4 * flag:]) == x


def hard_images():
    """Payloads with the magic at every offset of a word, at begin and end, and short ones."""
    images = [b'x', b'xyz', b'four', MAGIC, MAGIC * 2, MAGIC * 5, b'a' + MAGIC, MAGIC + b'z']
    images += [bytes([7]) * shift + MAGIC + b'tail' for shift in range(1, 9)]
    return images + [b'1234' + MAGIC + b'5678' + MAGIC + b'9', MAGIC[:2], b'abcd' + MAGIC[:3]]


def test_write_and_read(tmp_path):
    images = hard_images() + [encode(noise(0)), encode(noise(1), 'png')]
    labels = sorted(i % 5 for i in range(len(images)))
    count = write_records(tmp_path / 'new', iter(images), iter(labels), 112)
    assert count == len(images)
    found = Records(tmp_path / 'new')
    assert [bytes(x) for x in found] == images
    assert found.labels.tolist() == labels and found.keys.tolist() == list(range(1, count + 1))
    assert sorted(x.name for x in (tmp_path / 'new').iterdir()) == ['property', 'train.idx',
                                                                    'train.rec']
    assert (tmp_path / 'new' / 'property').read_text() == '5,112,112'
    parts = walk((tmp_path / 'new' / 'train.rec').read_bytes())
    assert (tmp_path / 'new' / 'train.idx').read_text() == ''.join(
        f'{key}\t{at}\n' for key, (at, _) in enumerate(parts))
    expected = [struct.pack('<IfQQ2f', 2, 0, 0, 0, count + 1, count + 6)]
    expected += [struct.pack('<IfQQ', 0, label, key, 0) + image
                 for key, (image, label) in enumerate(zip(images, labels), 1)]
    for label in range(5):
        first = labels.index(label) + 1
        expected.append(struct.pack('<IfQQ2f', 2, 0, count + 1 + label, 0, first,
                                    first + labels.count(label)))
    assert [x for _, x in parts] == expected


@pytest.mark.parametrize('images, labels', [
    ([], []), ([b'a'], [1]), ([b'a', b'b'], [0, 2]), ([b'a', b'b', b'c'], [0, 1, 0]),
    ([b'a'], [-1]), ([b'a', b'b'], [0]), ([b'a'], [0, 0]), ([b''], [0]), ([b'a'], [0.5]),
    ([b'a'], [float('nan')]), ([b'a', b'b'], [0, -1]), ([b'a'], itertools.repeat(0))])
def test_write_refuses(tmp_path, images, labels):
    refused([str(tmp_path)], write_records, tmp_path, images, labels, 112)
    assert not list(tmp_path.iterdir())


def test_more_than_a_header_can_count_is_written_as_im2rec_does(tmp_path, monkeypatch):
    """arcface_torch asks record 0 for its flag: none, so that all keys are images."""
    for count, people, fits in ((16_000_000, 777_215, True), (16_000_000, 777_216, False),
                                (42_474_558, 2_059_906, False)):
        last = range(people - 1, people)                       # stands for sorted labels
        many = type('Labels', (), {'__len__': lambda _, n=count: n,
                                       '__getitem__': last.__getitem__})
        assert records.has_header(many()) == fits
    monkeypatch.setattr(records, 'EXACT', 10)
    images, labels = [encode(noise(i)) for i in range(8)], np.arange(8) // 4
    assert write_records(tmp_path, images, labels, 112) == 8
    parts = walk((tmp_path / 'train.rec').read_bytes())
    assert [x for _, x in parts] == [struct.pack('<IfQQ', 0, i // 4, i, 0) + image
                                     for i, image in enumerate(images)]
    found = Records(tmp_path)
    assert [bytes(x) for x in found] == images and found.labels.tolist() == labels.tolist()
    assert found.keys.tolist() == list(range(8))
    refused(['labels as an array'], write_records, tmp_path, images, iter(labels), 112)


@pytest.mark.parametrize('images', [EXACT + 2, EXACT - 1])
def test_a_header_beyond_what_float32_counts_is_understood(images):
    """Glint360K's own header is such a one: 17,091,657 images."""
    keys, few = np.arange(1 + images + 3), np.int8
    heads = RecordHeads(keys, keys, np.zeros(len(keys), few), np.ones(len(keys), few),
                        np.zeros(len(keys), few), keys, np.zeros(len(keys), np.float32))
    heads.end[[0, -3, -2, -1]] = 0                              # header, identities
    heads.labels[0] = 1 + images
    assert Records._end_of_images(SimpleNamespace(path='glint'), heads) == 1 + images


@pytest.mark.parametrize('stop', ['broken', 'full disk'])
def test_failed_write_keeps_the_old_set(tmp_path, stop):
    write_records(tmp_path, [b'old'], [0], 8)

    def images():
        yield b'new' * 1000
        if stop == 'broken':
            raise KeyboardInterrupt

    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    if stop == 'full disk':         # what is buffered fails at the end
        resource.setrlimit(resource.RLIMIT_FSIZE, (1000, limits[1]))
    try:
        with pytest.raises((KeyboardInterrupt, OSError)):
            write_records(tmp_path, images(), [0], 8)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert bytes(Records(tmp_path)[0]) == b'old'
    assert len(list(tmp_path.iterdir())) == 3


def test_writing_streams(tmp_path):
    """40 MB of images pass through in memory for a few."""
    before = memory()
    images, labels = (bytes(20_000) for _ in range(2_000)), (i // 2 for i in range(2_000))
    write_records(tmp_path, images, labels, 8)
    assert memory() - before < 20_000 and len(Records(tmp_path)) == 2_000


def test_reads_im2rec_layout(tmp_path):
    """No header; keys in any order and with gaps; labels as scalars and as arrays, to the largest
    that float32 counts; lines of Windows and without the last newline."""
    keys = [7, 0, 3, 9, 10]
    payloads = [payload(5, 7, b'seven'), payload([2, 8, 9], 0, b'zero'),
                payload([1], 3, MAGIC * 2), payload(2_059_905, 9, b'nine'),
                payload(EXACT - 1, 10, b'ten')]
    text = (raw_set(tmp_path, payloads, keys) / 'train.idx').read_text()
    for variant in (text, text.rstrip(), text.replace('\n', '\r\n'), text + '\n'):
        (tmp_path / 'train.idx').write_bytes(variant.encode())
        found = Records(tmp_path)
        assert found.keys.tolist() == sorted(keys)
        assert found.labels.tolist() == [2, 1, 5, 2_059_905, EXACT - 1]
        assert [bytes(x) for x in found] == [b'zero', MAGIC * 2, b'seven', b'nine', b'ten']


ONE, TWO = payload(0, 0, b'a' * 30), payload(1, 1, b'b' * 30)
NUMBERS = float('nan'), float('inf'), -float('inf'), -1, 0.5, 3e30, EXACT


@pytest.mark.parametrize('payloads, index, words', [
    *(([ONE, payload(form, 1, b'a')], None, ['key 1 ', 'train.rec', 'label'])
      for x in NUMBERS for form in (x, [x, 0])),
    *(([payload([x, 9], 0, b''), ONE], None, ['header'])
      for x in (*NUMBERS[:3], -5, 1, 2.5, 1e30)),
    ([payload([3, 4], 0, b''), ONE], None, ['keys 1 to 2']),
    ([ONE, payload(0, 1, b'')], None, ['key 1 ', 'no image']),
    *(([ONE, TWO], index, [word]) for index, word in (
        (b'', 'empty'), (b'\n', 'lines'), (b'0\t0\n1 40\n', 'lines'), (b'0\t0\n1\n', 'lines'),
        (b'0\t0\nx\t40\n', 'lines'), (b'-1\t0\n', 'lines'), (b'0\t0\n1\t0\n', 'key 1'),
        (b'0\t0\n0\t64\n', 'key 0'), (b'0\t0\n0\t64\n', 'anew with a key for each image'),
        (b'0\t0\n1\t8\n', 'key 1'), (b'0\t0\n1\t5000\n', 'key 1'), (b'0\t0\n1\t37\n', 'key 1'),
        (b'0\t0\n1\t99999999999999999999999999\n', 'key 1')))])
def test_a_wrong_set_is_one_sentence(tmp_path, payloads, index, words):
    raw_set(tmp_path, payloads)
    if index is not None:
        (tmp_path / 'train.idx').write_bytes(index)
    refused(words, Records, tmp_path)


def test_missing_files_and_parts(tmp_path):
    for path in (tmp_path, tmp_path / 'no.rec', tmp_path / 'no'):
        refused([str(path)], Records, path)
    rec = raw_set(tmp_path, [payload(0, 0, b'1234' + MAGIC + b'5678')]) / 'train.rec'
    rec.write_bytes(rec.read_bytes()[:-12])
    refused(['key 0 lacks the part'], lambda: Records(tmp_path)[0])
    (tmp_path / 'train.idx').unlink()
    refused(['train.idx'], Records, tmp_path)
    rec.write_bytes(b'')
    refused(['empty'], Records, tmp_path)


# ------------------------------------------------------------------- verification .bin

PAIR, SAME = [encode(noise(i)) for i in range(4)], [True, False]


def bins_of_python_2():
    """Written by hand as Python 2 wrote it: byte strings, protocols 0 and 2, numpy 1 bools."""
    quoted = [codecs.escape_encode(x)[0] for x in PAIR]
    strings = b''.join(b'T' + struct.pack('<I', len(x)) + x + b'q' + bytes([i + 1])
                       for i, x in enumerate(PAIR))
    dtype = (b"cnumpy\ndtype\nq\x20(U\x02b1K\x00K\x01tq\x21Rq\x22(K\x03U\x01|NNNJ\xff\xff\xff\xff"
             b"J\xff\xff\xff\xffK\x00tb")
    scalar = b'cnumpy.core.multiarray\nscalar\nq\x23'
    bools = (scalar + dtype + b'U\x01\x01\x86Rq\x24' + b'h\x23h\x22U\x01\x00\x86R')
    return [b'((lp0\n' + b''.join(b"S'%s'\np%d\na" % (x, i + 1) for i, x in enumerate(quoted))
            + b'(lp9\nI01\naI00\natp10\n.',
            b'\x80\x02]q\x00(' + strings + b'e]q\x09(\x88\x89e\x86q\x0a.',
            b'\x80\x02]q\x00(' + strings + b'e]q\x09(' + bools + b'e\x86q\x0a.']


def test_bins_of_all_kinds_are_read(tmp_path):
    write_bin(tmp_path / 'a.bin', PAIR, np.array(SAME))
    assert pickle.loads((tmp_path / 'a.bin').read_bytes()) == (PAIR, SAME)
    assert len(list(tmp_path.iterdir())) == 1
    contents = [(tmp_path / 'a.bin').read_bytes(), *bins_of_python_2()]
    contents += [pickle.dumps((PAIR, answer), protocol) for protocol in range(5) for answer in (
        SAME, [np.bool_(x) for x in SAME], [1, 0])]                   # the last: home-made
    for content in contents:
        (tmp_path / 'a.bin').write_bytes(content)
        found, same = read_bin(str(tmp_path / 'a.bin'))
        assert found == PAIR and same.dtype == bool and same.tolist() == SAME
    for bad in ((PAIR[:3], SAME), (PAIR, [True]), ([*PAIR[:3], b''], SAME)):
        write_bin(tmp_path / 'a.bin', *bad)
        refused(['a.bin'], read_bin, tmp_path / 'a.bin')


def wrong_bins(target):
    """What is no .bin, and what a sentence names of it: calls, which leave `target` behind where
    they are made, and other contents. Absurd lengths are among hostile.py's."""
    touch, code = f'touch {target}', f'open({str(target)!r}, "w")'
    arrays = [np.frombuffer(x, 'B') for x in PAIR]
    for content, words in (
            (Call(os.system, touch), ['system', 'malicious']),
            ((PAIR, [True, Call(exec, code)]), ['exec', 'malicious']),
            ((arrays, SAME), ['tobytes'])):
        yield from ((pickle.dumps(content, protocol), words) for protocol in range(5))
    # The opcodes NEWOBJ_EX, STACK_GLOBAL, NEWOBJ and INST, which pickle.dumps() has not used
    yield b"cos\nsystem\n(S'" + touch.encode() + b"'\nt\x92.", ['system', 'malicious']
    yield b'\x80\x04\x8c\x02os\x8c\x06system\x93\x8c\x04true\x85R.', ['system', 'malicious']
    yield b'cos\nsystem\n(V' + touch.encode() + b'\nt\x81.', ['system', 'malicious']
    yield b"(S'" + touch.encode() + b"'\nios\nsystem\n.", []
    yield from ((pickle.dumps(content), []) for content in (
        1, ([], []), ([b'a'], [True]), ([b'a', b'b'], [2]), ([b'a', 'b'], [True]),
        ([b'a', b''], [True]), ([b'a', b'b'], True), ([b'a', b'b'], [[True]])))


def test_what_is_no_bin_runs_nothing_takes_no_memory_and_is_one_sentence(tmp_path):
    target, path, before = tmp_path / 'pwned', tmp_path / 'a.bin', memory()
    for content, words in wrong_bins(target):
        path.write_bytes(content)
        refused(['a.bin', *words], read_bin, path)
    assert not target.exists() and memory() - before < 100_000
