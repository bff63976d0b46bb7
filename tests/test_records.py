"""Records, .bin files, images and folders: exact against mxnet, safe against hostile files."""
import codecs
import hashlib
import io
import itertools
import json
import pickle
import re
import resource
import shutil
import struct
import time
import zlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from facekit import records
from facekit.errors import InputError
from facekit.sources import FolderSource
from facekit.images import decode, encode
from facekit.bins import read_bin, write_bin
from facekit.records import RecordHeads, Records, RecordWriter, pack, payload, write_records

FIXTURE = Path(__file__).parent / 'fixtures' / 'mxnet_records'
MAGIC = b'\x0a\x23\xd7\xce'


def one_sentence(error):
    text = str(error.value if hasattr(error, 'value') else error)
    assert text and '\n' not in text and '. ' not in text and len(text) < 400, text
    return text


def noise(seed, height=16, width=16):
    rng = np.random.default_rng(seed)
    return torch.from_numpy(rng.integers(0, 256, (3, height, width), dtype=np.uint8))


def pillow(array, form='PNG', mode=None, **options):
    image = Image.fromarray(array)
    file = io.BytesIO()
    (image.convert(mode) if mode else image).save(file, form, **options)
    return file.getvalue()


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
    """Writes payloads as train.rec and train.idx without write_records."""
    folder.mkdir(parents=True, exist_ok=True)
    rec, lines = b'', []
    for number, data in enumerate(payloads):
        key = number if keys is None else keys[number]
        lines.append(f'{key}\t{len(rec)}\n')
        rec += pack(data)
    (folder / 'train.rec').write_bytes(rec)
    (folder / 'train.idx').write_text(''.join(lines))
    return folder


def test_reads_what_mxnet_wrote():
    expected = json.loads((FIXTURE / 'expected.json').read_text())['images']
    for path in (FIXTURE, str(FIXTURE), FIXTURE / 'train.rec'):
        found = Records(path)
        assert len(found) == len(expected) == 12
        assert found.keys.dtype == found.labels.dtype == np.int64
        assert found.keys.tolist() == [x['key'] for x in expected]
        assert found.labels.tolist() == [x['label'] for x in expected]
        for i, x in enumerate(expected):
            assert len(found[i]) == x['bytes']
            assert hashlib.sha256(found[i]).hexdigest() == x['sha256']
    assert bytes(found[-1]) == bytes(found[11])
    with pytest.raises(IndexError):
        found[12]


def test_frames_as_mxnet_does():
    """Taken apart and packed again, mxnet's file is the same, multi-part record included."""
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
    images += [b'1234' + MAGIC + b'5678' + MAGIC + b'9', MAGIC[:2], b'abcd' + MAGIC[:3]]
    return images


def test_write_and_read(tmp_path):
    images = hard_images() + [encode(noise(0)), encode(noise(1), 'png')]
    labels = sorted(i % 5 for i in range(len(images)))
    count = write_records(tmp_path / 'new', iter(images), iter(labels), 112)
    assert count == len(images)
    found = Records(tmp_path / 'new')
    assert [bytes(x) for x in found] == images
    assert found.labels.tolist() == labels
    assert found.keys.tolist() == list(range(1, count + 1))
    assert sorted(x.name for x in (tmp_path / 'new').iterdir()) == ['property', 'train.idx',
                                                                    'train.rec']
    assert (tmp_path / 'new' / 'property').read_text() == '5,112,112'

    parts = walk((tmp_path / 'new' / 'train.rec').read_bytes())
    lines = (tmp_path / 'new' / 'train.idx').read_text().splitlines()
    assert [x.split('\t') for x in lines] == [[str(k), str(at)] for k, (at, _) in enumerate(parts)]
    header = struct.pack('<IfQQ2f', 2, 0, 0, 0, count + 1, count + 6)
    assert parts[0][1] == header
    for key, (image, label) in enumerate(zip(images, labels), 1):
        assert parts[key][1] == struct.pack('<IfQQ', 0, label, key, 0) + image
    for label in range(5):
        first, stop = labels.index(label) + 1, labels.index(label) + labels.count(label) + 1
        key = count + 1 + label
        assert parts[key][1] == struct.pack('<IfQQ2f', 2, 0, key, 0, first, stop)


