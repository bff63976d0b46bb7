"""What several processes share: their number, the device, what they tell each other."""
import contextlib
import datetime
import os
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

from facekit.base import files, machine
from facekit.base.errors import InputError, printable
from facekit.base.machine import cores

TIMEOUT = datetime.timedelta(days=1)    # of who waits for rank 0, which may look at 42 M images


class Group:
    """The processes of this run."""
    host = None              # all of them over gloo: to wait there keeps GPU and core idle
    alone = False            # whether this process counts as the only one: see alone()


def rank():
    """Number of this process, 0 .. world() - 1."""
    return dist.get_rank() if world() > 1 else 0


def world():
    """Number of processes of this run."""
    return dist.get_world_size() if dist.is_initialized() and not Group.alone else 1


@contextlib.contextmanager
def alone():
    """While inside, world() is 1, and nothing (barrier, only_writer, ...) waits for others."""
    before, Group.alone = Group.alone, True
    try:
        yield
    finally:
        Group.alone = before


def on_rank_0(do):
    """What do() returns, on all processes; rank 0 calls it alone, while the others wait."""
    value = None
    if rank() == 0:
        with alone():
            value = do()
    return broadcast(value)


def barrier():
    """Wait until all processes have come here."""
    if world() > 1:
        dist.barrier(group=Group.host)


def broadcast(value):
    """The value that rank 0 has, on all processes; any picklable object."""
    values = [value]
    if world() > 1:
        dist.broadcast_object_list(values, 0, group=Group.host)
    return values[0]


def agree_on(net):
    """Give all processes the weights of rank 0, as GPUs may have rounded differently."""
    if world() > 1:
        for value in net.state_dict().values():
            dist.broadcast(value, 0)


def collect(value):
    """The values of all processes, any picklable objects, in rank order on rank 0; else None."""
    if world() == 1:
        return [value]
    values = [None] * world() if rank() == 0 else None
    dist.gather_object(value, values, group=Group.host)
    return values


def say(text):
    """Print on rank 0 only."""
    if rank() == 0:
        if sys.stdout.isatty():
            print('\r\x1b[K', end='')        # the live line of a stage (log.py)
        print('\n'.join(printable(line) for line in str(text).split('\n')), flush=True)


def on_this_node():
    """Number of processes of this run that share this machine."""
    return from_launcher('LOCAL_WORLD_SIZE', from_launcher('WORLD_SIZE', 1))


def from_launcher(name, default):
    """The number that a launcher such as torchrun sets in the environment."""
    text = os.environ.get(name, '').strip()
    if text and not text.isdecimal():
        raise InputError(f'{name} = {text!r} in the environment is no number: start the script '
                         f'with torchrun, or unset {name}')
    return int(text or default)


