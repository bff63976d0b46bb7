"""The rooms of facekit: imports run one way, and a part can be taken without the rest."""
import ast

import pytest

from conftest import ROOT

ROOMS = ['base', 'data', 'nets', 'measure', 'privacy', 'report', 'forecast', 'check']
STAGES = ['train_mae', 'reconstruct', 'train_fr', 'evaluate']
FILES = [*ROOT.glob('*.py'), *(ROOT / 'facekit').rglob('*.py')]


def imported(path, anywhere=True):
    """Names of the modules that a file imports, anywhere in it or outside of its functions."""
    tree = ast.parse(path.read_text())
    for node in ast.walk(tree) if anywhere else tree.body:
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield node.module
            yield from (f'{node.module}.{alias.name}' for alias in node.names)


def loaded(name, found):
    """Adds to `found` what importing a module of that name loads, by way of ours."""
    path = ROOT / name.replace('.', '/')
    for file in (path.with_suffix('.py'), path / '__init__.py'):
        if file.exists() and name not in found:
            for other in imported(file, anywhere=False):
                loaded(other, found)
    return found.add(name) or found


@pytest.mark.parametrize('path', FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_run_one_way(path):
    """A room imports from those before it; models.py and irm.py nothing of ours, and a stage no
    other stage."""
    names, parts = set(imported(path)), path.relative_to(ROOT).with_suffix('').parts
    assert not names & set(STAGES)
    if path.stem in ('models', 'irm'):
        assert not any(name.split('.')[0] in ('facekit', 'models', 'irm') for name in names)
    if parts[0] == 'facekit' and parts[1] in ROOMS:
        later = ROOMS[ROOMS.index(parts[1]) + 1:]
        assert not [name for name in names if name.split('.')[0] == 'facekit'
                    and name.count('.') and name.split('.')[1] in later]


@pytest.mark.parametrize('module, without', [
    ('facekit.data.records', 'facekit.base.config facekit.base.process facekit.data.toy yaml'),
    ('facekit.data.images', 'facekit.base.config facekit.base.process'),
    ('facekit.base.files', 'torch facekit.base.process'),
    ('models', 'facekit'), ('irm', 'facekit')])
def test_a_part_needs_no_more_than_it_says(module, without):
    found = loaded(module, set())
    assert len(found) > 2 and not [name for name in found for other in without.split()
                                   if f'{name}.'.startswith(f'{other}.')]


def test_files_are_short_enough_to_be_read():
    for path in FILES:
        lines = path.read_text().splitlines()
        assert len(lines) <= 350 and max(map(len, lines), default=0) < 100, path
