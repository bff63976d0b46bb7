"""The toy faces: the same in every batch and process, files to be read."""

import numpy as np
import torch

from facekit.data import bins, images, records, toy


def test_an_image_does_not_depend_on_its_batch_or_on_threads():
    identities, poses = np.random.default_rng(0).integers(20000, size=(2, 20))
    batch = toy.draw(identities, poses, 48)
    assert batch.shape == (20, 3, 48, 48) and batch.dtype == torch.uint8
    threads = torch.get_num_threads()
    torch.set_num_threads(3)
    alone = [toy.draw([i], [p], 48)[0] for i, p in zip(identities, poses)]
    assert torch.equal(batch, torch.stack(alone)) and torch.get_num_threads() == 3
    torch.set_num_threads(threads)
    drawn = torch.stack([toy.draw([i], [p], 32, seed)[0]
                         for i in (0, 1) for p in (0, 1) for seed in (0, 1)])
    assert len(torch.unique(drawn.flatten(1), dim=0)) == 8    # each of the three changes the image


def test_draw_set(tmp_path, capsys):
    folder = tmp_path / 'new' / 'toy'
    leftover = tmp_path / 'new' / 'toy.tmp'
    leftover.mkdir(parents=True)
    (leftover / 'stale').write_text('of a killed draw')
    toy.draw_set(folder, 5, 3, 6, 44, size=32, seed=2)
    assert capsys.readouterr().out.count('\n') == 1
    assert sorted(p.name for p in folder.parent.rglob('*')) == [
        'drawn.sha256', 'property', 'toy', 'toy.bin', 'train.idx', 'train.rec']
    assert (folder / 'property').read_text() == '5,32,32'
    read = records.Records(folder)
    assert read.labels.tolist() == [i for i in range(5) for _ in range(3)]
    drawn = toy.draw(np.repeat(np.arange(5), 3), np.tile(np.arange(3), 5), 32, seed=2)
    assert [bytes(read[i]) for i in range(15)] == [images.encode(x, 'jpeg', 95) for x in drawn]
    pairs_of_files, same = bins.read_bin(folder / 'toy.bin')
    folds = np.array_split(same, 10)
    assert all((f == (np.arange(len(f)) < len(f) / 2)).all() for f in folds)
    # Whose image it is can be read off by drawing all it may be: people 5 to 10, 8 images each
    people, poses = np.repeat(np.arange(5, 11), 8), np.tile(np.arange(8), 6)
    source = {images.encode(x): key
              for x, key in zip(toy.draw(people, poses, 32, seed=2), zip(people, poses))}
    pairs = [(source[a], source[b]) for a, b in zip(pairs_of_files[::2], pairs_of_files[1::2])]
    assert [a[0] == b[0] for a, b in pairs] == same.tolist()
    assert all(a != b for a, b in pairs)
