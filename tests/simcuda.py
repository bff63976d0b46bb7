"""A CUDA device without a GPU: tensors that say cuda:0 and hold a tensor of the CPU.

    with simcuda.device() as watch:
        x = torch.ones(3, device='cuda')
        x + torch.ones(3)                # RuntimeError, as on a GPU
        float(x.sum())                   # watch.waits tells which line made the host wait

Every operation runs on the CPU under CUDA's rules: one device in an operation (a single number of
the host may join pointwise ones), CUDA's autocast, nothing that CUDA lacks or that is not
deterministic where that is asked for. Values exist: results can be compared with the CPU's.
It cannot see kernels, streams, memory limits, or code that is compiled for GPUs.
"""
import collections
import contextlib
import functools
import os
import sys
from pathlib import Path

import pytest
import torch
import torch.optim.optimizer as torch_optimizer
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map

aten = torch.ops.aten
ROOT = Path(__file__).parent.parent
DEVICE = torch.device('cuda', 0)         # of this process
# Operations that read values of the device, or whose output's size depends on them
READS = {'_local_scalar_dense', 'equal', 'allclose', 'nonzero', 'masked_select', '_unique2',
         'bincount', 'histc', 'repeat_interleave', '_linalg_svd', '_linalg_eigh', 'linalg_inv_ex'}
# Not tagged pointwise, but take a number of the host
SCALARS = 'fill', 'masked_fill', 'where', 'index_put', '_foreach_', '_fused_'
NO_INTEGERS = {'mm', 'addmm', 'bmm', 'baddbmm', 'mv', 'addmv', 'dot', 'convolution', 'linear'}
# By the documentation of torch.use_deterministic_algorithms
NOT_DETERMINISTIC = {
    '_adaptive_avg_pool2d_backward', 'adaptive_max_pool2d_backward', 'reflection_pad2d_backward',
    'upsample_bilinear2d_backward', 'upsample_bicubic2d_backward', 'grid_sampler_2d_backward',
    'nll_loss2d_forward', 'put_', 'histc', 'bincount', 'kthvalue', 'median'}
# Of the operations that CUDA's autocast knows, those in half precision; the others take float32
LOWER = {'conv1d', 'conv2d', 'conv3d', 'convolution', '_convolution', 'prelu', 'linear', 'matmul',
         'mm', 'mv', 'bmm', 'addmm', 'addmv', 'baddbmm', 'einsum', 'linalg_vecdot'}


class Watch:
    """What is noted of one use of the device. Phase and steps are set from outside."""

    def __init__(self):
        self.phase = ''                         # of the kit's work
        self.steps = collections.Counter()      # {phase: steps of a training}
        self.waits = collections.Counter()      # {(phase, 'what at place'): waits of the host}
        self.faults = []                        # what no CUDA device would do
        self.pending = []                       # (source, its content then): may still be copied

    def wait(self, what):
        """The host waits for the device, so that every copy is done."""
        self.waits[self.phase, f'{what} at {place()}'] += 1
        pending, self.pending = self.pending, []
        if any(not torch.equal(source, content) for source, content in pending):
            self.fault('pinned memory was changed before it was copied')

    def fault(self, text):
        self.faults.append(f'{self.phase}: {text} at {place()}')
        raise RuntimeError(self.faults[-1])

    def copy(self, source, to_gpu, ahead, name):
        """A copy between host and device; ahead: non_blocking."""
        if ahead and getattr(source, 'pinned', False):
            self.pending.append((source, source.clone()))
        elif ahead and not to_gpu:
            self.fault('read back with non_blocking, before it is there')
        else:
            self.wait(f'{name} {"of pageable memory" if to_gpu else "to the host"}')


watch = Watch()


def place():
    """The innermost line of the kit that leads here: 'embed.py:120'."""
    frame = sys._getframe(2)
    while frame:
        path = Path(frame.f_code.co_filename)
        if path.parent == ROOT or ROOT / 'facekit' in path.parents:
            return f'{path.name}:{frame.f_lineno}'
        frame = frame.f_back
    return 'the tests'


class Cuda(torch.Tensor):
    """A tensor on the simulated device; .inner is a plain one in the same memory.

    To C++ it lies on the CPU, as the autograd engine would look for streams elsewhere; but CUDA's
    autocast acts on it, and to Python it lies on the device.
    """
    device = property(lambda self: DEVICE)
    is_cuda, is_cpu = property(lambda self: True), property(lambda self: False)
    __torch_function__ = torch._C._disabled_torch_function_impl

    @staticmethod
    def __new__(cls, inner):
        self = torch.Tensor._make_subclass(cls, inner, False, device_for_backend_keys=DEVICE)
        self.inner = inner
        return self

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        return execute(func, args, kwargs or {})

    def numpy(self, *options, **more):
        raise TypeError("can't convert cuda:0 device type tensor to numpy. Use Tensor.cpu()")

    __array__ = numpy

    def tolist(self):
        watch.wait('tolist')
        return self.inner.tolist()

    def cpu(self, *options):
        return self.to('cpu')

    def __deepcopy__(self, memo):
        if id(self) not in memo:
            memo[id(self)] = copy = Cuda(self.inner.clone()).requires_grad_(self.requires_grad)
            copy.__dict__.update({k: v for k, v in self.__dict__.items() if k != 'inner'})
        return memo[id(self)]


