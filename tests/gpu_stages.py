"""Drives the kit's stages in this process, on the simulated GPU of simcuda.py or on the CPU.

And in two processes on simulated GPUs, over a simulated NCCL, which takes tensors of a GPU only.
"""
import collections
import contextlib
import faulthandler
import importlib
import json
import os
import signal
import traceback

import pytest
import torch
import torch.distributed as dist

import simcuda
from conftest import ROOT, TINY, free_port, in_processes
from facekit.base import process
from facekit.base.config import namespace, resolve
from facekit.base.launch import Stop, leave
from facekit.nets import training
from facekit.report import pictures

STAGES = [['train_fr', 'stage=teacher'], ['train_fr', 'stage=judge'], ['train_mae', '--compare'],
          ['reconstruct', '--compare'], ['train_fr', '--compare'], ['evaluate', '--compare']]
# Smaller than tests/tiny.yaml, as every operation on the simulated GPU takes a while
SMALL = ['data.size=16', 'mae.patch=4', 'mae.batch=16', 'mae.epochs=4', 'fr.batch=8',
         'fr.norm_batch=4', 'fr.epochs=2', 'teacher.epochs=2', 'judge.epochs=2',
         'toy.identities=10', 'toy.images=4', 'toy.test_identities=8', 'toy.test_pairs=20',
         'evaluate.attack_steps=2', 'compare={originals: [reconstruct.method=none]}']
# Collectives that the simulated NCCL knows, and which of their arguments are tensors
TENSORS = {'all_reduce': [0], 'all_gather': [0, 1], 'broadcast': [0], 'send': [0], 'recv': [0],
           'barrier': [], 'broadcast_object_list': [], 'gather_object': [],
           'all_gather_object': []}
OTHERS = ['reduce', 'gather', 'scatter', 'isend', 'irecv', 'reduce_scatter', 'all_to_all',
          'all_gather_into_tensor', 'reduce_scatter_tensor', 'all_to_all_single']


def stage(folder, script, *words):
    """What `python script.py words` does; `folder` has the run folder, the faces and a cache."""
    paths = [f'run.folder={folder}/run', f'data.root={folder}/faces', f'toy.root={folder}/faces',
             f'evaluate.sets=[{folder}/faces/toy.bin]',
             f'reconstruct.key={ROOT}/configs/toy.key']      # else each run hides other patches
    assignments = [word for word in words if word != '--compare']
    cfg = namespace(resolve(TINY, [*SMALL, *paths, *assignments]))
    torch.use_deterministic_algorithms(False)         # which an earlier one may have asked for
    simcuda.watch.phase = script
    importlib.import_module(script).main(cfg, process.start_processes(cfg), '--compare' in words)


@contextlib.contextmanager
def stages(patch):
    """While inside, stages can run and tell a Watch what they do; what they set is set back.

    patch: pytest's MonkeyPatch.
    """
    tell_steps(patch)
    for curves in ('save_roc', 'save_tradeoff'):               # which are drawn on the host alone
        patch.setattr(pictures, curves, lambda *_: None)
    patch.setenv('CUBLAS_WORKSPACE_CONFIG', ':4096:8')
    threads, cuda, cudnn = torch.get_num_threads(), torch.backends.cuda, torch.backends.cudnn
    before = cuda.matmul.allow_tf32, cudnn.allow_tf32, cudnn.benchmark
    yield
    Stop.end()
    signal.signal(signal.SIGINT, signal.default_int_handler)
    torch.set_num_threads(threads)
    torch.use_deterministic_algorithms(False)
    cuda.matmul.allow_tf32, cudnn.allow_tf32, cudnn.benchmark = before


def tell_steps(patch):
    """Let the phase of a Watch be a training's step, its log line or checkpoint, or a picture.

    The first step, which also fills caches, counts as the beginning of the stage.
    """
    def followed(name, phase):
        real = getattr(training.Training, name)

        def method(self, *args, **kwargs):
            result = real(self, *args, **kwargs)
            simcuda.watch.phase = f'{phase(result)} of {self.path.parent.name}/{self.path.name}'
            if name == 'update':
                simcuda.watch.steps[simcuda.watch.phase] += 1
            return result
        patch.setattr(training.Training, name, method)

    for name, phase in {
            'update': lambda _: 'step', 'log_due': lambda due: 'log line' if due else 'step',
            'save_due': lambda due: 'checkpoint' if due else 'step', 'save': lambda _: 'step',
            'end': lambda _: 'end'}.items():
        followed(name, phase)

    def save_grid(*args, real=pictures.save_grid, **kwargs):
        before, simcuda.watch.phase = simcuda.watch.phase, 'picture'
        real(*args, **kwargs)
        simcuda.watch.phase = before

    patch.setattr(pictures, 'save_grid', save_grid)


