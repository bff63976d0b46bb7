"""What a GPU would tell of the kit, told without one by the simulated device of simcuda.py.

No operation mixes devices or lacks a CUDA kernel, no step of a training makes the host wait for
the GPU, and figures are those of the CPU to the last bit. The device itself is tested by faults
and stalls that are planted.
"""
import contextlib
import itertools
import json
import shutil

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import gpu_stages
import models
import simcuda
import train_mae
from conftest import log_lines
from facekit.data import batches
from facekit.nets import embed
from facekit.nets.training import Training
from facekit.privacy.attacks import ATTACKERS
from facekit.privacy.protect import PROTECTIONS
from gpu_stages import STAGES, check_collective, stage, two_processes

ATTACKS = [name for name in ATTACKERS if name != 'dlib']      # which is a program of the host
ALL = f'evaluate.attacks=[{", ".join(ATTACKS)}]'
GPU, CPU = 'run.device=cuda', 'run.device=cpu'
QUIET = 'run.log_every=1000', 'run.save_minutes=1e9'
TEACHER = STAGES[0]
TWO_LOSSES = 'irm.warmup_epochs=0'


def long(*cases):
    """The cases of a table that only the long tests go through."""
    return [pytest.param(*(case if isinstance(case, tuple) else [case]), marks=pytest.mark.long)
            for case in cases]


@pytest.fixture(scope='module', autouse=True)
def ready():
    with pytest.MonkeyPatch.context() as patch, gpu_stages.stages(patch):
        yield


def make(folder, commands, *more, device=GPU, free=140 << 30):
    """Run stages in `folder`, each with `more` settings, on the CPU or a simulated GPU with `free`
    bytes; returns its Watch."""
    place = simcuda.device(free) if device == GPU else contextlib.nullcontext()
    with place as watch:
        for words in commands:
            stage(folder, *words, device, *more)
    return watch


@pytest.fixture(scope='module')
def on_gpu(tmp_path_factory):
    """A folder in which all stages ran on the simulated GPU, and the Watch."""
    folder = tmp_path_factory.mktemp('gpu')
    return folder, make(folder, STAGES, ALL)


@pytest.fixture
def copied(on_gpu, tmp_path):
    """The same folder to work on."""
    shutil.copytree(on_gpu[0], tmp_path, dirs_exist_ok=True)
    return tmp_path


def figures(folder, row='.'):
    """{path: value} of what results.json says of verification, attacks and image quality."""
    def flat(path, value):
        if isinstance(value, list):
            value = dict(enumerate(value))
        if not isinstance(value, dict):
            return {path: value}
        return {k: v for name, x in value.items() for k, v in flat(f'{path}/{name}', x).items()}

    results = json.loads((folder / 'run' / row / 'results.json').read_text())
    parts = 'verification', 'privacy', 'reconstruction'
    return flat('', {part: results[part] for part in parts})


def differing(one, two):
    """What two {path: value} do not agree on."""
    assert one.keys() == two.keys() and len(one) > 100
    return {path: (value, two[path]) for path, value in one.items() if value != two[path]}


def check_steps(watch):
    """Between two log lines no step made the host wait, and each copied its indices, and images or
    sampled centres where they are the host's, while the host went on."""
    assert watch.faults == [] and watch.steps
    assert [(phase, wait) for phase, wait in watch.waits if phase in watch.steps] == []
    for phase, count in watch.steps.items():
        assert count > 2 and count - 1 <= watch.copies[phase] <= 3 * count


# ------------------------------------------------------------------- all stages and figures

def test_all_stages_make_what_the_cpu_makes_and_no_step_waits(on_gpu, tmp_path):
    """Teacher, judge, MAE, two releases and students: figures to the last bit, records to the last
    byte, with the log lines and checkpoints that users have."""
    make(tmp_path, STAGES, ALL, device=CPU)
    for row in ('.', 'originals'):
        assert differing(figures(on_gpu[0], row), figures(tmp_path, row)) == {}
    one, two = (folder / 'run/reconstructed/train.rec' for folder in (on_gpu[0], tmp_path))
    assert one.read_bytes() == two.read_bytes()
    attacked = {path.split('/')[2].split('_')[0] for path in figures(tmp_path) if 'rank1' in path}
    assert attacked | {'membership'} == set(ATTACKS) and len(on_gpu[1].steps) == 5
    check_steps(on_gpu[1])


