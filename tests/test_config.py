"""Config files and the command line: what a text becomes, what is refused, and in which words."""
import re
from operator import attrgetter
from pathlib import Path

import pytest
import yaml

from facekit.base import config
from facekit.base.errors import InputError

TOY = config.CONFIGS / 'toy.yaml'


def variants(words, path=TOY, compare=False):
    return config.variants(config.namespace(config.resolve(path, words)), compare)


@pytest.mark.parametrize('path', sorted(config.CONFIGS.glob('*.yaml')), ids=lambda p: p.stem)
def test_every_config_resolves_and_its_rows_lie_in_its_run_folder(path):
    resolved = config.resolve(path)
    every = config.variants(config.namespace(resolved), compare=True)
    assert str(every[0].folder) == resolved['run']['folder'] == f'runs/{path.stem}'
    assert config.as_dict(config.namespace(resolved)) == resolved


def test_every_key_of_casia_has_a_spec_and_a_meaning():
    text = (config.CONFIGS / 'casia.yaml').read_text()
    for line in re.findall(r'^(?:  )?\w+:.*', text, re.MULTILINE):
        assert re.search(r': .*# [^:]+: \S', line) or line.partition(':')[0] in config.SECTIONS


@pytest.mark.parametrize('assignment, value', [
    ('mae.batch=64', 64), ('fr.lr=1', 1.0), ('mae.lr=1e-4', 1e-4), ('fr.depth=18', 18),
    ('run.compile=True', True), ('fr.shard_classes=TRUE', 'true'),
    ('reconstruct.mask_ratio=same', 'same'), ('reconstruct.mask_ratio=0.5', 0.5),
    ('data.exclude=[010, 12, no, 12:30, "Li, A"]', ['010', '12', 'no', '12:30', 'Li, A']),
    ('fr.lr_drops=[]', []), ('fr.lr_drops=[1, 2e0]', [1.0, 2.0]), ('compare_seeds=[5]', [5]),
    ('data.root=/photos #2', '/photos #2'), ('data.root="[a] b"', '[a] b'), ('data.public=', ''),
    ('data.root=~x', '~x'), ('data.root=~/faces', str(Path.home() / 'faces'))])
def test_a_text_becomes_what_its_key_says(assignment, value):
    key = assignment.partition('=')[0]
    found = attrgetter(key)(config.namespace(config.resolve(TOY, [assignment])))
    assert found == value and type(found) is type(value)


@pytest.mark.parametrize('assignments, words', [
    ('mae.epoch=3', 'mae.epochs'), ('epochs=3', 'fr.epochs'), ('mae=3', 'mae.KEY'),
    *((f'mae.batch={text}', 'mae.batch = .*: give int 2 or more')
      for text in ('many', '1', '2.5', '', '9' * 5000, '[8]')),
    *((f'mae.lr={text}', 'give float 0..1e30') for text in ('-1', 'nan', 'inf')),
    ('reconstruct.method=None', 'pixelate'), ('run.compile=yes', r'true \| false'),
    ('mae.name=a/b', 'name'), ('mae.name=Judge', "another net's file"),
    ('reconstruct.mask_ratio=1.0', r'same \| float 0..0.99'),
    ('data.root=a\nb', 'path'), ('mae.epochs', 'section.key=value'), ('run.folder=[', 'quote'),
    ('base=lfw.yaml', 'section.key=value'), ('run.row=no', 'no row'),
    ('data.exclude=a', 'list of'), ('fr.lr_drops=[] fr.lr_drops=[a]', "'a'"),
    ('fr.margin_warmup=[0.1]', 'two of'), ('compare=map', 'map of'),
    ('evaluate.sets={a:b}', 'list of'), ('mae.patch=7', 'mae.patch'),
    ('fr.norm_batch=48', 'norm_batch'),
    ('reconstruct.method=blur reconstruct.blur_sigma=60', 'blur_sigma'),
    ('reconstruct.method=pixelate reconstruct.pixelate_block=4096', 'pixelate_block'),
    *((f'compare={{a:[{change}]}}', f'compare.a.*{key}') for change, key in {
        '"data={exclude: [x]}"': 'data.exclude', 'judge.seed=9': 'judge.seed',
        '"teacher={epochs: 3}"': 'teacher.epochs', 'mae.lr': 'mae.lr', '[]': 'text'}.items())])
def test_what_cannot_be_is_one_sentence_before_anything_begins(assignments, words):
    with pytest.raises(InputError, match=words) as error:
        variants([assignments] if '{' in assignments else assignments.split(' '))
    assert len(str(error.value)) < 400


