"""Recognisers of other makers: ONNX files and dlib's."""
import importlib.util
import json
import shutil
import sys
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
import torch.nn.functional as F

import conftest
import evaluate
import models
from facekit import check
from facekit.base.config import as_dict, namespace, resolve
from facekit.base.errors import InputError
from facekit.data import toy
from facekit.data.pairs import load_pairs
from facekit.measure import verification
from facekit.nets import embed, published
from facekit.nets.weights import recogniser

CPU = torch.device('cpu')


@pytest.fixture(scope='module')
def net():
    """A recogniser whose BatchNorms are not the identity."""
    torch.manual_seed(0)
    net = models.iresnet(10, 8, 48, 32)
    for norm in (m for m in net.modules() if hasattr(m, 'running_mean')):
        norm.momentum = 1.0
    embed.embed_batch(net, torch.randint(0, 256, (32, 48, 48, 3), dtype=torch.uint8), 'fp32')
    return net.eval()


def bytes_of(net):
    """As mxnet exports did: the net subtracts the mean itself."""
    first = torch.nn.BatchNorm2d(3, 0, affine=False)
    first.running_mean.fill_(127.5)
    first.running_var.fill_(127.5 ** 2)
    return torch.nn.Sequential(first, net)


def export(net, path, images=None, **more):
    images = torch.zeros(1, 3, 48, 48) if images is None else images
    torch.onnx.export(net, (images,), path, dynamo=False, input_names=['input'], **more)
    return path


@pytest.mark.filterwarnings('ignore::DeprecationWarning')
@pytest.mark.parametrize('pixels, wrap, axes', [
    ('signed', lambda net: net, {'input': {0: 'batch'}}),
    ('bytes', bytes_of, {'input': {0: 'batch'}}),
    ('signed', lambda net: net, {})])                        # one image at a time
def test_an_onnx_file_sees_what_the_net_sees_that_it_was_exported_from(net, tmp_path, pixels,
                                                                       wrap, axes):
    path = export(wrap(net).eval(), tmp_path / 'net.ONNX', dynamic_axes=axes)
    faces = torch.randint(0, 256, (5, 64, 64, 3), dtype=torch.uint8)     # resized alike, too
    ours, theirs = (F.normalize(embed.embed_batch(n, faces, 'fp32'))
                    for n in (net, recogniser(path, CPU, onnx_pixels=pixels)))
    assert (ours - theirs).abs().max() < 1e-3
    assert (ours @ ours.T).fill_diagonal_(0).max() < 0.99         # or any net would do


@pytest.mark.filterwarnings('ignore::DeprecationWarning')
def test_what_is_no_onnx_recogniser_is_refused_in_a_sentence(tmp_path):
    (tmp_path / 'text.onnx').write_bytes(b'not a net')
    export(torch.nn.Conv2d(1, 4, 3), tmp_path / 'grey.onnx', torch.zeros(1, 1, 48, 48))
    export(torch.nn.Conv2d(3, 4, 3), tmp_path / 'map.onnx')
    for name, words in (('text', 'is no ONNX recogniser'), ('grey', 'is no ONNX recogniser'),
                        ('map', 'not one embedding an image'), ('none', 'cannot be read')):
        with pytest.raises(InputError, match=words):
            recogniser(tmp_path / f'{name}.onnx', CPU)


def onnx_file(path, *nodes, shape=('n', 'd'), **constants):
    """An ONNX file of nodes from 'input' to 'out', and constants for them by their names."""
    h = onnx.helper
    form = {name: h.make_tensor_value_info(name, onnx.TensorProto.FLOAT, shape)
            for name, shape in (('input', ('n', 3, 16, 16)), ('out', shape))}
    if nodes[-1].op_type == 'Cast':
        form['out'].type.tensor_type.elem_type = onnx.TensorProto.STRING
    tensors = [onnx.numpy_helper.from_array(np.asarray(value), name)
               for name, value in constants.items()]
    graph = h.make_graph(nodes, 'net', [form['input']], [form['out']], tensors)
    onnx.save(h.make_model(graph, opset_imports=[h.make_opsetid('', 17)], ir_version=8), path)


def endless(node):
    """A loop that copies its state for some 300 years."""
    h, real, flag = onnx.helper, onnx.TensorProto.FLOAT, onnx.TensorProto.BOOL
    body = h.make_graph(
        [node('Identity', ['go'], ['go_on']), node('Sin', ['state'], ['next'])], 'body',
        [h.make_tensor_value_info('number', onnx.TensorProto.INT64, ()),
         h.make_tensor_value_info('go', flag, ()),
         h.make_tensor_value_info('state', real, ('n', 'd'))],
        [h.make_tensor_value_info('go_on', flag, ()),
         h.make_tensor_value_info('next', real, ('n', 'd'))])
    return node('Loop', ['often', 'yes', 'flat'], ['out'], body=body)