@pytest.mark.parametrize('where', ['gallery', 'probes', *long('gallery and probes')])
def test_embeddings_on_the_host_change_no_figure(copied, monkeypatch, where):
    """Every attack takes either side from the host, where those of large sets are."""
    def embed_all(net, store, *args, joined=False, real=embed.embed_all, **kwargs):
        z = real(net, store, *args, joined=joined, **kwargs)
        kind = "an attacker's few pairs"
        if hasattr(store.chosen.images, 'source'):
            released = 'reconstructed' in str(store.chosen.images.source.path)
            kind = 'probes' if released else 'gallery'
        seen.add(kind)
        return z.to('cpu') if joined and kind in where else z

    before, seen = figures(copied), set()
    (copied / 'run/results.json').unlink()
    monkeypatch.setattr(embed, 'embed_all', embed_all)
    make(copied, [['evaluate']], ALL)
    assert differing(before, figures(copied)) == {} and seen >= {'probes', 'gallery'}


def test_fp16_trains_recognisers(on_gpu, tmp_path, monkeypatch):
    """As the optimizer does that is not fused: the first steps overflow, and leave no trace."""
    losses, real = [], torch.optim.SGD
    for name in ('fused', 'unfused'):
        if name == 'unfused':
            monkeypatch.setattr(torch.optim, 'SGD', lambda *args, fused, **options: real(
                *args, **options))
        make(on_gpu[0], [TEACHER], 'run.precision=fp16', 'teacher.epochs=5', 'run.log_every=1',
             f'run.folder={tmp_path}/{name}/run')
        losses.append([line['loss'] for line in log_lines(tmp_path / name, 'teacher/fold0')])
        scaler = torch.load(tmp_path / name / 'run/fold0/teacher.pt')['scaler']
        assert 1 < scaler['_growth_tracker'] < 9             # steps since the last that overflowed
    assert len(losses[0]) == 10 and np.isfinite(losses).all()
    np.testing.assert_allclose(losses[0], losses[1], rtol=1e-3)


def test_run_deterministic_is_kept(on_gpu, tmp_path):
    """No training takes what has no deterministic implementation, nor does what brings images to
    the size of a foreign teacher."""
    teacher = models.iresnet(10, 8, 32, 16)
    with torch.no_grad():
        teacher.train()(torch.randn(8, 3, 32, 32))
    torch.save(teacher.state_dict(), tmp_path / 'teacher.pt')
    make(on_gpu[0], [[*TEACHER, 'fr.augment=1'],
                     ['train_mae', TWO_LOSSES, f'teacher.checkpoint={tmp_path}/teacher.pt']],
         'run.deterministic=true', f'run.folder={tmp_path}')


@pytest.mark.long
@pytest.mark.parametrize('mode', ['precision=bf16', 'precision=fp16', 'deterministic=true'])
def test_all_stages_in_other_modes(tmp_path, mode):
    """With people for validation, and a release of JPEGs."""
    check_steps(make(tmp_path, STAGES, ALL, f'run.{mode}', 'data.validation=0.2',
                     'reconstruct.format=jpeg'))
    for row in ('.', 'originals'):
        numbers = [x for x in figures(tmp_path, row).values() if not isinstance(x, str)]
        assert len(numbers) > 100 and np.isfinite(numbers).all()


@pytest.mark.long
@pytest.mark.parametrize('method', PROTECTIONS)
def test_every_protection_is_that_of_the_cpu(copied, method):
    """Its records to the last byte, and figures of every attack, after a student of its own."""
    both, records = [], []
    for device in (GPU, CPU):
        shutil.rmtree(copied / 'run/reconstructed', ignore_errors=True)
        (copied / 'run/fr.pt').unlink(missing_ok=True)
        make(copied, [['reconstruct'], ['train_fr'], ['evaluate']], ALL,
             f'reconstruct.method={method}', 'reconstruct.mask_ratio=0.5', device=device)
        both.append(figures(copied))
        records.append((copied / 'run/reconstructed/train.rec').read_bytes())
    assert differing(*both) == {} and (method == 'facemae' or records[0] == records[1])


