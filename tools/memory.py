"""GPU memory of training on CASIA-WebFace, counted without a GPU.

    python tools/memory.py configs/casia.yaml       # the tables of docs/casia.md

The kit's own forward passes run on tensors that claim to lie on a GPU and hold nothing, so that
CUDA's autocast decides the types. Counted are weights, gradients, what the optimizer keeps, what
the backward pass needs, and the decoded images where a stage copies them to the GPU. Not counted:
CUDA itself (about half a GiB), workspaces of cuDNN, gaps between blocks, compiled code.
"""
import contextlib
import sys
import warnings
from pathlib import Path
from unittest import mock

import torch
from torch._subclasses.fake_tensor import FakeTensorMode

sys.path.insert(0, str(Path(__file__).parent.parent))

import models  # noqa: E402
import train_fr  # noqa: E402
import train_mae  # noqa: E402
from facekit import embed, protect, run  # noqa: E402
from facekit.config import variants  # noqa: E402

IMAGES, PEOPLE = 490_623, 10_572       # of CASIA-WebFace
CARDS, FILLED = (24, 40, 80, 141), 0.8         # GiB; share of a card that the count may take


@contextlib.contextmanager
def autocast(device, precision):
    """run.autocast() on a GPU that is not there, which torch.autocast would refuse."""
    torch.set_autocast_dtype('cuda', torch.float16 if precision == 'fp16' else torch.bfloat16)
    torch.set_autocast_enabled('cuda', precision != 'fp32')
    torch.autocast_increment_nesting()         # or the cast weights would be dropped too early
    yield
    torch.autocast_decrement_nesting()
    torch.set_autocast_enabled('cuda', False)


def attention(q, k, v):
    """Attention without a matrix of all pairs, as torch chooses it on GPUs."""
    return torch.ops.aten._scaled_dot_product_efficient_attention(q, k, v, None, True)[0]


def kept_bytes(forward, weights, batch, size):
    """Bytes of `weights` and of all that forward(images) keeps of `batch` images for the backward
    pass."""
    storages = {}

    def keep(x):
        storages[x.untyped_storage()._cdata] = x.untyped_storage()
        return x

    for x in weights:
        keep(x)
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
        forward(torch.empty(batch, size, size, 3, dtype=torch.uint8, device=weights[0].device))
    torch.clear_autocast_cache()
    return sum(storage.nbytes() for storage in storages.values())


def mae_pass(cfg, mae, teacher):
    """The forward pass of stage 1, a function of images."""
    def forward(images):
        mean = torch.empty(3, cfg.data.size, cfg.data.size, device=images.device)
        noise = torch.zeros(len(images), mae.grid ** 2, dtype=torch.int64, device=images.device)
        objective = train_mae.Objective(cfg, protect.FaceMAE(mae, mean, protect.STD), teacher)
        return objective.forward(images, noise, relate=True)
    return forward


def recogniser_pass(cfg, net, head):
    """The forward pass of stages 0 and 3, a function of images."""
    def forward(images):
        with run.autocast(images.device, cfg.run.precision):
            z = net(embed.for_recogniser(images, net))
        labels = torch.zeros(len(z), dtype=torch.int64, device=z.device)
        return train_fr.classify(head, z, labels, cfg.fr.margin)
    return forward


def count(cfg, make_pass, nets, floats):
    """Bytes that a training takes whatever its batch is, and bytes an image: of nets on the meta
    device, of which make_pass(cfg, *nets) is the forward pass and an optimizer keeps `floats`
    numbers a weight."""
    nets = [net.to(memory_format=torch.channels_last) for net in nets]
    with (FakeTensorMode(allow_non_fake_inputs=True), warnings.catch_warnings(action='ignore'),
          mock.patch.object(run, 'autocast', autocast),
          mock.patch('torch.nn.functional.scaled_dot_product_attention', attention)):
        nets = [net.to_empty(device='cuda') for net in nets]
        weights = [x for net in nets for x in (*net.parameters(), *net.buffers())]
        forward = make_pass(cfg, *nets)
        few, many = (kept_bytes(forward, weights, batch, cfg.data.size) for batch in (16, 48))
        trained = sum(x.nbytes for x in weights if x.requires_grad)
    return few - (many - few) / 2 + trained * (1 + floats), (many - few) / 32


def main(cfg, device, compare):
    cfg = variants(cfg, False)[0].cfg
    size, dim, gib, found = cfg.data.size, cfg.fr.dim, 2 ** 30, run.provenance()
    with torch.device('meta'):
        teacher = models.folded(models.iresnet(cfg.teacher.depth, cfg.teacher.width, size, dim))
        mae, mae_image = count(cfg, mae_pass, [protect.build_mae(cfg.mae, size), teacher], 2)
        fr, fr_image = count(cfg, recogniser_pass, [
            models.iresnet(cfg.fr.depth, cfg.fr.width, size, dim),
            models.MarginHead(dim, PEOPLE)], 1)
    # Decoded images: of stage 1 those of the other folds, with two embeddings each
    private = IMAGES * 3 * size ** 2
    public = (private + IMAGES * 8 * dim) * (cfg.data.folds - 1) / cfg.data.folds
    student = fr + fr_image * cfg.fr.norm_batch
    run.say(f'python {" ".join(sys.argv)}\nversion {found["commit"]}, torch {found["torch"]}, '
            f'{cfg.run.precision}\n\n| stages | whatever the batch, GiB | an image, MiB | decoded '
            'images, GiB |\n|---|---|---|---|')
    for name, fixed, image, images in (('1: MAE with relations', mae, mae_image, public),
                                       ('0, 3: recogniser', fr, fr_image, private)):
        run.say(f'| {name} | {fixed / gib:.1f} | {image / 2 ** 20:.1f} | {images / gib:.1f} |')
    run.say('\n| card, GiB | `mae.micro_batch` | stage 1, GiB | stage 3, GiB | images of stage 3 |'
            '\n|---|---|---|---|---|')
    for card in CARDS:
        batch = max(n for n in (16, 32, 64, 128, 256, 512, 1024)
                    if mae + mae_image * n + public <= FILLED * card * gib)
        on_gpu = private < (card * gib - fr) / 2                     # as batches.Store decides
        run.say(f'| {card} | {batch} | {(mae + mae_image * batch + public) / gib:.1f} | '
                f'{(student + private * on_gpu) / gib:.1f} | '
                f'{"on the GPU" if on_gpu else "decoded a batch ahead"} |')


if __name__ == '__main__':
    run.launch(main, None)
