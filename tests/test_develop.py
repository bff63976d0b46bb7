"""docs/develop.md: each diff is applied to a copy of the kit and does there what the page says."""
import json
import re
import shutil
import subprocess

import numpy as np
import pytest
import torch

from conftest import ROOT, Script, log_lines, run
from facekit.data import images, records
from facekit.nets.weights import load_checkpoint

PAGE = ROOT / 'docs' / 'develop.md'
# The diffs under the page's headings, in order
DIFFS = re.findall(r'^```diff\n(.*?)^```', PAGE.read_text(), re.MULTILINE | re.DOTALL)
MASKS, PROTECTION, ATTACKER, RELATION = DIFFS

pytestmark = pytest.mark.skipif(not shutil.which('patch'), reason='patch is not installed')


@pytest.fixture
def changed(whole):
    """A function that makes a copy of the kit with a diff and returns one that runs its scripts on
    the tests' finished experiment in tmp_path."""
    def change(diff):
        kit = whole / 'kit'
        shutil.copytree(ROOT, kit, ignore=shutil.ignore_patterns(
            '.*', 'tests', 'docs', 'results', 'runs', 'datasets', '__pycache__'))
        subprocess.run(['patch', '-p1', '--fuzz=0'], input=diff, cwd=kit, text=True, check=True)

        def script(name, *words):
            one = Script(whole, kit / name, *words)
            assert one.wait() == 0, one.out + one.err
            return one.out

        return script

    return change


def hidden_patches(faces):
    """Which patches of 8 pixels of faces (N, 32, 32, 3) are grey: bool (N, 4, 4)."""
    return (np.abs(faces.astype(int) - 128) <= 1).reshape(-1, 4, 8, 4, 8, 3).all((2, 4, 5))


def is_in_blocks(hidden):
    """Whether two by two patches are hidden together, 12 of 16."""
    blocks = hidden.reshape(-1, 2, 2, 2, 2).sum((2, 4))
    return set(blocks.flatten()) == {0, 4} and (hidden.sum((1, 2)) == 12).all()


def test_the_diffs_are_short():
    assert all(len(diff.splitlines()) <= 15 for diff in DIFFS)


def test_other_masks_reach_training_release_attackers_and_tables(changed, tmp_path):
    script = changed(MASKS)
    row = 'compare={blocks: [reconstruct.method=mask, mae.name=blocks]}', 'run.row=blocks'
    script('train_mae.py', 'mae.name=blocks', 'mae.epochs=1', 'irm.warmup_epochs=0')
    run(tmp_path, 'train_mae.py', 'mae.name=plain', 'mae.epochs=1', 'irm.warmup_epochs=0')
    blocks, plain = (load_checkpoint(tmp_path / 'run' / 'fold0' / f'{name}.pt')['model']
                     for name in ('blocks', 'plain'))
    assert not all(torch.equal(blocks[key], plain[key]) for key in plain)  # masks alone differ
    assert '4 of 16 patches' in script('reconstruct.py', *row)          # and passes its check
    released = records.Records(tmp_path / 'run' / 'blocks' / 'reconstructed')
    faces = np.stack([images.decode(x, '').permute(1, 2, 0).numpy() for x in released])
    assert is_in_blocks(hidden_patches(faces))
    script('train_fr.py', 'fr.epochs=1', *row)
    assert '4 of 16' in script('evaluate.py', 'evaluate.attacks=[masked]', *row)
    found = json.loads((tmp_path / 'run' / 'blocks' / 'results.json').read_text())['privacy']
    assert found['masked_same_image']['rank1'] == 1                     # who knows the masks


def test_a_new_protection_is_released_with_its_strength(changed, tmp_path):
    script = changed(PROTECTION)
    script('reconstruct.py', 'run.row=dark', 'compare={dark: [reconstruct.method=darken]}')
    folder = tmp_path / 'run' / 'dark' / 'reconstructed'
    facts = json.loads((folder / 'manifest.json').read_text())
    assert facts['method'] == 'darken' and facts['darkness'] == 0.25
    assert max(images.decode(x, '').max() for x in records.Records(folder)) <= 64


def test_a_new_attacker_stands_in_results_and_table(changed, tmp_path):
    printed = changed(ATTACKER)('evaluate.py', 'evaluate.attacks=[judge, both]')
    found = json.loads((tmp_path / 'run' / 'results.json').read_text())['privacy']
    assert {'both_same_person', 'both_same_image'} <= set(found) and 'the judge and the' in printed


def test_a_new_relation_trains(changed, tmp_path):
    changed(RELATION)('train_mae.py', 'mae.name=angle', 'irm.relations=angle')
    before, after = ([line['irm'] for line in log_lines(tmp_path, f'train_mae/fold0/{name}')]
                     for name in ('mae', 'angle'))
    assert after[-1] > 0 and after[-1] != before[-1]