# ---------------------------------------------------------------------- a training's step

@pytest.mark.parametrize('more', ['fr.sample_rate=0.5', *long(
    '', 'fr.augment=1', 'fr.loss=cosface fr.norm_batch=8',
    'run.precision=bf16 fr.margin_gradient=straight_through')])
def test_a_recognisers_step_waits_for_nothing(on_gpu, tmp_path, more):
    """Where images are streamed, as they do not fit on the GPU."""
    check_steps(make(on_gpu[0], [TEACHER], f'run.folder={tmp_path}', *QUIET, *more.split(),
                     free=1000))


@pytest.mark.parametrize('more, cached', [
    ('irm.relations=l2 run.precision=bf16', True), ('mae.micro_batch=10', False),
    *long(*itertools.product((
        '', 'irm.relations=centred mae.mse_on=hidden', 'irm.weight=0',
        'irm.relations=direct reconstruct.paste_visible=true run.precision=fp16'),
        (True, False)))])
def test_a_step_of_the_mae_waits_for_nothing(on_gpu, tmp_path, monkeypatch, more, cached):
    """Where images are streamed, and the originals' embeddings are on the GPU or made anew."""
    real, made = train_mae.embed_originals, []
    monkeypatch.setattr(train_mae, 'embed_originals',
                        lambda *args: made.append(real(*args)) or made[0])
    check_steps(make(
        on_gpu[0], [['train_mae']], f'run.folder={tmp_path}', TWO_LOSSES, 'mae.epochs=3',
        f'teacher.checkpoint={on_gpu[0]}/run/fold0/teacher.pt', *QUIET, *more.split(),
        free=20_000 if cached else 1000))
    assert 'irm.weight=0' in more or (made[0] is not None) == cached


def test_a_stall_in_a_step_is_told_with_its_line(on_gpu, tmp_path, monkeypatch):
    def backward(self, loss, real=Training.backward):
        real(self, loss)
        loss.item()

    monkeypatch.setattr(Training, 'backward', backward)
    watch = make(on_gpu[0], [TEACHER], f'run.folder={tmp_path}', *QUIET)
    with pytest.raises(AssertionError, match=r'at train_fr\.py:\d+'):
        check_steps(watch)


# -------------------------------------------------------------------------- two processes

@pytest.mark.parametrize('everything', [False, *long(True)])
def test_two_processes_train_over_nccl(on_gpu, tmp_path, everything):
    """With divided and sampled classes, and with relations over both processes' images; nothing
    but tensors of the GPU goes over NCCL, and no step of either process waits."""
    words, folder = (GPU, f'run.folder={tmp_path}'), on_gpu[0]
    plan = [[*TEACHER, 'fr.shard_classes=true', 'fr.sample_rate=0.5', *words],
            ['train_mae', 'mae.micro_batch=4', TWO_LOSSES, *words]]
    if everything:
        other = ['train_mae', GPU, 'mae.name=all', 'mae.mask_ratio=0.0', 'irm.weight=0']
        folder, plan = tmp_path, [*([*words, GPU, ALL] for words in STAGES), other]
    noted = two_processes(folder, tmp_path, plan)
    for one in noted:
        assert one['faults'] == []
        assert [wait for wait in one['waits'] if wait.startswith('step') or 'NCCL' in wait] == []
    assert {'all_reduce over NCCL', 'all_reduce over gloo'} <= noted[0]['calls'].keys()
    over_nccl = [{name: count for name, count in one['calls'].items() if 'NCCL' in name}
                 for one in noted]
    # A share of the centres goes from each process to rank 0
    assert [x.pop(name, 0) for x, name in zip(over_nccl, ('recv over NCCL', 'send over NCCL'))]
    assert over_nccl[0] == over_nccl[1]