@pytest.mark.parametrize('what, words', [
    ('good', ''), ('fails', r'fails \(.*when it embeds 2 images'), ('nan', 'no finite numbers'),
    ('text', 'not one embedding'), ('one number', r'shape \(2, 1\)'),
    ('one row', r'shape \(1, 768\)'), ('endless', 'does not end within 2 s')])
def test_an_onnx_file_is_tried_out_when_it_is_loaded(tmp_path, monkeypatch, what, words):
    node = onnx.helper.make_node
    flat = node('Flatten', ['input'], ['flat'])
    nodes, constants = {
        'good': ([node('Flatten', ['input'], ['out'])], {}),
        'fails': ([flat, node('Gather', ['flat', 'rows'], ['out'])], {'rows': [98, 99]}),
        'nan': ([flat, node('Sub', ['flat', 'inf'], ['low']), node('Sqrt', ['low'], ['out'])],
                {'inf': np.float32(np.inf)}),
        'text': ([flat, node('Cast', ['flat'], ['out'], to=onnx.TensorProto.STRING)], {}),
        'one number': ([flat, node('ReduceMean', ['flat'], ['out'], axes=[1])], {}),
        'one row': ([flat, node('ReduceMean', ['flat'], ['out'], axes=[0])], {}),
        'endless': ([flat, endless(node)], {'often': 1 << 62, 'yes': True}),
    }[what]
    onnx_file(tmp_path / 'net.onnx', *nodes, **constants)
    monkeypatch.setattr(published, 'SECONDS', 1)
    if not words:
        images = torch.zeros(3, 3, 16, 16)
        assert recogniser(tmp_path / 'net.onnx', CPU)(images).shape == (3, 768)
        return
    with pytest.raises(InputError, match=words):
        recogniser(tmp_path / 'net.onnx', CPU)


def test_an_onnx_file_that_takes_for_ever_with_three_images_is_stopped(tmp_path, monkeypatch):
    node = onnx.helper.make_node
    onnx_file(tmp_path / 'net.onnx', node('Flatten', ['input'], ['flat']),
              node('Shape', ['input'], ['shape'], end=1), node('Div', ['shape', 'three'], ['one']),
              node('Mul', ['one', 'many'], ['often']), endless(node),
              three=[3], many=[1 << 62], yes=True)
    monkeypatch.setattr(published, 'SECONDS', 0.5)
    net = recogniser(tmp_path / 'net.onnx', CPU)
    with pytest.raises(InputError, match='does not end within 1.5 s when it embeds 3 images'):
        net(torch.zeros(3, 3, 16, 16))


def folded(path, count):
    """An ONNX file with `count` products of constants, which are computed when it is loaded."""
    node, large = onnx.helper.make_node, onnx.numpy_helper.from_array(np.full(1, 1e-4, np.float32))
    products = [node('MatMul', [f'c{i}', 'c0'], [f'c{i + 1}']) for i in range(count)]
    onnx_file(path, node('ConstantOfShape', ['sides'], ['c0'], value=large), *products,
              node('ReduceMean', [f'c{count}'], ['mean'], keepdims=0),
              node('Flatten', ['input'], ['flat']), node('Add', ['flat', 'mean'], ['out']),
              sides=[1024, 1024])
    return path


@pytest.mark.parametrize('side', [0, 1 << 20, -16])
def test_an_onnx_file_that_wants_images_of_an_impossible_size_is_refused(tmp_path, side):
    node = onnx.helper.make_node
    onnx_file(tmp_path / 'net.onnx', node('Flatten', ['input'], ['out']))
    model = onnx.load(tmp_path / 'net.onnx')
    for place in (2, 3):
        model.graph.input[0].type.tensor_type.shape.dim[place].dim_value = side
    onnx.save(model, tmp_path / 'net.onnx')
    with pytest.raises(InputError, match='is no ONNX recogniser'):
        recogniser(tmp_path / 'net.onnx', CPU)


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """The working folder, with nothing in it but an .onnx file that is none."""
    monkeypatch.chdir(tmp_path)
    Path('net.onnx').touch()
    return tmp_path


def config(*assignments):
    return namespace(resolve(conftest.TINY, ['run.folder=run', *assignments]))


@pytest.mark.parametrize('assignments, module, package', [
    (['evaluate.attacks=[judge, dlib]'], 'dlib', 'dlib-bin'),
    (['evaluate.model=dlib'], 'face_recognition_models', 'face-recognition-models'),
    (['evaluate.attacks=[judge]', 'judge.checkpoint=net.onnx'], 'onnxruntime', 'onnxruntime')])