class Device(TorchDispatchMode):
    """While inside, device='cuda' makes Cuda tensors."""
    # Else torch would import its compiler, for seconds
    _should_skip_dynamo = classmethod(lambda cls: False)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        return execute(func, args, kwargs or {})


def on_gpu(x):
    return isinstance(x, Cuda)


def tensors_in(x):
    if isinstance(x, (list, tuple)):
        return [tensor for y in x for tensor in tensors_in(y)]
    return [x] if isinstance(x, torch.Tensor) else []


def inner(x):
    if isinstance(x, (list, tuple)):
        return [inner(y) for y in x]
    return x.inner if on_gpu(x) else x


def outer(x, arguments):
    """A result on the device; arguments {id of the CPU tensor: tensor of the device}, of which one
    is the result of what works in place."""
    if isinstance(x, (list, tuple)):
        return type(x)([outer(y, arguments) for y in x])
    if id(x) in arguments:
        return arguments[id(x)]
    return Cuda(x) if isinstance(x, torch.Tensor) else x


# ---------------------------------------------------------------------------- operations

def execute(func, args, kwargs):
    """An operation's result, after it was checked against CUDA's rules."""
    name, tensors = func.overloadpacket.__name__, tensors_in([args, [*kwargs.values()]])
    any_on_gpu, asked = any(map(on_gpu, tensors)), kwargs.get('device')
    # For a tensor of the device, C++ asks for the device that it sees: the CPU
    to_gpu = any_on_gpu or asked is not None and torch.device(asked).type == 'cuda'
    if not to_gpu:
        return func(*args, **kwargs)
    if name in ('_to_copy', 'copy_'):
        source, ahead = args[0], kwargs.get('non_blocking', False)
        if name == 'copy_':
            to_gpu, source = on_gpu(args[0]), args[1]
            ahead = args[2] if len(args) > 2 else ahead
        if on_gpu(source) != to_gpu:
            watch.copy(source, to_gpu, ahead, name)
    elif any_on_gpu:
        check(func, name, args, tensors)
    plain = {k: inner(x) for k, x in kwargs.items() if k != 'pin_memory'}
    if asked is not None:
        plain['device'] = torch.device('cpu')
    out = func(*inner(args), **plain)
    if to_gpu and 'empty' in name:          # a GPU's memory holds what was there before
        out.fill_(torch.nan if out.is_floating_point() else 77)
    return outer(out, {id(x.inner): x for x in tensors if on_gpu(x)}) if to_gpu else out


def check(func, name, args, tensors):
    """CUDA's rules on what may meet in an operation, and what makes the host wait."""
    indices = []
    if name in ('index', 'index_put', 'index_put_', '_unsafe_index', '_index_put_impl_'):
        indices = [x for x in args[1] if x is not None]
        if not on_gpu(args[0]):
            watch.fault(f'{name}: indices on cuda, indexed tensor on the cpu')
    # The host must know how many rows a mask takes, but not where they are set to one number
    sets_number = indices and len(args) > 2 and not on_gpu(args[2]) and args[2].numel() == 1
    for index in indices:
        if not on_gpu(index):
            watch.copy(index, True, False, f'{name}: index')
        if index.dtype in (torch.bool, torch.uint8) and not sets_number:
            watch.wait(f'{name}: boolean index')
    pointwise = torch.Tag.pointwise in func.tags or name.startswith(SCALARS)
    for x in tensors:
        if not on_gpu(x) and not any(x is index for index in indices) and (
                x.ndim or not pointwise or x is args[0] and name.endswith('_')):
            watch.fault(f'{name}: one is on cuda, on the cpu is one of shape {tuple(x.shape)}')
    if name in READS:
        watch.wait(name)
    if not has_kernel(func):
        watch.fault(f'{func} has no CUDA kernel')
    if name in NO_INTEGERS and any(not x.dtype.is_floating_point for x in tensors):
        watch.fault(f'"{name}_cuda" not implemented for integers')
    if name in NOT_DETERMINISTIC and torch.are_deterministic_algorithms_enabled():
        watch.fault(f'{name} does not have a deterministic implementation')


@functools.cache
def has_kernel(func):
    name = func._schema.name + ('.' + func._schema.overload_name).rstrip('.')
    unknown = 'for_cpu' in name or not torch.backends.cuda.is_built()
    return unknown or torch._C._dispatch_has_computed_kernel_for_dispatch_key(name, 'CUDA')


def cast(op, *args, **kwargs):
    """What CUDA's autocast does before `op`; torch's own kernels look for a C++ device."""
    lower = op.overloadpacket.__name__ in LOWER
    dtype = torch.get_autocast_dtype('cuda') if lower else torch.float32

    def change(x):
        floats = on_gpu(x) and x.is_floating_point() and x.dtype != torch.float64
        return x.to(dtype) if floats else x

    with torch._C._ExcludeDispatchKeyGuard(
            torch._C.DispatchKeySet(torch._C.DispatchKey.AutocastCUDA)):
        args, kwargs = tree_map(change, (args, kwargs))
        return op(*args, **kwargs)