def start_processes(cfg):
    """Join the other processes that torchrun started, if any; returns this one's device."""
    wanted = from_launcher('WORLD_SIZE', 1)
    if wanted > 1 and not {'RANK', 'MASTER_ADDR', 'MASTER_PORT'} <= os.environ.keys():
        raise InputError(f'WORLD_SIZE = {wanted} is set, but not RANK, MASTER_ADDR and '
                         'MASTER_PORT: start the script with torchrun, or unset WORLD_SIZE')
    if wanted == 1 and from_launcher('SLURM_PROCID', 0):
        raise InputError('srun started several processes that know nothing of each other: start '
                         'torchrun by it, one a node (docs/casia.md)')
    device = choose_device(cfg)
    if wanted > 1 and not dist.is_initialized():
        if not from_launcher('LOCAL_RANK', 0):
            print(f'waiting for {wanted} processes at {os.environ["MASTER_ADDR"]}:'
                  f'{os.environ["MASTER_PORT"]}', flush=True)
        if device.type == 'cuda':          # device_id: else NCCL guesses it, and warns at barriers
            dist.init_process_group('nccl', timeout=TIMEOUT, device_id=device)
        else:
            dist.init_process_group('gloo', timeout=TIMEOUT)
        Group.host = dist.new_group(backend='gloo', timeout=TIMEOUT)
    torch.set_num_threads(cfg.run.threads or max(1, cores() // on_this_node()))
    if cfg.run.deterministic:
        os.environ.setdefault('CUBLAS_WORKSPACE_CONFIG', ':4096:8')
        torch.use_deterministic_algorithms(True)
    if device.type == 'cuda':
        # Losses, cosines and rankings stay float32; the nets have autocast
        torch.backends.cuda.matmul.allow_tf32 = False
        torch.backends.cudnn.allow_tf32 = cfg.run.precision != 'fp32'
        torch.backends.cudnn.benchmark = not cfg.run.deterministic
    else:
        machine.keep_large_buffers()
    say_device(cfg.run.precision, device)
    return device


def choose_device(cfg):
    """The device of this process by run.device: its own GPU, or the CPU."""
    if cfg.run.device == 'cpu' or cfg.run.device == 'auto' and not torch.cuda.is_available():
        return torch.device('cpu')
    local, count = from_launcher('LOCAL_RANK', 0), torch.cuda.device_count()
    if local >= count:
        raise InputError(f'process {local} of this machine has no GPU of its own, as torch sees '
                         f'{count}: start as many processes at most, or use run.device=cpu')
    torch.cuda.set_device(local)
    return torch.device('cuda', local)


def device_name(device):
    """What the user calls a device: its GPU, or the CPU and how many cores that has."""
    if device.type == 'cuda':
        return torch.cuda.get_device_name(device)
    return f'CPU, {os.cpu_count()} cores'


def say_device(precision, device):
    """Say what computes, in the first stage of a reproduce.sh or in one that runs alone; and where
    the device has no instructions for half precision, which is slow without."""
    if os.environ.get('STAGE', '1/').startswith('1/'):
        say(f'device: {device_name(device)}; precision: {precision}; processes: {world()}')
    remedy, supported = '', True
    if device.type == 'cuda' and precision == 'bf16':
        remedy, supported = 'fp16', torch.cuda.is_bf16_supported(including_emulation=False)
    elif device.type == 'cpu' and precision != 'fp32':
        remedy = 'fp32'
        supported = getattr(torch.ops.mkldnn, f'_is_mkldnn_{precision}_supported', lambda: True)()
    if not supported:
        say(f'run.precision = {precision}, which this device can only emulate, ten times slower: '
            f'use run.precision={remedy}')


def free_memory(device):
    """Bytes that are free on a device, those that torch keeps for later among them."""
    if device.type == 'cuda':
        kept = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + kept
    return machine.free_memory()


def own_share(batch, key):
    """This process's slice of a global batch; InputError, naming the config's key, if uneven."""
    if batch % world():
        raise InputError(f'{key} = {batch} does not divide by {world()} processes: '
                         f'use {batch // world() * world() or world()}')
    size = batch // world()
    return slice(rank() * size, (rank() + 1) * size)


def parallel(module):
    """The module, whose gradients are averaged over all processes while its backward pass runs."""
    if world() == 1:
        return module
    module = DistributedDataParallel(module, gradient_as_bucket_view=True)
    module.broadcast_buffers = False       # the argument warns from torch 2.14 on
    return module


def average_next(wanted, *modules):
    """Whether the next backward pass averages the gradients of parallel() modules, or leaves them
    to a later one."""
    for module in modules:
        if isinstance(module, DistributedDataParallel):
            module.require_backward_grad_sync = wanted


def gathered(x):
    """Rows (n, ...) of all processes in rank order, (N, ...), without a gradient."""
    if world() == 1:
        return x
    everyone = x.new_empty(world(), *x.shape)
    dist.all_gather(list(everyone), x.contiguous())
    return everyone.flatten(0, 1)


def mean(values):
    """Mean of a tensor over all processes."""
    if world() > 1:
        values = values.clone()
        dist.all_reduce(values)
    return values / world()


def autocast(device, precision):
    """Context of a forward pass in run.precision; fp32 leaves everything alone."""
    dtype = {'bf16': torch.bfloat16, 'fp16': torch.float16, 'fp32': None}[precision]
    return torch.autocast(device.type, dtype, enabled=dtype is not None)


def dealt(count, do):
    """[do(0), ..., do(count - 1)], each done by one of the processes; results can be pickled.

    All processes call it, and do() takes a process's own numbers in rising order.
    """
    done = {number: do(number) for number in range(rank(), count, world())}
    parts = broadcast(collect(done))
    return [parts[number % world()][number] for number in range(count)]


def write_json(path, content):
    """files.write_json() on rank 0."""
    if rank() == 0:
        files.write_json(path, content)


@contextlib.contextmanager
def only_writer(path):
    """While inside, this run alone writes `path`; another that wants to waits with a sentence. A
    file system without locks leaves it to the user to start nothing twice."""
    with contextlib.ExitStack() as stack:
        if rank() == 0:
            path = Path(path)
            path.parent.mkdir(parents=True, exist_ok=True)
            file = stack.enter_context(open(path.with_name(path.name + '.lock'), 'ab'))
            try:
                if not machine.lock(file, wait=False):
                    say(f'another run is making {path}: waiting for it')
                    machine.lock(file, wait=True)
            except OSError as error:
                say(f'{path.parent} cannot be locked ({error.strerror}): start nothing twice')
        barrier()
        yield


def make_once(path, ready, make):
    """Unless ready(): make() what `path` shall be, on rank 0 of one of the runs that ask."""
    def make_if_needed():
        if not ready():
            with only_writer(path):
                if not ready():
                    make()

    on_rank_0(make_if_needed)
