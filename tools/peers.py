"""What bench.py measures beside the kit: other people's code, imported from where they keep it.

FOLDER/mae           a clone of facebookresearch/mae; its model and its loop (needs timm)
FOLDER/insightface   a clone of deepinsight/insightface; its nets and margin
transformers         if it is installed

They run as their authors run them: with their losses' way to the host after every step, and on a
GPU in float16 (Hugging Face in run.precision) and compiled, too. Their images lie ready on the
device, which spares them their loaders. What is missing or fails is named and left out. The kit
and they take turns in one process; a ratio is the median over turns.
"""
import contextlib
import functools
import io
import math
import sys
import time
import warnings
from types import SimpleNamespace
from unittest import mock

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

import models
from facekit.base import process
from facekit.nets.weights import recogniser
from irm import irm_loss

TURNS = 3


@contextlib.contextmanager
def quiet():
    """Without what is printed and warned of inside."""
    with contextlib.redirect_stdout(io.StringIO()), warnings.catch_warnings():
        warnings.simplefilter('ignore')
        yield


class Related(nn.Module):
    """A masked autoencoder with the relation loss as one adds it to facebookresearch/mae."""

    def __init__(self, mae, teacher):
        super().__init__()
        self.mae, self.teacher = mae, teacher.forward      # no child: train() must not reach it

    def forward(self, images, mask_ratio):
        loss, pred, mask = self.mae(images, mask_ratio)
        with torch.no_grad():
            z = self.teacher(images)
        return loss + irm_loss(z, self.teacher(self.mae.unpatchify(pred))), pred, mask


def facebook(b, changed, batch, teacher=None):
    """Steps of facebookresearch/mae by its engine_pretrain."""
    import timm.models.vision_transformer as vit
    block, c, cuda = vit.Block, b.cfg.mae, b.device.type == 'cuda'
    np.float, sys.modules['torch._six'] = float, SimpleNamespace(inf=math.inf)   # of older days
    with mock.patch.object(vit, 'Block', lambda *a, qk_scale=None, **k: block(*a, **k)):
        import engine_pretrain
        import models_mae
        from util.misc import NativeScalerWithGradNormCount
    model = changed(models_mae.MaskedAutoencoderViT(
        b.cfg.data.size, c.patch, 3, c.dim, c.depth, c.heads, c.decoder_dim, c.decoder_depth,
        c.decoder_heads, norm_layer=functools.partial(nn.LayerNorm, eps=1e-6)).to(b.device))
    model = Related(model, teacher) if teacher else model
    optimizer = torch.optim.AdamW(model.parameters(), 1e-9, (0.9, 0.95))
    samples, scaler = images(b, batch), NativeScalerWithGradNormCount()
    args = SimpleNamespace(accum_iter=1, mask_ratio=c.mask_ratio, lr=1e-9, min_lr=0.0, epochs=1,
                           warmup_epochs=0)

    def do(count):
        with contextlib.nullcontext() if cuda else mock.patch('torch.cuda.synchronize'):
            engine_pretrain.train_one_epoch(model, [(samples, 0)] * count, optimizer, b.device, 0,
                                            scaler, args=args)
    return do


def hugging_face(b, changed, batch):
    """Steps of ViTMAEForPreTraining as its Trainer makes them."""
    from transformers import ViTMAEConfig, ViTMAEForPreTraining
    c = b.cfg.mae
    model = changed(ViTMAEForPreTraining(ViTMAEConfig(
        hidden_size=c.dim, num_hidden_layers=c.depth, num_attention_heads=c.heads,
        intermediate_size=4 * c.dim, image_size=b.cfg.data.size, patch_size=c.patch,
        mask_ratio=c.mask_ratio, decoder_hidden_size=c.decoder_dim,
        decoder_num_hidden_layers=c.decoder_depth, decoder_intermediate_size=4 * c.decoder_dim,
        decoder_num_attention_heads=c.decoder_heads)).to(b.device))
    samples, optimizer = images(b, batch), torch.optim.AdamW(model.parameters(), 1e-9)

    def do(count):
        for _ in range(count):
            with process.autocast(b.device, b.cfg.run.precision):
                loss = model(samples).loss
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
    return do