@pytest.mark.parametrize('images, labels', [
    ([], []), ([b'a'], [1]), ([b'a', b'b'], [0, 2]), ([b'a', b'b', b'c'], [0, 1, 0]),
    ([b'a'], [-1]), ([b'a', b'b'], [0]), ([b'a'], [0, 0]), ([b''], [0]), ([b'a'], [0.5]),
    ([b'a'], [float('nan')]), ([b'a', b'b'], [0, -1])])
def test_write_refuses(tmp_path, images, labels):
    with pytest.raises(InputError) as error:
        write_records(tmp_path, images, labels, 112)
    assert str(tmp_path) in one_sentence(error)
    assert not list(tmp_path.iterdir())


def test_more_than_a_header_can_count_is_written_as_im2rec_does(tmp_path, monkeypatch):
    """arcface_torch asks record 0 for its flag: none, so that all keys are images."""
    for count, people, fits in ((16_000_000, 777_215, True), (16_000_000, 777_216, False),
                                (42_474_558, 2_059_906, False)):
        last = range(people - 1, people)                       # stands for sorted labels
        many = type('Labels', (), {'__len__': lambda _: count, '__getitem__': last.__getitem__})
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


def test_labels_of_two_million_people_are_exact(tmp_path):
    labels = np.arange(records.EXACT)
    assert np.array_equal(labels.astype('<f4').astype(np.int64), labels)
    last, data, index = [2_059_904, 2_059_905, 16_777_215], b'', ''
    for key, label in enumerate(last):
        index += f'{key}\t{len(data)}\n'
        data += records.pack(records.payload(label, key, b'image'))
    (tmp_path / 'train.rec').write_bytes(data)
    (tmp_path / 'train.idx').write_text(index)
    assert Records(tmp_path).labels.tolist() == last


def test_failed_write_keeps_the_old_set(tmp_path):
    write_records(tmp_path, [b'old'], [0], 8)

    def broken():
        yield b'new'
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_records(tmp_path, broken(), itertools.repeat(0), 8)
    assert bytes(Records(tmp_path)[0]) == b'old'
    assert len(list(tmp_path.iterdir())) == 3


@pytest.mark.parametrize('header', [True, False])
def test_a_killed_writer_is_continued_to_the_same_bytes(tmp_path, monkeypatch, header):
    """Wherever the two drafts end: within a record, a line, the identities, one before the other,
    as files of a machine that lost power do."""
    monkeypatch.setattr(records, 'EXACT', 1000 if header else 20)
    images = hard_images() + [bytes([i]) * (1 + 7 * i) for i in range(9)]
    labels = np.arange(len(images)) // 4
    write_records(tmp_path / 'whole', images, labels, 8)
    whole = {p.name: p.read_bytes() for p in (tmp_path / 'whole').iterdir()}
    assert records.has_header(labels) == header
    draft, continued = tmp_path / 'draft', set()
    with RecordWriter(draft, labels, 8) as writer:
        writer.add(images)
    rec, index = (path.read_bytes() for path in writer.drafts)
    for seed in range(300):
        ends = np.random.default_rng(seed).integers(0, [len(rec) + 1, len(index) + 1])
        rec_end, index_end = ends if seed else (len(rec), len(index))
        shutil.rmtree(draft)
        draft.mkdir()
        writer.drafts[0].write_bytes(rec[:rec_end])
        writer.drafts[1].write_bytes(index[:index_end])
        with RecordWriter(draft, labels, 8, block=5) as again:
            assert again.count % 5 == 0 or again.count == len(images)
            continued.add(again.count)
            again.add(images[again.count:])
            again.finish()
        assert {p.name: p.read_bytes() for p in draft.iterdir()} == whole
    assert {0, 5, 10, 15, 20, len(images)} <= continued
    (draft / 'train.rec').rename(writer.drafts[0])              # killed while finish() renames
    with RecordWriter(draft, labels, 8, block=5) as again:
        assert again.count >= len(images) - 5
        again.add(images[again.count:])
        again.finish()
    assert {p.name: p.read_bytes() for p in draft.iterdir()} == whole


