"""What a GPU would tell of the kit, told without one by the simulated device of simcuda.py.

No operation mixes devices or lacks a CUDA kernel, no step of a training makes the host wait for
the GPU, and figures are those of the CPU to the last bit. The device itself is tested by faults
and stalls that are planted.
"""
import contextlib
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
from conftest import TINY, differing, figures, log_lines
from facekit.base.config import namespace, resolve
from facekit.data import batches
from facekit.nets import embed
from facekit.nets.training import Training
from facekit.privacy.attacks import ATTACKERS
from facekit.privacy.protect import PROTECTIONS, Protection
from gpu_stages import STAGES, check_collective, stage, two_processes

ATTACKS = [name for name in ATTACKERS if name != 'dlib']      # which is a program of the host
ALL = f'evaluate.attacks=[{", ".join(ATTACKS)}]'
GPU, CPU = 'run.device=cuda', 'run.device=cpu'
QUIET = 'run.log_every=1000', 'run.save_minutes=1e9'
TEACHER = STAGES[0]
TWO_LOSSES = 'irm.warmup_epochs=0'


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


def check_steps(watch):
    """Between two log lines no step made the host wait."""
    assert watch.faults == [] and watch.steps and min(watch.steps.values()) > 2
    assert [(phase, wait) for phase, wait in watch.waits if phase in watch.steps] == []


# ------------------------------------------------------------------- all stages and figures

def test_all_stages_make_what_the_cpu_makes_and_no_step_waits(on_gpu, tmp_path):
    """Teacher, judge, MAE, two releases and students: figures to the last bit, records to the last
    byte, with the log lines and checkpoints that users have."""
    make(tmp_path, STAGES, ALL, device=CPU)
    gpu, cpu = on_gpu[0] / 'run', tmp_path / 'run'
    for row in ('results.json', 'originals/results.json'):
        assert differing(figures(gpu / row), figures(cpu / row)) == {}
    record = 'reconstructed/train.rec'
    assert (gpu / record).read_bytes() == (cpu / record).read_bytes()
    results = json.loads((cpu / 'results.json').read_text())
    assert {name.split('_')[0] for name in results['privacy']} == set(ATTACKS)
    assert len(on_gpu[1].steps) == 5
    check_steps(on_gpu[1])


@pytest.mark.parametrize('where', ['gallery', 'probes'])
def test_embeddings_on_the_host_change_no_figure(copied, monkeypatch, where):
    """Every attack takes either side from the host, where those of large sets are."""
    def embed_all(net, store, *args, joined=False, real=embed.embed_all, **kwargs):
        z = real(net, store, *args, joined=joined, **kwargs)
        if not joined or not hasattr(store.chosen.images, 'source'):
            return z                                           # an attacker's few pairs
        path = str(store.chosen.images.source.path)
        kind = 'probes' if 'reconstructed' in path else 'gallery'
        seen.add(kind)
        return z.to('cpu') if kind == where else z

    results, seen = copied / 'run/results.json', set()
    before = figures(results)
    results.unlink()
    monkeypatch.setattr(embed, 'embed_all', embed_all)
    make(copied, [['evaluate']], ALL)
    assert differing(before, figures(results)) == {} and seen == {'probes', 'gallery'}


def test_fp16_trains_recognisers(on_gpu, tmp_path):
    """The first steps overflow, and leave no trace."""
    make(on_gpu[0], [TEACHER], 'run.precision=fp16', 'teacher.epochs=5', 'run.log_every=1',
         f'run.folder={tmp_path}/run')
    losses = [line['loss'] for line in log_lines(tmp_path, 'teacher/fold0')]
    assert len(losses) == 10 and np.isfinite(losses).all()
    scaler = torch.load(tmp_path / 'run/fold0/teacher.pt')['scaler']
    assert 1 < scaler['_growth_tracker'] < 9             # steps since the last that overflowed


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


@pytest.mark.parametrize('method', sorted(set(PROTECTIONS) - {'facemae', 'none'}))
def test_every_protection_is_that_of_the_cpu(method):
    cfg = namespace(resolve(TINY, [f'reconstruct.method={method}', 'reconstruct.mask_ratio=0.5']))
    images, seeds = torch.randint(0, 256, (5, 32, 32, 3), dtype=torch.uint8), torch.arange(5)
    with simcuda.device():
        released = Protection(cfg, None)(images.to('cuda'), seeds.to('cuda')).cpu()
    assert (released.int() - Protection(cfg, None)(images, seeds)).abs().max() <= 1


@pytest.mark.long
@pytest.mark.parametrize('mode', ['precision=bf16', 'precision=fp16', 'deterministic=true'])
def test_all_stages_in_other_modes(tmp_path, mode):
    """With people for validation, and a release of JPEGs."""
    check_steps(make(tmp_path, STAGES, ALL, f'run.{mode}', 'data.validation=0.2',
                     'reconstruct.format=jpeg'))
    for row in ('.', 'originals'):
        found = figures(tmp_path / 'run' / row / 'results.json').values()
        assert np.isfinite([x for x in found if isinstance(x, float)]).all()


# ---------------------------------------------------------------------- a training's step

@pytest.mark.parametrize('more', [
    'fr.sample_rate=0.5', 'fr.augment=1 run.precision=bf16 fr.margin_gradient=straight_through'])
def test_a_recognisers_step_waits_for_nothing(on_gpu, tmp_path, more):
    """Where images are streamed, as they do not fit on the GPU."""
    check_steps(make(on_gpu[0], [TEACHER], f'run.folder={tmp_path}', *QUIET, *more.split(),
                     free=1000))


@pytest.mark.parametrize('more, cached', [
    ('irm.relations=l2 run.precision=bf16', True),
    ('irm.relations=centred mae.micro_batch=10', False),
    ('irm.relations=direct reconstruct.paste_visible=true run.precision=fp16', True)])
def test_a_step_of_the_mae_waits_for_nothing(on_gpu, tmp_path, monkeypatch, more, cached):
    """Where images are streamed, and the originals' embeddings are on the GPU or made anew."""
    real, made = train_mae.embed_originals, []
    monkeypatch.setattr(train_mae, 'embed_originals',
                        lambda *args: made.append(real(*args)) or made[0])
    check_steps(make(
        on_gpu[0], [['train_mae']], f'run.folder={tmp_path}', TWO_LOSSES, 'mae.epochs=3',
        f'teacher.checkpoint={on_gpu[0]}/run/fold0/teacher.pt', *QUIET, *more.split(),
        free=20_000 if cached else 1000))
    assert (made[0] is not None) == cached


def test_a_stall_in_a_step_is_told_with_its_line(on_gpu, tmp_path, monkeypatch):
    def backward(self, loss, real=Training.backward):
        real(self, loss)
        loss.item()

    monkeypatch.setattr(Training, 'backward', backward)
    watch = make(on_gpu[0], [TEACHER], f'run.folder={tmp_path}', *QUIET)
    with pytest.raises(AssertionError, match=r'at train_fr\.py:\d+'):
        check_steps(watch)


# -------------------------------------------------------------------------- two processes

@pytest.mark.parametrize('everything', [False, pytest.param(True, marks=pytest.mark.long)])
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