def face_net(b, role):
    from backbones.iresnet import IBasicBlock, IResNet
    if role.width != 64:
        raise ValueError('its nets have width 64: use teacher.width=64')
    net = type('Net', (IResNet,), {'fc_scale': math.ceil(b.cfg.data.size / 16) ** 2})
    return net(IBasicBlock, models.DEPTHS[role.depth], num_features=b.cfg.fr.dim,
               fp16=b.device.type == 'cuda').to(b.device)


def facebook_and_insightface(b, changed, batch):
    teacher = face_net(b, b.cfg.teacher).eval().requires_grad_(False)
    teacher.load_state_dict(recogniser(b.cfg.teacher.checkpoint, b.device).state_dict())
    return facebook(b, changed, batch, changed(teacher))


def insightface(b, changed, batch):
    """Steps of arcface_torch on one device, its distributed softmax replaced by torch's."""
    from losses import CombinedMarginLoss
    net, classes = changed(face_net(b, b.cfg.teacher)), b.cfg.toy.identities
    head = nn.Linear(b.cfg.fr.dim, classes, False).to(b.device)
    samples, target = images(b, batch), torch.arange(batch, device=b.device) % classes
    margin = CombinedMarginLoss(64, 1.0, 0.5, 0.0)
    amp = torch.amp.GradScaler(b.device.type, growth_interval=100, enabled=b.device.type == 'cuda')
    optimizer = torch.optim.SGD([*net.parameters(), *head.parameters()], 1e-9, 0.9,
                                weight_decay=5e-4)

    def do(count):
        for _ in range(count):
            cosine = F.linear(F.normalize(net(samples)), F.normalize(head.weight)).clamp(-1, 1)
            loss = F.cross_entropy(margin(cosine, target), target)
            amp.scale(loss).backward()
            amp.unscale_(optimizer)
            nn.utils.clip_grad_norm_(net.parameters(), 5)
            amp.step(optimizer)
            amp.update()
            optimizer.zero_grad()
            loss.item()
    return do


def images(b, count):
    """float32 (count, 3, S, S) in -1..1 on the device."""
    return 2 * torch.rand(count, 3, b.cfg.data.size, b.cfg.data.size, device=b.device) - 1


def rate(do, batch, steps, device):
    """Images a second of do(count), which makes `count` steps of `batch` images."""
    for count in (steps // 4, steps):                      # the first ones are not counted
        begin = time.perf_counter()
        do(count)
        if device.type == 'cuda':
            torch.cuda.synchronize(device)
    return steps * batch / (time.perf_counter() - begin)


def made(stage, b, makers, batch):
    """{name: do} of the peers of a stage that run; says which do not."""
    ways = {'': lambda net: net}
    if b.device.type == 'cuda':
        ways[', compiled'] = torch.compile
    peers = {}
    for name, make in makers.items():
        for way, changed in ways.items():
            try:
                with quiet():
                    do = make(b, changed, batch)
                    do(1)
                peers[name + way] = do
            except (Exception, SystemExit) as e:           # theirs fail in many ways
                process.say(f'{stage}: {name}{way} is left out: {(str(e) or repr(e))[:200]}')
    return peers


def compare(b, folder, steps):
    """Rows of the peers in `folder`, each beside the kit in turn; b: Bench."""
    sys.path[:0] = [str(folder / 'mae'), str(folder / 'insightface/recognition/arcface_torch')]
    for stage, kit, batch, makers in (
            ('1 train, no relations', functools.partial(b.mae, name='plain'), b.cfg.mae.batch,
             {'facebookresearch/mae': facebook, 'Hugging Face ViTMAE': hugging_face}),
            ('1 train, relations', b.mae, b.cfg.mae.batch,
             {'facebookresearch/mae, insightface': facebook_and_insightface}),
            ('0 teacher', b.teacher, b.cfg.fr.batch, {'insightface': insightface})):
        peers = made(stage, b, makers, batch)
        if not peers:
            continue
        rates = {'the kit': [], **{name: [] for name in peers}}
        for turn in range(TURNS):
            rates['the kit'].append(kit(folder=f'turn{turn}').images_per_second)
            for name, do in peers.items():
                with quiet():
                    rates[name].append(rate(do, batch, steps, b.device))
        for name, theirs in rates.items():
            b.add_turns(stage, name, theirs, rates['the kit'])