def test_writing_streams(tmp_path):
    """40 MB of images pass through in memory for a few."""
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    images, labels = (bytes(20_000) for _ in range(2_000)), (i // 2 for i in range(2_000))
    write_records(tmp_path, images, labels, 8)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 20_000  # KiB
    assert len(Records(tmp_path)) == 2_000


def test_im2rec_layout(tmp_path):
    """No header, keys from 0 in any order and with gaps, labels as scalars and as arrays."""
    keys = [7, 0, 3, 9]
    payloads = [payload(5, 7, b'seven'), payload([2, 8, 9], 0, b'zero'),
                payload([1], 3, MAGIC * 2), payload(2, 9, b'nine')]
    found = Records(raw_set(tmp_path, payloads, keys))
    assert found.keys.tolist() == [0, 3, 7, 9]
    assert found.labels.tolist() == [2, 1, 5, 2]
    assert [bytes(x) for x in found] == [b'zero', MAGIC * 2, b'seven', b'nine']


def test_index_of_windows_and_without_last_newline(tmp_path):
    raw_set(tmp_path, [payload(0, 0, b'a'), payload(1, 1, b'b')])
    text = (tmp_path / 'train.idx').read_text()
    for variant in (text.rstrip(), text.replace('\n', '\r\n'), text + '\n'):
        (tmp_path / 'train.idx').write_bytes(variant.encode())
        assert Records(tmp_path).labels.tolist() == [0, 1]


@pytest.mark.parametrize('label', [float('nan'), float('inf'), -float('inf'), -1, 0.5, 3e30,
                                   2**24])
def test_bad_labels(tmp_path, label):
    for form in (label, [label, 0]):
        with pytest.raises(InputError) as error:
            Records(raw_set(tmp_path, [payload(0, 0, b'a'), payload(form, 1, b'b')]))
        text = one_sentence(error)
        assert 'key 1 ' in text and 'train.rec' in text and 'label' in text


@pytest.mark.parametrize('index, word', [
    (b'', 'empty'), (b'\n', 'line 1'), (b'0\t0\n1 40\n', 'line 2'), (b'0\t0\n1\n', 'line 2'),
    (b'0\t0\nx\t40\n', 'line 2'), (b'-1\t0\n', 'line 1'), (b'0\t0\n0\t36\n', 'key 0'),
    (b'0\t0\n1\t0\n', 'key 1'), (b'0\t0\n1\t8\n', 'key 1'), (b'0\t0\n1\t5000\n', 'key 1'),
    (b'0\t0\n1\t99999999999999999999999999\n', 'key 1'), (b'0\t0\n1\t37\n', 'key 1')])
def test_bad_index(tmp_path, index, word):
    raw_set(tmp_path, [payload(0, 0, b'a' * 30), payload(1, 1, b'b' * 30)])
    (tmp_path / 'train.idx').write_bytes(index)
    with pytest.raises(InputError) as error:
        Records(tmp_path)
    assert word in one_sentence(error)


def test_missing_files(tmp_path):
    for path in (tmp_path, tmp_path / 'no.rec', tmp_path / 'no'):
        with pytest.raises(InputError) as error:
            Records(path)
        assert str(path) in one_sentence(error)
    write_records(tmp_path, [b'a'], [0], 8)
    (tmp_path / 'train.idx').unlink()
    with pytest.raises(InputError, match='train.idx'):
        Records(tmp_path)
    (tmp_path / 'train.rec').write_bytes(b'')
    with pytest.raises(InputError, match='empty'):
        Records(tmp_path)


def test_header_that_promises_more_than_the_index_has(tmp_path):
    write_records(tmp_path, [b'a', b'b', b'c'], [0, 0, 1], 8)
    lines = (tmp_path / 'train.idx').read_text().splitlines(True)
    (tmp_path / 'train.idx').write_text(''.join(lines[:2] + lines[3:]))
    with pytest.raises(InputError, match='keys 1 to 3'):
        Records(tmp_path)
    for first in (float('nan'), float('inf'), -5, 1, 2.5, 1e30):
        raw_set(tmp_path, [payload([first, 9], 0, b''), payload(0, 1, b'a')])
        with pytest.raises(InputError):
            Records(tmp_path)


def test_record_without_image_or_with_a_missing_part(tmp_path):
    with pytest.raises(InputError, match='key 1 .*no image'):
        Records(raw_set(tmp_path, [payload(0, 0, b'a'), payload(0, 1, b'')]))
    raw_set(tmp_path, [payload(0, 0, b'1234' + MAGIC + b'5678')])
    rec = tmp_path / 'train.rec'
    rec.write_bytes(rec.read_bytes()[:-12])
    with pytest.raises(InputError, match='key 0 lacks the part'):
        Records(tmp_path)[0]


def test_opening_reads_in_bulk(tmp_path):
    """100,000 records open in well under a second: nothing is done per record in Python."""
    count = 100_000
    write_records(tmp_path, itertools.repeat(b'image', count), np.arange(count) // 10, 8)
    begin = time.perf_counter()
    found = Records(tmp_path)
    assert time.perf_counter() - begin < 2  # measured: 0.03 s
    assert len(found) == count and found.labels[-1] == count // 10 - 1


# Verification .bin

def pairs():
    return [encode(noise(i)) for i in range(4)], [True, False]


@pytest.mark.parametrize('protocol', range(5))
def test_bin_protocols(tmp_path, protocol):
    images, same = pairs()
    for answer in (same, [np.bool_(x) for x in same]):
        (tmp_path / 'a.bin').write_bytes(pickle.dumps((images, answer), protocol))
        found, labels = read_bin(tmp_path / 'a.bin')
        assert found == images
        assert labels.dtype == bool and labels.tolist() == same


def test_bin_of_python_2(tmp_path):
    """Written by hand as Python 2 wrote it: byte strings, protocols 0 and 2, numpy 1 bools."""
    images, same = pairs()
    quoted = [codecs.escape_encode(x)[0] for x in images]
    protocol0 = (b'((lp0\n' + b''.join(b"S'%s'\np%d\na" % (x, i + 1) for i, x in enumerate(quoted))
                 + b'(lp9\nI01\naI00\natp10\n.')
    strings = b''.join(b'T' + struct.pack('<I', len(x)) + x + b'q' + bytes([i + 1])
                       for i, x in enumerate(images))
    protocol2 = b'\x80\x02]q\x00(' + strings + b'e]q\x09(\x88\x89e\x86q\x0a.'
    dtype = (b"cnumpy\ndtype\nq\x20(U\x02b1K\x00K\x01tq\x21Rq\x22(K\x03U\x01|NNNJ\xff\xff\xff\xff"
             b"J\xff\xff\xff\xffK\x00tb")
    scalar = b'cnumpy.core.multiarray\nscalar\nq\x23'
    bools = (scalar + dtype + b'U\x01\x01\x86Rq\x24' + b'h\x23h\x22U\x01\x00\x86R')
    numpy1 = b'\x80\x02]q\x00(' + strings + b'e]q\x09(' + bools + b'e\x86q\x0a.'
    for data in (protocol0, protocol2, numpy1):
        (tmp_path / 'old.bin').write_bytes(data)
        found, labels = read_bin(tmp_path / 'old.bin')
        assert found == images and labels.tolist() == same


def test_bin_round_trip(tmp_path):
    images, same = pairs()
    write_bin(tmp_path / 'a.bin', images, np.array(same))
    assert pickle.loads((tmp_path / 'a.bin').read_bytes()) == (images, same)
    assert read_bin(str(tmp_path / 'a.bin'))[0] == images
    assert len(list(tmp_path.iterdir())) == 1
    for bad in ((images[:3], same), (images, [True]), ([*images[:3], b''], same)):
        with pytest.raises(InputError) as error:
            write_bin(tmp_path / 'a.bin', *bad)
        assert 'a.bin' in one_sentence(error)


class Call:
    def __init__(self, function, *arguments):
        self.call = function, arguments

    def __reduce__(self):
        return self.call


def evil_bins(target):
    import builtins
    import os
    images, same = pairs()
    touch = f"open({str(target)!r}, 'w').write('x')"
    for protocol in range(5):
        yield pickle.dumps(Call(os.system, f'touch {target}'), protocol)
        nested = Call(builtins.eval, touch)
        yield pickle.dumps((images + [[nested]], same), protocol)
        yield pickle.dumps((images, [True, Call(builtins.exec, touch)]), protocol)
        yield pickle.dumps((images, Call(getattr, 'text', 'join')), protocol)
    yield b"(S'touch " + str(target).encode() + b"'\nios\nsystem\n."
    yield b'cbuiltins\neval\n(V' + touch.encode() + b'\nt\x81.'
    yield b"cos\nsystem\n(S'touch " + str(target).encode() + b"'\nt\x92."
    yield b'\x80\x04\x8c\x02os\x8c\x06system\x93\x8c\x04true\x85R.'
    yield b'cnumpy\ndtype\n(Vevil\ntR.'
    yield b'cnumpy\ndtype\n(VO8\nI0\nI1\ntR.'
    yield b'c_codecs\nencode\n(Vabc\nVrot13\ntR.'
    yield b'cbuiltins\ngetattr\n.'
    yield b'P1\n.'
    yield b'\x80\x02\x82\x01.'


def test_malicious_bin_runs_nothing(tmp_path):
    target, path = tmp_path / 'pwned', tmp_path / 'evil.bin'
    named = 0
    for data in evil_bins(target):
        path.write_bytes(data)
        with pytest.raises(InputError) as error:
            read_bin(path)
        text = one_sentence(error)
        assert 'evil.bin' in text
        named += bool('malicious' in text and re.search('system|eval|exec|getattr', text))
    assert named > 20
    assert not target.exists()


def test_bin_with_absurd_lengths_allocates_nothing(tmp_path):
    path, huge = tmp_path / 'a.bin', struct.pack('<Q', 1 << 34)
    text = b'X' + struct.pack('<I', 1 << 20) + b'a' * (1 << 20) + b'q\0'
    again = b'c_codecs\nencode\nq\1h\0X\6\0\0\0latin1\x86R'
    cases = [b'\x80\x04' + op + huge + b'abc' for op in (b'\x8e', b'\x8d', b'\x96', b'\x95')]
    cases += [b'\x80\x04B\xff\xff\xff\xffabc', b'T\xff\xff\xff\x7fabc', b'X\xff\xff\xff\xffabc']
    cases += [b'\x80\x04Nr\xff\xff\xff\x3f.', b'Np1000000000\n.', b'\x8b\xff\xff\xff\x7f1']
    cases += [text + again * 1000 + b'.', b'(' * 100_000, b']' * 100_000 + b'a' * 99_999 + b'.']
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for data in cases:
        path.write_bytes(data)
        with pytest.raises(InputError) as error:
            read_bin(path)
        one_sentence(error)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 100_000  # KiB


@pytest.mark.parametrize('content', [
    None, 1, [], ([], []), ([b'a'], [True]), ([b'a', b'b'], [2]), ([b'a', 'b'], [True]),
    ([b'a', b''], [True]), (b'ab', [True]), ([b'a', b'b'], True), ([b'a', b'b'], [True], 1),
    ([[b'a'], b'b'], [True]), ([b'a', b'b'], [[True]])])
def test_bin_of_wrong_content(tmp_path, content):
    (tmp_path / 'a.bin').write_bytes(pickle.dumps(content))
    with pytest.raises(InputError) as error:
        read_bin(tmp_path / 'a.bin')
    assert 'a.bin' in one_sentence(error)


# Images

def test_grey_palette_alpha_and_16_bit_become_rgb(tmp_path):
    rng = np.random.default_rng(3)
    colour = rng.integers(0, 256, (20, 30, 3), dtype=np.uint8)
    grey = colour[..., 0]
    deep = grey.astype(np.uint16) * 256 + 17
    files = [pillow(grey), pillow(colour), pillow(colour, mode='RGBA'), pillow(colour, mode='LA'),
             pillow(colour, mode='P'), pillow(deep), pillow(grey, 'JPEG'), pillow(colour, 'JPEG'),
             pillow(colour, 'JPEG', mode='CMYK'), pillow(colour, 'JPEG', progressive=True)]
    write_records(tmp_path, files, itertools.repeat(0, len(files)), 30)
    for i, data in enumerate(Records(tmp_path)):
        image = decode(data, f'image {i}')
        assert image.dtype == torch.uint8 and image.shape == (3, 20, 30)
    for data, expected in ((files[0], grey), (files[5], grey)):
        assert (decode(data, 'x').numpy() == expected).all()
    assert (decode(files[1], 'x').numpy() == colour.transpose(2, 0, 1)).all()


def test_encode_and_decode():
    image = noise(5, 112, 112)
    assert torch.equal(decode(encode(image, 'png'), 'x'), image)
    smooth = torch.nn.functional.interpolate(noise(5, 4, 4)[None].float(), 112, mode='bicubic')
    smooth = smooth[0].clamp(0, 255).byte()
    coarse, fine = ((decode(encode(smooth, quality=q), 'x').float() - smooth).abs().mean()
                    for q in (50, 95))
    assert fine < coarse and fine < 4
    assert b'Exif' not in encode(image) and encode(image) == encode(image)
    for bad in (('gif', 95), ('jpeg', 0), ('jpeg', 101)):
        with pytest.raises(InputError) as error:
            encode(image, *bad)
        assert str(bad[0]) in one_sentence(error)


def test_exif_orientation_is_applied():
    array = np.zeros((16, 32, 3), np.uint8)
    exif = Image.Exif()
    exif[0x112] = 6
    data = pillow(array, 'JPEG', exif=exif)
    assert decode(data, 'x').shape == (3, 32, 16)


def png_header(height, width):
    body = b'IHDR' + struct.pack('>IIBBBBB', width, height, 8, 2, 0, 0, 0)
    crc = struct.pack('>I', zlib.crc32(body))
    return b'\x89PNG\r\n\x1a\n' + struct.pack('>I', 13) + body + crc


def test_pixel_bombs_are_refused_by_their_header():
    jpeg = pillow(np.zeros((8, 8, 3), np.uint8), 'JPEG')
    at = jpeg.index(b'\xff\xc0') + 5
    big_jpeg = jpeg[:at] + struct.pack('>HH', 60000, 60000) + jpeg[at + 4:]
    filled = jpeg[:2] + b'\xff' * 7 + jpeg[2:]  # fill bytes before a marker are legal
    assert decode(filled, 'x').shape == (3, 8, 8)
    begin = time.perf_counter()
    for data in (png_header(60000, 60000), png_header(2**31 - 1, 1), png_header(0, 5), big_jpeg):
        with pytest.raises(InputError) as error:
            decode(data, 'photo.png')
        assert 'photo.png' in one_sentence(error)
    assert time.perf_counter() - begin < 1


def test_truncated_and_foreign_images_are_refused():
    jpeg, png = encode(noise(1, 112, 112)), encode(noise(1, 112, 112), 'png')
    for data in (jpeg, png):
        for length in (0, 1, 2, 3, 10, 24, 100, 300, len(data) // 2, len(data) - 40):
            with pytest.raises(InputError) as error:
                decode(data[:length], 'image 7')
            assert 'image 7' in one_sentence(error)
    for length in (len(jpeg) - 2, len(jpeg) - 1):
        with pytest.raises(InputError):
            decode(jpeg[:length], 'image 7')
    with pytest.raises(InputError):  # what a sparse copy leaves
        decode(jpeg[:2000] + bytes(len(jpeg) - 2000), 'image 7')
    for form in ('GIF', 'BMP', 'WEBP'):
        with pytest.raises(InputError):
            decode(pillow(np.zeros((8, 8, 3), np.uint8), form), 'image 7')
    with pytest.raises(InputError):
        decode(b'GIF89a' + bytes(100), 'image 7')


def test_decoding_in_threads_is_the_same():
    files = [encode(noise(i, 40, 40)) for i in range(50)]
    with ThreadPoolExecutor(4) as pool:
        together = list(pool.map(lambda x: decode(x, 'x'), files))
    assert all(torch.equal(a, decode(x, 'x')) for a, x in zip(together, files))


def test_face_folders(tmp_path):
    for name in ('b/2.jpg', 'b/10.JPEG', 'a/1.png', 'a/notes.txt', 'c/readme.md', 'd/1.jpg',
                 'x.jpg'):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(b'x')
    (tmp_path / 'a' / 'loop').symlink_to(tmp_path)
    (tmp_path / 'link').symlink_to(tmp_path / 'a')
    source = FolderSource(tmp_path)
    names = [x.relative_to(tmp_path).as_posix() for x in source.files]
    assert names == ['a/1.png', 'b/10.JPEG', 'b/2.jpg', 'd/1.jpg']
    assert source.labels.tolist() == [0, 1, 1, 2] and source.people.tolist() == ['a', 'b', 'd']
    (tmp_path / 'flat').mkdir()
    (tmp_path / 'flat' / '1.jpg').write_bytes(b'x')
    for path in (tmp_path / 'flat', tmp_path / 'nothing', tmp_path / 'x.jpg'):
        with pytest.raises(InputError) as error:
            FolderSource(path)
        assert 'one sub-folder per person' in one_sentence(error)


# Damage

def use(path):
    """Reads all of a set or .bin and decodes what can be decoded; counts what was refused."""
    if path.suffix == '.bin':
        return read_bin(path)[0]
    found = Records(path)
    for i in range(len(found)):
        try:
            decode(found[i], f'{path}, image {i}')
        except InputError as error:
            one_sentence(error)
    return found


def test_damaged_files_give_one_sentence(tmp_path):
    """Cuts and bit flips, 320 in all: success or InputError, nothing else, in bounded memory."""
    for name in ('train.rec', 'train.idx'):
        shutil.copy(FIXTURE / name, tmp_path)
    bins = [tmp_path / f'{p}.bin' for p in (0, 2, 4)]
    images, same = pairs()
    for path in bins:
        path.write_bytes(pickle.dumps((images, [np.bool_(x) for x in same]), int(path.stem)))
    rec, idx = tmp_path / 'train.rec', tmp_path / 'train.idx'
    rng = np.random.default_rng(0)
    heads = [at for at, _ in walk(rec.read_bytes())]
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    refused = 0
    for case in range(320):
        path = (rec, idx, *bins)[case % 5]
        sound = path.read_bytes()
        data = bytearray(sound)
        if case % 3 == 0:
            del data[rng.integers(len(data)):]
        for _ in range(1 + case % 4):
            at = int(rng.integers(max(len(data), 1)))
            if path == rec and case % 2:  # headers are few among the image bytes: aim at them
                at = int(rng.choice(heads) + rng.integers(36))
            if at < len(data):
                data[at] ^= 1 << int(rng.integers(8))
        path.write_bytes(data)
        try:
            use(rec if path == idx else path)
        except InputError as error:
            refused += 1
            one_sentence(error)
        path.write_bytes(sound)
    assert refused > 150
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 300_000  # KiB


def test_damaged_images_give_one_sentence():
    rng = np.random.default_rng(1)
    exif = Image.Exif()
    exif[0x112] = 3
    array = noise(2, 64, 64).permute(1, 2, 0).numpy()
    files = [pillow(array, 'JPEG', exif=exif), encode(noise(2)), encode(noise(2), 'png')]
    refused = 0
    for case in range(300):
        data = bytearray(files[case % 3])
        for _ in range(1 + case % 5):
            data[rng.integers(len(data) if case % 2 else 200)] ^= 1 << int(rng.integers(8))
        try:
            image = decode(bytes(data), 'image 7')
            assert image.dtype == torch.uint8 and len(image) == 3
        except InputError as error:
            refused += 1
            assert 'image 7' in one_sentence(error)
    assert refused > 50


@pytest.mark.parametrize('images', [(1 << 24) + 2, (1 << 24) - 1])
def test_a_header_beyond_what_float32_counts_is_read(tmp_path, monkeypatch, images):
    """Glint360K's own header is such a one: 17,091,657 images. The heads of so many records are
    made as they would be read, without the files."""
    total = 1 + images + 3                                      # the header and three identities
    keys, none = np.arange(total, dtype=np.int32), np.zeros(total, np.int8)
    begin, flag, labels = keys + 40, none.copy(), np.zeros(total, np.float32)
    begin[0], flag[0], labels[0] = 0, 2, 1 + images
    end = begin + 1                                             # an image of one byte each
    end[0], end[1 + images:] = 40, begin[1 + images:]           # identities have none
    heads = RecordHeads(keys, begin, begin, end, none, flag, labels)
    monkeypatch.setattr(records, 'read_index', lambda path: (keys, begin))
    monkeypatch.setattr(Records, '_read_heads', lambda self, keys, offsets: heads)
    (tmp_path / 'train.rec').write_bytes(bytes(4))
    found = Records(tmp_path)
    assert len(found) == images and found.keys[-1] == images


def test_bin_of_a_home_made_kind(tmp_path):
    images, same = pairs()
    (tmp_path / 'a.bin').write_bytes(pickle.dumps((images, [1, 0])))
    assert read_bin(tmp_path / 'a.bin')[1].tolist() == [True, False]
    arrays = [np.frombuffer(x, np.uint8) for x in images]
    for protocol in range(5):
        (tmp_path / 'a.bin').write_bytes(pickle.dumps((arrays, same), protocol))
        with pytest.raises(InputError, match='tobytes'):
            read_bin(tmp_path / 'a.bin')


def test_one_key_for_all_records_is_told_what_helps(tmp_path):
    raw_set(tmp_path, [payload(0, 0, b'a' * 30), payload(1, 1, b'b' * 30)])
    (tmp_path / 'train.idx').write_text('0\t0\n0\t64\n')
    with pytest.raises(InputError, match='pack the set anew with a key for each image'):
        Records(tmp_path)
