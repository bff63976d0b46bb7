"""Between two log lines no training step makes the host wait for the device.

The device is torch's "meta": what lives there has a shape and no content, so that reading a number
back, for a decision or a length, is an error of its own. What goes there is watched.
"""
import contextlib
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import models
import train_fr
import train_mae
from conftest import TINY
from facekit import batches, run
from facekit.config import namespace, resolve, variants
from facekit.faces import FaceSet
from facekit.split import Fold
from facekit.training import Training

META = torch.device('meta')


class NoStall(TorchDispatchMode):
    """Fails where the host's numbers go to the device in a way that waits for it."""
    pinned = frozenset()
    copies = 0                     # pinned ones, which do not wait

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        inside = [x for x in tree_leaves((args, kwargs)) if torch.is_tensor(x)]
        out = func(*args, **kwargs)
        devices = {x.device for x in (*inside, *tree_leaves(out)) if torch.is_tensor(x)}
        # The kernels of a GPU take a single number of the host as their argument, without a copy
        hosts = [x for x in inside if x.device.type == 'cpu'
                 and (x.ndim or 'copy' in func.__name__)]
        if META in devices and hosts:
            asynchronous = func.__name__.startswith('_to_copy') and kwargs.get('non_blocking')
            if not asynchronous or hosts[0].data_ptr() not in self.pinned:
                raise AssertionError(f'{func} waits until the device has done all its work')
            self.copies += 1
        return out


@pytest.fixture
def on_meta(monkeypatch):
    """Lets the training scripts run on the meta device; returns a watch of pinned memory."""
    pinned = set()

    def pin_memory(tensor):
        pinned.add(tensor.data_ptr())
        return tensor

    def tensor_of(data, real=torch.tensor, **options):
        assert torch.device(options.get('device') or 'cpu') != META, "of the host's numbers"
        return real(data, **options)

    monkeypatch.setattr(torch, 'tensor', tensor_of)
    monkeypatch.setattr(torch.Tensor, 'pin_memory', pin_memory)
    monkeypatch.setattr(torch, 'autocast', lambda *_, **__: contextlib.nullcontext())
    monkeypatch.setattr(NoStall, 'pinned', pinned)
    yield
    run.Stop.end()


def faces(count=120):
    images = np.random.default_rng(0).integers(0, 256, (count, 32, 32, 3), np.uint8)
    return FaceSet(Path('drawn'), images, np.arange(count) % 20, np.arange(20).astype(str),
                   np.arange(count, dtype=np.uint64), [])


def config(folder, *assignments):
    return variants(namespace(resolve(TINY, [
        f'run.folder={folder}', 'run.log_every=1000', 'run.save_minutes=1e9', 'fr.epochs=1e3',
        'mae.epochs=1e3', 'mae.mean_face=false', 'mae.preview_epochs=0', *assignments])), False)[0]


class Enough(Exception):
    """Ends a training after some steps."""


def check(monkeypatch, train, *arguments):
    """The second to fourth step of a training, of which each may copy its indices and images."""
    watch, update = NoStall(), Training.update
    with contextlib.ExitStack() as stack:
        def watched(training, losses, learning_rate):
            update(training, losses, learning_rate)
            if training.step == 1:
                stack.enter_context(watch)
            if training.step == 4:
                raise Enough

        monkeypatch.setattr(Training, 'update', watched)
        with pytest.raises(Enough):
            train(*arguments)
    assert 3 <= watch.copies <= 9


@pytest.mark.parametrize('more', [[], ['fr.augment=1'], ['fr.sample_rate=0.5'],
                                  ['fr.loss=cosface', 'fr.norm_batch=16']])
def test_a_recognisers_step(on_meta, tmp_path, monkeypatch, more):
    cfg, drawn = config(tmp_path, *more).cfg, faces()
    student = train_fr.Recogniser('student', tmp_path / 'fr.pt', drawn, np.arange(len(drawn)), 10,
                                  8, 1e3, 0, [], 'fr')
    check(monkeypatch, train_fr.train, cfg, student, META)


@pytest.mark.parametrize('more', [[], ['mae.micro_batch=10'], ['irm.relations=l2'],
                                  ['irm.relations=centred', 'mae.mse_on=hidden'],
                                  ['irm.relations=direct', 'reconstruct.paste_visible=true'],
                                  ['irm.weight=0', 'irm.images_per_identity=4']])
@pytest.mark.parametrize('cached', [True, False])
def test_a_step_of_the_mae(on_meta, tmp_path, monkeypatch, more, cached):
    teacher = models.folded(models.iresnet(10, 8, 32, 16)).to(META)
    monkeypatch.setattr(train_mae, 'load_teacher', lambda *_: (teacher, 'digest'))
    if not cached:
        monkeypatch.setattr(train_mae, 'embed_originals', lambda *_: None)
    variant, drawn, none = config(tmp_path, 'irm.warmup_epochs=0', *more), faces(), np.arange(0)
    fold = Fold(0, drawn, drawn, none, np.arange(len(drawn)), none, none)
    check(monkeypatch, train_mae.train, variant, fold, META)


@pytest.mark.parametrize('stall', [
    lambda x: x.sum().item(), lambda x: bool(x[0] > 0), lambda x: x.cpu(), lambda x: x.nonzero(),
    lambda x: x[x > 0], lambda x: torch.tensor(1.0, device=META), lambda x: x[torch.arange(3)],
    lambda x: torch.arange(3).to(META), lambda x: torch.arange(3).to(META, non_blocking=True),
    lambda x: x.copy_(torch.zeros(5)), lambda x: torch.from_numpy(np.zeros(5)).to(META) + x])
def test_a_stall_is_noticed(on_meta, stall):
    with NoStall(), pytest.raises((RuntimeError, NotImplementedError, AssertionError)):
        stall(torch.empty(5, device=META))
    with NoStall() as watch:
        batches.to_device(torch.arange(5), META) + 1
    assert watch.copies == 1