def test_a_missing_package_is_told_before_the_first_stage_and_by_the_evaluation(
        folder, monkeypatch, assignments, module, package):
    find_spec = importlib.util.find_spec
    monkeypatch.setitem(sys.modules, module, None)
    monkeypatch.setattr(importlib.util, 'find_spec', lambda name: (
        None if name == module else find_spec(name)))
    starts = [lambda: check.check_experiment(config(*assignments), compare=True),
              lambda: evaluate.main(config(*assignments), CPU, compare=False)]
    for start in starts:
        with pytest.raises(InputError, match=f'not installed: run `pip install {package}`'):
            start()
        assert [path.name for path in folder.iterdir()] == ['net.onnx']


def test_a_recogniser_is_evaluated_at_its_own_size_whatever_the_patches_are(folder, size=61):
    toy.draw_set('faces', 2, 1, 20, 40, 32, 0)
    net = models.iresnet(10, 8, size, 32)
    torch.save({'net': net.state_dict(), 'config': as_dict(config(f'data.size={size}'))}, 'net.pt')
    evaluate.main(config('evaluate.model=net.pt'), CPU, compare=False)
    results = json.loads((folder / 'run' / 'external.json').read_text())
    pairs = load_pairs(Path('faces/toy.bin'), size)
    expected = verification.verify(net.eval(), [pairs], config(), CPU)[0]
    assert results['verification']['toy']['auc'] == expected['toy']['auc']
    assert results['config']['data']['size'] == 32


def test_a_recogniser_named_beside_a_foreign_release_is_used_or_refused(folder, net, monkeypatch):
    monkeypatch.setattr(published, 'DlibRecogniser', lambda: net)
    toy.draw_set('faces', 12, 4, 20, 40, 32, 0)
    foreign = ['release=faces', 'originals=faces', 'evaluate.attacks=[insider]']
    evaluate.main(config(*foreign, 'evaluate.model=dlib'), CPU, compare=False)
    results = json.loads((folder / 'run' / 'external.json').read_text())
    assert results['verification']['toy']['pairs'] == 40
    assert results['privacy'] == {}                # it did not learn from the release: no insider
    for name in ('none.pth', 'none.onnx', 'DLIB'):
        for start in (lambda cfg: check.check_experiment(cfg, compare=False),
                      lambda cfg: evaluate.main(cfg, CPU, compare=False)):
            with pytest.raises(InputError, match=f'{name}.* check the path'):
                start(config(*foreign, f'evaluate.model={name}'))


@pytest.mark.long
@pytest.mark.filterwarnings('ignore::DeprecationWarning')
def test_published_recognisers_judge_a_release_and_are_evaluated(finished, tmp_path):
    folder = shutil.copytree(finished[0], tmp_path / 'copy')
    net = models.iresnet(10, 8, 48, 32).eval()
    path = export(net, tmp_path / 'w600k_r50.onnx', dynamic_axes={'input': {0: 'batch'}})
    conftest.run(folder, 'evaluate.py', f'evaluate.attacks=[judge, dlib, {path}]',
                 f'judge.checkpoint={path}', 'evaluate.probes=16')
    found = json.loads((folder / 'run' / 'results.json').read_text())['privacy']
    assert found['judge_same_image']['rank1'] == found['w600k_r50_same_image']['rank1']
    assert 'dlib_same_person' in found
    conftest.run(folder, 'evaluate.py', f'evaluate.model={path}')
    external = json.loads((folder / 'run' / 'external.json').read_text())
    assert external['verification']['toy']['pairs'] == 100


@pytest.mark.parametrize('assignments', [
    ['teacher.checkpoint=dlib'], ['teacher.checkpoint=net.onnx'],
    ['judge.checkpoint=net.onnx', 'evaluate.attacks=[judge, trained]']])
def test_who_only_looks_is_refused_where_a_gradient_is_needed(folder, assignments):
    with pytest.raises(InputError, match='can only embed and gives no gradient: name an IResNet'):
        check.check_experiment(config(*assignments), compare=False)


def test_dlibs_chips_hold_the_face_as_dlib_crops_it():
    """A picture whose colours are its coordinates: each pixel of a chip tells where it was."""
    at = torch.arange(112.0) + 0.5
    picture = torch.stack([at.expand(112, 112), at[:, None].expand(112, 112),
                           torch.zeros(112, 112)])
    net = object.__new__(published.DlibRecogniser)
    chip = published.DlibRecogniser.chips(net, picture[None] / 127.5 - 1)[0].numpy()
    left, top, right, bottom = published.CHIP_BOX
    centres = (np.arange(published.CHIP) + 0.5) / published.CHIP
    assert chip.shape == (published.CHIP, published.CHIP, 3) and chip.dtype == np.uint8
    assert np.abs(chip[60, :, 0] - (left + centres * (right - left))).max() <= 1
    expected = np.minimum(top + centres * (bottom - top), 111.5)         # the edge is repeated
    assert np.abs(chip[:, 60, 1] - expected).max() <= 1
