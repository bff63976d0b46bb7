"""README and docs: the code runs as it stands, commands name what exists, figures are true."""
import re
import runpy
import shlex
import shutil
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from PIL import Image

import models
from conftest import ROOT, TINY, run
from facekit.base import config
from facekit.data import bins
from facekit.nets.weights import recogniser
from irm import irm_loss

PAGES = [ROOT / 'README.md', *sorted((ROOT / 'docs').glob('*.md'))]


def blocks(path, language):
    """The fenced blocks of a page in one language ('' = commands)."""
    found = re.findall(r'^```(\w*)\n(.*?)^```', path.read_text(), re.MULTILINE | re.DOTALL)
    return [text for name, text in found if name == language]


def commands():
    """Every command of the pages, from blocks and from inline code."""
    for page in PAGES:
        text = [line.split('#')[0].strip() for block in blocks(page, '')
                for line in block.splitlines()]
        text += re.findall(r'`([^`\n]+)`', page.read_text())
        for line in text:
            line = re.sub(r'^GPUS=\d+ ', '', line)
            if (re.match(r'(python|\./reproduce\.sh) \S+\.(py|yaml)', line)
                    and 'align.py' not in line):                     # which takes no config
                yield page.name, line


def test_commands_are_found():
    assert len(list(commands())) > 17


@pytest.mark.parametrize('page, line', list(commands()))
def test_a_command_names_a_script_a_config_and_keys_that_exist(page, line):
    words = shlex.split(line)
    script = ROOT / words[0] if words[0].startswith('./') else ROOT / words[1]
    assert script.is_file()
    rest = [w for w in words[1 if words[0].startswith('./') else 2:] if not w.startswith('--')]
    path = ROOT / (rest.pop(0) if rest and rest[0].endswith('.yaml') else 'configs/toy.yaml')
    resolved = config.resolve(path, rest)
    list(config.variants(config.namespace(resolved), compare=True))


# What the pages write in capitals, in the folder of the tests' finished experiment
PLACES = {'data.root=FOLDER': 'data.root=faces', 'release=PATH': 'release=faces',
          'originals=PATH': 'originals=faces',
          'judge.checkpoint=PATH': 'judge.checkpoint=judge.pt',
          'reconstruct.photos=FOLDER': 'reconstruct.photos=photos',
          'reconstruct.export=FOLDER': 'reconstruct.export=exported'}


@pytest.fixture(scope='module')
def pages_folder(finished, tmp_path_factory):
    """The finished experiment, with the files that commands of the pages name."""
    folder = shutil.copytree(finished[0], tmp_path_factory.mktemp('pages') / 'x')
    (folder / 'photos').mkdir()
    for i, image in enumerate(bins.read_bin(folder / 'faces' / 'toy.bin')[0][:3]):
        (folder / 'photos' / f'{i}.jpg').write_bytes(image)
    for name, path in (('lfw.bin', 'faces/toy.bin'), ('backbone.pth', 'run/fold0/teacher.pt'),
                       ('judge.pt', 'run/fold0/judge.pt')):
        shutil.copy(folder / path, folder / name)
    return folder


@pytest.mark.parametrize('line', sorted({line for _, line in commands()
                                         if line.startswith('python') and '--help' not in line
                                         and 'bench.py' not in line}))
def test_a_command_of_the_pages_runs_on_the_tests_config(line, pages_folder):
    script, *words = [PLACES.get(word, word) for word in shlex.split(line)[1:]]
    run(pages_folder, script, *(w for w in words if not w.endswith('.yaml') and w != '--config'))


def test_the_readmes_code_runs():
    """It takes the two files, which need no other (tests/test_rooms.py)."""
    for name in ('models.py', 'irm.py'):
        assert 'SPDX-License-Identifier: MIT' in (ROOT / name).read_text()
    [code] = blocks(ROOT / 'README.md', 'python')
    exec(code, scope := {})
    assert scope['mae'].cls_token.grad.abs().sum() > 0


def test_the_weights_of_the_kits_checkpoints_lie_where_the_readme_says(finished):
    assert "`torch.load(PATH)['net']`" in (ROOT / 'README.md').read_text()
    fold = finished[0] / 'run' / 'fold0'
    models.iresnet(10, 8, 32, 32).load_state_dict(torch.load(fold / 'teacher.pt')['net'])
    saved = torch.load(fold / 'mae.pt')
    models.MAE(32, 8, 32, 2, 2, 32, 1, 2).load_state_dict(saved['model'])
    assert saved['mean'].shape == (3, 32, 32) and saved['std'] == 0.25