# ------------------------------------------------------------------------- two processes

def check_collective(op, tensors, group):
    """What NCCL, or gloo where a group is named, refuses."""
    for x in tensors:
        if group is not None and simcuda.on_gpu(x):
            simcuda.watch.fault(f'{op} over gloo with a cuda tensor')
        if group is None and not simcuda.on_gpu(x):
            simcuda.watch.fault(f'{op} over NCCL: tensors must be CUDA and dense')
        if group is None and op not in ('send', 'recv') and not (
                x.is_contiguous() or x.ndim == 4
                and x.is_contiguous(memory_format=torch.channels_last)):
            simcuda.watch.fault(f'{op} over NCCL: tensors must be contiguous')


def simulate_nccl(patch):
    """Let torch.distributed have NCCL on the simulated GPU, and gloo where a group is named."""
    calls = collections.Counter()                    # {'op over NCCL': how often}

    def watched(op, real):
        def call(*args, group=None, **kwargs):
            tensors = simcuda.tensors_in([args[i] for i in TENSORS[op]])
            check_collective(op, tensors, group)
            calls[f'{op} over {"gloo" if group else "NCCL"}'] += 1
            if group is None and not tensors:
                simcuda.watch.wait(f'{op} over NCCL')
            plain = [simcuda.inner(x) if i in TENSORS[op] else x for i, x in enumerate(args)]
            return real(*plain, group=group, **kwargs)
        return call

    def unknown(*args, **kwargs):
        raise NotImplementedError('teach tests/gpu_stages.py this collective first')

    def begin(backend, device_id, real=dist.init_process_group, **options):
        assert backend == 'nccl' and device_id == simcuda.DEVICE
        real('gloo', **options)

    for op in TENSORS:
        patch.setattr(dist, op, watched(op, getattr(dist, op)))
    for op in OTHERS:
        patch.setattr(dist, op, unknown)
    patch.setattr(dist, 'init_process_group', begin)
    patch.setattr(process, 'DistributedDataParallel', Averaged)
    return calls


class Averaged(torch.nn.Module):
    """DistributedDataParallel: the gradients' mean in the backward pass that asks for it, and its
    complaint where a parameter got none."""

    def __init__(self, module, gradient_as_bucket_view=False):
        super().__init__()
        self.module, self.require_backward_grad_sync, self.waiting = module, True, set()
        self.own = [p for p in module.parameters() if p.requires_grad]
        for x in (*module.parameters(), *module.buffers()):
            dist.broadcast(x.detach(), 0)
        for p in self.own:
            p.register_post_accumulate_grad_hook(self.ready)

    def forward(self, *args):
        if torch.is_grad_enabled() and self.require_backward_grad_sync:
            if self.waiting:
                simcuda.watch.fault(f'DDP: {len(self.waiting)} parameters got no gradient')
            self.waiting = {id(p) for p in self.own}
        return self.module(*args)

    def ready(self, p):
        if self.require_backward_grad_sync:
            self.waiting.discard(id(p))
            if not self.waiting:
                torch.autograd.Variable._execution_engine.queue_callback(self.average)

    def average(self):
        for p in self.own:
            dist.all_reduce(p.grad)
            p.grad.div_(dist.get_world_size())


def one_process(rank, port, folder, notes, plan):
    """One of two processes, which makes the stages of a plan and writes what it noted."""
    faulthandler.dump_traceback_later(300, exit=True)
    os.environ |= {'RANK': f'{rank}', 'LOCAL_RANK': f'{rank}', 'WORLD_SIZE': '2',
                   'LOCAL_WORLD_SIZE': '2', 'MASTER_ADDR': '127.0.0.1', 'MASTER_PORT': f'{port}'}
    patch = pytest.MonkeyPatch()
    try:
        with stages(patch), simcuda.device() as watch:
            calls = simulate_nccl(patch)
            for words in plan:
                stage(folder, *words)
            process.barrier()
        waits = {f'{phase}: {what}': count for (phase, what), count in watch.waits.items()}
        (notes / f'{rank}.json').write_text(json.dumps(
            {'faults': watch.faults, 'calls': calls, 'waits': waits}))
        leave(0)
    except Exception:
        traceback.print_exc()
        leave(1)                       # at once: to wait for the other one would be for ever


def two_processes(folder, notes, plan):
    """What each of two processes noted of the stages of a plan, [[script, word, ...], ...]:
    {'faults': [...], 'calls': {...}, 'waits': {...}}. notes: folder for that."""
    in_processes(one_process, 2, free_port(), folder, notes, plan)
    return [json.loads((notes / f'{rank}.json').read_text()) for rank in range(2)]