def register_casts(library):
    """cast() before every operation that CUDA's autocast knows."""
    for key in torch._C._dispatch_get_all_op_names():
        known = torch._C._dispatch_has_kernel_for_dispatch_key(key, 'AutocastCUDA')
        if known and key.startswith('aten::'):
            name, _, overload = key.removeprefix('aten::').partition('.')
            op = getattr(getattr(aten, name), overload or 'default')
            library.impl(op, functools.partial(cast, op))


# ------------------------------------------------------------------- what needs a driver

def to(self, *args, original=torch.Tensor.to, **kwargs):
    if args and on_gpu(args[0]):
        args = (args[0].device, args[0].dtype, *args[1:])
    if not on_gpu(self) and 'cuda' not in str((args, kwargs)):
        return original(self, *args, **kwargs)
    always = kwargs.pop('copy', False)
    where, dtype, ahead, order = torch._C._nn._parse_to(*args, **kwargs)
    options = {'dtype': dtype or self.dtype, 'memory_format': order}
    if not on_gpu(self):
        return aten._to_copy.default(self, device=DEVICE, non_blocking=ahead, **options)
    if where is not None and where.type == 'cpu':        # no gradient goes this way in the kit
        watch.copy(self, False, ahead, 'to')
        return aten._to_copy.default(self.inner, **options)
    if not always and options['dtype'] == self.dtype and (
            order in (None, torch.preserve_format) or self.is_contiguous(memory_format=order)):
        return self
    return aten._to_copy.default(self, **options)


def pin_memory(x, device=None):
    """A copy that is called pinned."""
    if on_gpu(x):
        watch.fault('only CPU tensors can be pinned')
    copy = x.clone()
    copy.pinned = True
    return copy


def made(real):
    """torch.tensor or torch.as_tensor, which copy numbers of the host to a device."""
    def make(data, *, device=None, **options):
        x = data if on_gpu(data) else real(data, **options)
        return x if device is None else x.to(device)
    return make


def grouped(*args, original=torch_optimizer._group_tensors_by_device_and_dtype, **kwargs):
    """An optimizer's tensors by device; to C++, all lie on the CPU."""
    groups = {}
    for (device, dtype), group in original(*args, **kwargs).items():
        groups[DEVICE if any(map(on_gpu, tensors_in(group[0]))) else device, dtype] = group
    return groups


def attention(q, k, v, attn_mask=None, dropout_p=0.0, is_causal=False, scale=None):
    """What the flash attention of a GPU does and keeps for the backward pass."""
    if torch.is_autocast_enabled('cuda') and on_gpu(q):
        q, k, v = (x.to(torch.get_autocast_dtype('cuda')) for x in (q, k, v))
    return aten._scaled_dot_product_flash_attention_for_cpu(
        q, k, v, dropout_p, is_causal, attn_mask=attn_mask, scale=scale)[0]


def save(x, *more, real=torch.save, **options):
    """torch.save, whose files the kit reads with map_location='cpu'."""
    real(tree_map(lambda t: t.inner.clone() if on_gpu(t) else t, x), *more, **options)


@contextlib.contextmanager
def device(free=140 << 30):
    """Let torch, in this thread, have GPUs with `free` bytes; returns the Watch."""
    global watch, DEVICE
    watch, DEVICE = Watch(), torch.device('cuda', int(os.environ.get('LOCAL_RANK', 0)))
    answers = {'is_available': True, 'device_count': 8, 'set_device': None, '_lazy_init': None,
               'manual_seed_all': None, 'get_device_name': 'NVIDIA simulated',
               'mem_get_info': (free, 141 << 30), 'memory_reserved': 0, 'memory_allocated': 0,
               'max_memory_allocated': 0, 'is_bf16_supported': True,
               'is_current_stream_capturing': False}
    stand_ins = {(torch.cuda, name): lambda *_, answer=answer, **__: answer
                 for name, answer in answers.items()} | {
        (torch, 'save'): save, (torch, 'tensor'): made(torch.tensor),
        (torch, 'as_tensor'): made(torch.as_tensor), (torch.Tensor, 'to'): to,
        (torch.Tensor, 'pin_memory'): pin_memory,
        (torch.nn.functional, 'scaled_dot_product_attention'): attention,
        (torch_optimizer, '_group_tensors_by_device_and_dtype'): grouped,
        (torch_optimizer.Optimizer, '_accelerator_graph_capture_health_check'): lambda self: None,
        # Else a module's parameters would keep their type and take the memory alone
        (torch.__future__, '_overwrite_module_params_on_conversion'): True}
    with pytest.MonkeyPatch.context() as patch, Device():
        for (owner, name), value in stand_ins.items():
            patch.setattr(owner, name, value, raising=False)
        library = torch.library.Library('aten', 'IMPL', 'AutocastCUDA')
        register_casts(library)
        try:
            yield watch
        finally:
            library._destroy()
            watch = Watch()