def test_the_two_files_train_alone():
    """In ten steps the loss falls."""
    torch.manual_seed(0)
    teacher = models.iresnet(10, 8, 32, 16)
    teacher.train()(torch.randn(16, 3, 32, 32))
    teacher = models.folded(teacher)
    mae = models.MAE(32, 8, 32, 2, 2, 32, 1, 2)
    optimizer = torch.optim.AdamW(mae.parameters(), 3e-3)
    images, losses = torch.rand(16, 3, 32, 32), []
    for _ in range(10):
        pred, mask = mae(2 * images - 1, torch.rand(16, 16), 0.5)
        rebuilt = mae.unpatchify(pred)
        loss = models.masked_mse(pred, mae.patchify(2 * images - 1), mask)
        loss = loss + irm_loss(teacher(2 * images - 1), teacher(rebuilt))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0], losses


@pytest.mark.parametrize('version', [4, 5])
def test_the_renaming_of_hugging_faces_keys_gives_ours(version):
    _, code = blocks(ROOT / 'docs' / 'usage.md', 'python')
    exec(code, scope := {})
    ours = models.MAE(32, 8, 32, 2, 2, 16, 1, 2).state_dict()
    theirs, names = {}, (
        ('^mask_token', 'decoder.mask_token'), ('^decoder_blocks', 'decoder.decoder_layers'),
        ('^decoder_', 'decoder.decoder_'), ('^norm', 'vit.layernorm'),
        ('^blocks', 'vit.encoder.layer'), ('^cls_token', 'vit.embeddings.cls_token'),
        ('^pos_embed', 'vit.embeddings.position_embeddings'),
        ('^patch_embed.proj', 'vit.embeddings.patch_embeddings.projection'),
        ('attn.proj', 'attention.output.dense'), ('mlp.fc1', 'intermediate.dense'),
        ('mlp.fc2', 'output.dense'), (r'\.norm1', '.layernorm_before'),
        (r'\.norm2', '.layernorm_after'))
    parts = [f'attention.attention.{part}' for part in ('query', 'key', 'value')]
    if version == 5:
        names = (*names, (r'vit\.encoder\.layer', 'vit.layers'),
                 ('attention.output.dense', 'attention.o_proj'),
                 ('intermediate.dense', 'mlp.fc1'), ('output.dense', 'mlp.fc2'))
        parts = [f'attention.{letter}_proj' for letter in 'qkv']
    for key, value in ours.items():
        for mine, his in names:
            key = re.sub(mine, his, key)
        if 'attn.qkv' in key:
            for part, tensor in zip(parts, value.chunk(3)):
                theirs[key.replace('attn.qkv', part)] = tensor
        else:
            theirs[key] = value
    renamed = scope['from_hugging_face'](theirs)
    assert renamed.keys() == ours.keys()
    assert all(torch.equal(renamed[k], v) for k, v in ours.items())


@pytest.mark.filterwarnings('ignore::DeprecationWarning')
def test_the_onnx_file_of_the_pages_gives_what_the_backbone_gives(tmp_path):
    pytest.importorskip('onnxruntime')
    code, _ = blocks(ROOT / 'docs' / 'usage.md', 'python')
    exec(code, scope := {})
    torch.manual_seed(0)
    net = models.iresnet(10, 8, 112, 32).eval()

    class AdaFace(torch.nn.Sequential):
        """Takes BGR, and returns embeddings and their length."""

        def forward(self, faces):
            z = super().forward(faces)
            return F.normalize(z), z.norm(dim=1, keepdim=True)

    scope['write_onnx'](AdaFace(net), str(tmp_path / 'net.onnx'))
    faces = torch.rand(3, 3, 112, 112) * 2 - 1
    with torch.no_grad():
        expected = F.normalize(net(faces.flip(1)))
    found = recogniser(tmp_path / 'net.onnx', torch.device('cpu'))(faces)
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=0)


def test_the_readme_is_short_and_says_what_it_must_at_once():
    text = (ROOT / 'README.md').read_text()
    assert len(text.splitlines()) <= 150 and len(text.split()) <= 1200
    assert 'not anonymous' in ' '.join(text.split()[:110])


def test_the_readmes_picture_is_drawn_of_a_finished_run(finished, monkeypatch, tmp_path):
    idea = runpy.run_path(ROOT / 'results' / 'toy' / 'idea.py')
    monkeypatch.chdir(finished[0])
    idea['draw'](config.namespace(config.resolve(TINY, ['run.folder=run'])), tmp_path / 'x.png')
    drawn, ours = Image.open(tmp_path / 'x.png'), Image.open(ROOT / 'results' / 'toy' / 'idea.png')
    assert drawn.size == ours.size


def test_the_page_of_a_run_scrolls_only_inside_its_tables(finished):
    """On a phone a wide table scrolls by itself, and pictures are as wide as the page."""
    page = (finished[0] / 'run' / 'report.html').read_text()
    assert page.count('<div class="wide"><table') == page.count('<table') > 8
    assert '.wide { overflow-x: auto } img { max-width: 100%' in page and ' width=' not in page


def test_a_script_without_its_packages_says_what_to_do():
    done = subprocess.run([sys.executable, '-S', str(ROOT / 'train_mae.py')],
                          capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 1 and '.venv/bin/activate' in done.stderr
    assert 'Traceback' not in done.stderr
