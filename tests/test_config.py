"""Config files and the command line: what is refused, and in which words."""
from pathlib import Path

import pytest
import yaml

from facekit import config
from facekit.errors import InputError

ALL = sorted(config.CONFIGS.glob('*.yaml'))


@pytest.mark.parametrize('path', ALL, ids=lambda p: p.stem)
def test_every_config_resolves_and_changes_only_what_it_names(path):
    resolved = config.resolve(path)
    assert resolved['run']['folder'] == f'runs/{path.stem}'
    names = list(config.variants(config.namespace(resolved), compare=True))
    assert names[0].folder == Path(resolved['run']['folder'])


def test_every_key_of_casia_has_a_comment():
    for line in (config.CONFIGS / 'casia.yaml').read_text().splitlines():
        if line.strip() and not line.startswith('#') and not line.strip().startswith('- '):
            section = not line.startswith(' ') and line.rstrip().endswith(':')
            assert section or '#' in line or line.strip().endswith(':'), line


@pytest.mark.parametrize('assignment, names', [
    ('mae.epoch=3', ['mae.epoch', 'epochs']),
    ('mea.epochs=3', ["'mea'", "'mae'"]),
    ('mae.batch=many', ['mae.batch', "'many'", 'int']),
    ('mae.batch=true', ['mae.batch', 'True', 'int']),
    ('mae.batch=0', ['mae.batch', 'out of range']),
    ('mae.lr=-1', ['mae.lr', 'out of range']),
    ('mae.lr=.nan', ['mae.lr', 'finite']),
    ('reconstruct.mask_ratio=1.0', ['reconstruct.mask_ratio', '0 to 0.99']),
    ('mae=3', ['mae', 'section']),
    ('irm.relations=dot', ['irm.relations', 'cosine', 'l2']),
    ('evaluate.sets=[1]', ['evaluate.sets', '1', 'str']),
    ('mae.epochs', ['mae.epochs', 'section.key=value']),
    ('run.folder=[', ['run.folder', 'quote']),
])
def test_a_wrong_assignment_is_one_sentence(assignment, names):
    with pytest.raises(InputError) as error:
        config.resolve(config.CONFIGS / 'toy.yaml', [assignment])
    assert all(name in str(error.value) for name in names) and '\n' not in str(error.value)


def test_exponents_without_a_dot_are_numbers():
    # YAML 1.1 reads 1e-4 as a string; a learning rate must not fail for that
    resolved = config.resolve(config.CONFIGS / 'toy.yaml', ['mae.lr=1e-4', 'fr.lr=1'])
    assert resolved['mae']['lr'] == 1e-4 and resolved['fr']['lr'] == 1.0


@pytest.mark.parametrize('text', ['/photos #2', "O'Hara", '"quoted"', '~x', '2024/faces'])
def test_a_path_on_the_command_line_is_taken_as_it_is(text):
    resolved = config.resolve(config.CONFIGS / 'toy.yaml', [f'data.root={text}'])
    assert resolved['data']['root'] == text.strip('"')


@pytest.mark.parametrize('text', ['', '3', '- a', 'a: [', '\x00', 'a: !!python/object:os.system x',
                                  'mae: {epochs: {a: 1}}', 'base: nowhere.yaml', 'base: bad.yaml',
                                  'compare: {x: 3}', 'compare: {x: [mae.lr]}', '1: 2',
                                  'compare: {reconstructed: []}', 'compare: {facemae: []}',
                                  'data: {exclude: &a [x], cache: *a}', 'a: {<<: &b {}}\nc: *b'])
def test_a_broken_file_is_one_sentence(tmp_path, text):
    (tmp_path / 'bad.yaml').write_text(text)
    with pytest.raises(InputError) as error:
        resolved = config.resolve(tmp_path / 'bad.yaml')
        list(config.variants(config.namespace(resolved), compare=True))
    assert '\n' not in str(error.value)


def test_a_config_builds_on_its_base(tmp_path):
    (tmp_path / 'a.yaml').write_text(yaml.safe_dump({'mae': {'epochs': 7, 'batch': 8}}))
    (tmp_path / 'b.yaml').write_text(yaml.safe_dump({'base': 'a.yaml', 'mae': {'batch': 9}}))
    resolved = config.resolve(tmp_path / 'b.yaml')
    assert (resolved['mae']['epochs'], resolved['mae']['batch']) == (7, 9)


def test_rows_share_the_run_folder_and_have_their_own():
    resolved = config.resolve(config.CONFIGS / 'toy.yaml', [
        'compare_seeds=[0,1]', 'compare={mse: [irm.weight=0, mae.name=mse]}'])
    every = config.variants(config.namespace(resolved), True)
    found = {(r.name, r.cfg.run.seed): r for r in every}
    assert {k: str(r.folder) for k, r in found.items()} == {
        ('facemae', 0): 'runs/toy', ('mse', 0): 'runs/toy/mse',
        ('facemae', 1): 'runs/toy/seed1', ('mse', 1): 'runs/toy/mse/seed1'}
    assert str(found['mse', 1].mae(0)) == 'runs/toy/fold0/mse_seed1.pt'
    assert found['mse', 0].cfg.irm.weight == 0 and found['facemae', 0].cfg.irm.weight > 0


def test_a_key_twice_is_refused_with_both_lines(tmp_path):
    (tmp_path / 'a.yaml').write_text('mae:\n  epochs: 3\nreconstruct: {}\nmae:\n  batch: 8\n')
    with pytest.raises(InputError, match=r"has 'mae' twice \(lines 1 and 4\)"):
        config.resolve(tmp_path / 'a.yaml')
    (tmp_path / 'a.yaml').write_text('mae:\n  epochs: 3\n  batch: 8\n  epochs: 4\n')
    with pytest.raises(InputError, match=r"has 'epochs' twice \(lines 2 and 4\)"):
        config.resolve(tmp_path / 'a.yaml')


def variant(*assignments):
    resolved = config.resolve(config.CONFIGS / 'toy.yaml', assignments)
    return config.variants(config.namespace(resolved), False)[0]


def test_a_release_hides_what_its_model_hides_unless_both_are_set():
    assert variant('mae.mask_ratio=0.9').cfg.reconstruct.mask_ratio == 0.9
    both = variant('mae.mask_ratio=0.9', 'reconstruct.mask_ratio=0.5').cfg
    assert (both.mae.mask_ratio, both.reconstruct.mask_ratio) == (0.9, 0.5)


@pytest.mark.parametrize('assignment, words', [
    ('mae.norm_pix_loss=true', 'cannot reconstruct'), ('mae.patch=7', 'does not divide data.size'),
    ('irm.images_per_identity=5', 'images_per_identity'), ('fr.norm_batch=48', 'fr.norm_batch'),
    ('reconstruct.method=blur reconstruct.blur_sigma=60', 'blur_sigma'),
    ('reconstruct.method=pixelate reconstruct.pixelate_block=4096', 'pixelate_block'),
    ('evaluate.probes=1', 'evaluate.probes'), ('mae.batch=1', 'mae.batch'),
    ('evaluate.attack_steps=0', 'attack_steps'), ('fr.lr=1e308', 'fr.lr'),
    ('fr.warmup_epochs=1e308', 'fr.warmup_epochs'),
    ('compare={a:[run.folder=b]} run.row=a', 'run.folder')])
def test_what_cannot_end_well_is_said_before_anything_begins(assignment, words):
    with pytest.raises(InputError, match=words):
        variant(*assignment.split())


def test_a_home_folder_is_found():
    assert variant('data.root=~/faces').cfg.data.root == str(Path.home() / 'faces')