# -------------------------------------------------------------- what is noticed, and what not

def changed_too_early(x):
    host = torch.zeros(4, 3).pin_memory()
    x.copy_(host, non_blocking=True)
    host += 1
    x.sum().item()


def not_deterministic(x):
    torch.use_deterministic_algorithms(True)
    image = torch.randn(1, 1, 4, 4, device='cuda', requires_grad=True)
    F.adaptive_avg_pool2d(image, 2).sum().backward()


FAULTS = {
    'two devices': lambda x: x + torch.ones(4, 3),
    'a matrix of the host': lambda x: x @ torch.ones(3, 2),
    'indices of the GPU': lambda x: torch.ones(4)[torch.arange(2, device='cuda')],
    'added to the host': lambda x: torch.ones(4, 3).add_(x),
    'numpy': lambda x: x.numpy(),
    'a matrix product of integers': lambda x: x.long() @ x.long().T,
    'pinning what is on the GPU': lambda x: x.pin_memory(),
    'pinned memory changed too early': changed_too_early,
    'read before it is there': lambda x: x.to('cpu', non_blocking=True),
    'not deterministic': not_deterministic,
    'a tensor of the host over NCCL': lambda x: check_collective('all_reduce', [x.cpu()], None),
    'a tensor of the GPU over gloo': lambda x: check_collective('all_reduce', [x], 'gloo'),
    'columns over NCCL': lambda x: check_collective('all_reduce', [x[:, :2]], None),
}
STALLS = {
    'item': lambda x: x.sum().item(),
    'cpu': lambda x: x.cpu(), 'tolist': lambda x: x.tolist(), 'nonzero': lambda x: x.nonzero(),
    'mask': lambda x: x[x > 0], 'index of the host': lambda x: x[torch.arange(3)],
    'pageable, not blocking': lambda x: torch.arange(3).to('cuda', non_blocking=True),
    'pinned, blocking': lambda x: torch.arange(3).pin_memory().to('cuda'),
    'copy_': lambda x: x.copy_(torch.zeros(4, 3)),
    'torch.tensor': lambda x: torch.tensor(1.0, device='cuda'),
    'as_tensor': lambda x: torch.as_tensor([1.0, 2.0], device='cuda'),
    'svd': lambda x: torch.linalg.svd(x),
    'values where a mask says': lambda x: x.__setitem__(x > 0, x[x > 0]),
}
HARMLESS = {
    'a number of the host': lambda x: x * torch.tensor(2.0) + 1,
    'pinned, ahead': lambda x: batches.to_device(torch.arange(5), x.device) + 1,
    'slices': lambda x: x[1:, None] + x[:, :2].sum(),
    'one number where a mask says': lambda x: x.__setitem__(x > 0, 1.0),
    'indices of the GPU': lambda x: x[torch.arange(3, device='cuda')],
    'where': lambda x: torch.where(x > 0, x, 0.0),
}


@pytest.mark.parametrize('fault', FAULTS.values(), ids=FAULTS)
def test_a_fault_is_noticed(fault):
    with simcuda.device(), pytest.raises((RuntimeError, TypeError)):
        fault(torch.randn(4, 3, device='cuda'))
    torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize('name', [*STALLS, *HARMLESS])
def test_a_stall_is_noticed_and_no_other(name):
    with simcuda.device() as watch:
        (STALLS | HARMLESS)[name](torch.randn(4, 3, device='cuda'))
    assert bool(watch.waits) == (name in STALLS) and not watch.faults


def test_autocast_is_that_of_cuda():
    """Products in half precision, sums and norms in float32, the rest as it comes."""
    with simcuda.device(), torch.autocast('cuda', torch.bfloat16):
        x = torch.randn(4, 3, device='cuda')
        y = F.linear(x, x)
        assert y.device == simcuda.DEVICE and y.dtype == (y + 1).dtype == torch.bfloat16
        assert y.sum().dtype == F.normalize(y).dtype == torch.float32