@pytest.mark.parametrize('text, words', [
    *((text, 'YAML|has') for text in ('', '- a', 'a: [', 'mae.lr: 1', '{' * 3000)),
    ('a: !!python/object:os.system x', "'a'"), ('mae:', 'section'),
    ('mae: {epochs: {a: 1}}', 'mae.epochs'), ('base: [x]', 'bad.yaml: base'),
    ('base: nowhere.yaml', 'nowhere.yaml does not exist'), ('base: bad.yaml', 'circle'),
    ('compare: {x: 3}', 'list of text'), ('compare: {reconstructed: []}', 'begin with'),
    *((f'compare: {{{name}: []}}', 'begin with') for name in (
        'scores', 'external_scores', 'release', 'photos', 'roc', 'tradeoff', 'losses')),
    ('compare: {facemae: []}', 'rename'),
    ('reference: {a: {lfw: 3}}', 'reference.a'),
    ('data: {exclude: &a [x], cache: *a}', 'alias'),
    ('mae:\n  epochs: 3\nirm: {}\nmae:\n  batch: 8', r"'mae' twice \(lines 1 and 4\)"),
    ('mae:\n  epochs: 3\n  batch: 8\n  epochs: 4\n', r"'epochs' twice \(lines 2 and 4\)")])
def test_a_broken_file_is_one_sentence(tmp_path, text, words):
    (tmp_path / 'bad.yaml').write_text(text)
    with pytest.raises(InputError, match=words) as error:
        variants([], tmp_path / 'bad.yaml', compare=True)
    assert '\n' not in str(error.value)


@pytest.mark.parametrize('text', [
    '0F' * 32, '0X' + '0f' * 32, 'key:' + '0f' * 32, '0.' * 62, 'Zm9v' * 11, '\ufeff' + '0f' * 32,
    ['0f' * 32], {'0f' * 32: '0f' * 32}, '0f' * 300, 'nowhere'])
def test_a_secret_in_place_of_its_file_is_refused_and_not_repeated(tmp_path, text):
    (tmp_path / 'a.yaml').write_text(yaml.safe_dump({'reconstruct': {'key': text}}))
    for path, words in ((tmp_path / 'a.yaml', []), (TOY, [f'reconstruct.key={text}']),
                        (TOY, [f'compare={{a: ["reconstruct.key={text}"]}}'])):
        with pytest.raises(InputError, match='path of a file') as error:
            config.resolve(path, words)
        assert not re.search('0f0f|0F0F|0\\.0\\.|Zm9v|nowhere', str(error.value))


def test_a_config_builds_on_its_base_and_nobody_excluded_by_any_comes_back(tmp_path):
    for name, content in (
            ('a', {'mae': {'epochs': 7, 'batch': 8}, 'data': {'exclude': ['ann', 'bob']}}),
            ('b', {'base': 'a.yaml', 'mae': {'batch': 9}, 'data': {'exclude': ['bob', 'cy']}})):
        (tmp_path / f'{name}.yaml').write_text(yaml.safe_dump(content))
    words = 'data.exclude=[dan]', 'data.exclude=[eve]', 'data={exclude: []}'
    resolved = config.resolve(tmp_path / 'b.yaml', words)
    assert (resolved['mae']['epochs'], resolved['mae']['batch']) == (7, 9)
    assert resolved['data']['exclude'] == ['ann', 'bob', 'cy', 'dan', 'eve']


def test_rows_share_the_run_folder_and_have_their_own():
    every = variants(['compare_seeds=[0,1]', 'compare={mse: [irm.weight=0, mae.name=mse]}'],
                     compare=True)
    found = {(v.name, v.cfg.run.seed): v for v in every}
    assert {k: str(v.folder) for k, v in found.items()} == {
        ('facemae', 0): 'runs/toy', ('mse', 0): 'runs/toy/mse',
        ('facemae', 1): 'runs/toy/seed1', ('mse', 1): 'runs/toy/mse/seed1'}
    assert str(found['mse', 1].mae(0)) == 'runs/toy/fold0/mse_seed1.pt'
    assert [v.cfg.irm.weight for v in every] == [1, 0, 1, 0]


def test_a_release_hides_what_its_model_hides_unless_both_are_set():
    for words in (['mae.mask_ratio=0.9'], ['reconstruct.mask_ratio=0.9', 'mae.mask_ratio=0.8']):
        assert variants(words)[0].cfg.reconstruct.mask_ratio == 0.9


def test_a_run_in_which_relations_would_never_act_is_refused():
    with pytest.raises(InputError, match='relations would never act'):
        variants(['mae.epochs=4', 'irm.warmup_epochs=7'])
    assert variants(['mae.epochs=4', 'irm.warmup_epochs=7', 'irm.weight=0'])
