"""The networks against what the originals' software answers, and against their own definitions."""
import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

import models
from facekit.base.errors import InputError
from facekit.data import batches
from facekit.data.faces import ImageRows
from facekit.nets import embed
from facekit.nets.weights import load_weights, recogniser

GOLDEN = json.loads((Path(__file__).parent / 'fixtures' / 'interchange.json').read_text())


def normal(seed, shape):
    return torch.from_numpy(np.random.default_rng(seed).standard_normal(shape).astype('float32'))


def fill(net):
    """Weights by the rule of the reference page, so that any two equal nets answer alike."""
    state = net.state_dict()
    for number, key in enumerate(sorted(state)):
        tensor = state[key]
        if not tensor.is_floating_point() or key.endswith('pos_embed'):
            continue
        value = normal(number, tuple(tensor.shape))
        if key.endswith('running_var'):
            value = 1 + 0.1 * value.abs()
        elif tensor.ndim > 1:
            value = value / math.prod(tensor.shape[1:]) ** 0.5
        elif key.endswith('weight'):
            value = 0.25 + 0.02 * value if 'prelu' in key else 1 + 0.05 * value
        else:
            value = 0.05 * value
        tensor.copy_(value)
    return net.eval()


def shapes(net):
    return {key: list(value.shape) for key, value in net.state_dict().items()}


def close(ours, golden, tolerance=2e-5):
    """Errors relative to the largest value: the last bits of a sum grow with its terms."""
    golden = torch.as_tensor(golden, dtype=ours.dtype)
    assert (ours - golden).abs().max() <= tolerance * golden.abs().max().clamp(min=1)


def small_mae(**changes):
    settings = dict(size=32, patch=4, dim=32, depth=2, heads=2,
                    decoder_dim=16, decoder_depth=1, decoder_heads=2)
    torch.manual_seed(0)
    return models.MAE(**settings | changes)


@torch.no_grad()
def test_mae_is_interchangeable_with_the_reference():
    golden = GOLDEN['mae_vit_b8_112']
    mae = models.MAE()
    assert shapes(mae) == golden['keys']
    close(mae.pos_embed[0, 0, :8], golden['pos_embed_first8'])
    close(mae.pos_embed[0, -1, -8:], golden['pos_embed_last8'])

    images = normal(124, (2, 3, 112, 112))
    noise = torch.from_numpy(np.random.default_rng(125).random((2, 196)).astype('float32'))
    pred, mask = fill(mae)(images, noise)
    assert mask.sum(dim=1).tolist() == golden['mask_sum']
    assert mask[0, :32].tolist() == golden['mask_first32']
    close(pred[:, 0, :8], golden['pred_first8'])
    close(pred[:, -1, -8:], golden['pred_last8'])
    close(models.masked_mse(pred, mae.patchify(images), mask), golden['loss'])


@pytest.mark.parametrize('depth', [18, 50])
@torch.no_grad()
def test_iresnet_is_interchangeable_with_the_reference(depth):
    golden = GOLDEN[f'iresnet{depth}']
    net = models.iresnet(depth)
    assert shapes(net) == golden['keys']
    assert sum(p.numel() for p in net.parameters()) == golden['params']
    z = fill(net)(normal(123, (2, 3, 112, 112)))
    norms = z.norm(dim=1)
    close(z[:, :8] / norms[:, None],
          torch.tensor(golden['out_first8']) / torch.tensor(golden['out_norm'])[:, None])
    close(norms, golden['out_norm'])
    close(F.cosine_similarity(z[0], z[1], dim=0), golden['cos'])


def test_positions_tell_rows_from_columns():
    """The reference values lie on the diagonal of the grid, where both axes are equal."""
    positions = models.sincos_positions(8, 3)
    assert positions.shape == (10, 8) and not positions[0].any()
    row, column = 2, 1
    expected = [math.sin(column), math.sin(column / 100), math.cos(column), math.cos(column / 100),
                math.sin(row), math.sin(row / 100), math.cos(row), math.cos(row / 100)]
    close(positions[1 + 3 * row + column], expected, 1e-6)


def test_patches_are_row_major_channels_last_and_come_back():
    mae = small_mae()
    images = torch.randn(2, 3, 32, 32)
    patches = mae.patchify(images)
    assert patches.shape == (2, 64, 48)
    # patch 9 is row 1, column 1; value 3*(4*2 + 3) + 1 is pixel row 2, column 3, green
    assert patches[1, 9, 34] == images[1, 1, 4 + 2, 4 + 3]
    assert torch.equal(mae.unpatchify(patches), images)


def test_masks_are_exact_and_follow_integer_noise_beyond_float_precision():
    """Masks come from 64-bit hashes; compared as floats, neighbours would tie."""
    for patches, ratio, kept in ((100, 0.9, 10), (196, 0.75, 49), (196, 0, 196), (49, 0.75, 12)):
        keep, restore, mask = models.random_masking(torch.rand(3, patches), ratio)
        assert keep.shape == (3, kept) and keep.dtype == restore.dtype == torch.int64
        assert (mask.sum(dim=1) == patches - kept).all()
        assert mask.take_along_dim(keep, dim=1).sum() == 0
    noise = torch.tensor([[2 ** 62 + 3, 2 ** 62 + 1, 2 ** 62 + 2, 2 ** 62]])
    keep, restore, mask = (x.tolist() for x in models.random_masking(noise, 0.5))
    assert (keep, restore, mask) == ([[3, 1]], [[3, 1, 2, 0]], [[1, 0, 1, 0]])


@torch.no_grad()
def test_hidden_pixels_do_not_change_a_bit():
    """What is released may hold nothing of the hidden pixels."""
    mae = small_mae()
    images, noise = torch.randn(4, 3, 32, 32), torch.rand(4, 64)
    pred, mask = mae(images, noise)
    patches = mae.patchify(images)
    hidden = mask[:, :, None].bool()
    altered = mae.unpatchify(torch.where(hidden, torch.full_like(patches, math.nan), patches))
    assert torch.equal(mae(altered, noise)[0], pred)
    altered = mae.unpatchify(torch.where(hidden, patches, patches + 1))
    assert not torch.equal(mae(altered, noise)[0], pred)


@pytest.mark.parametrize('settings', [dict(size=40, patch=8, dim=48),
                                      dict(size=12, patch=4, mlp_ratio=2.5)])
def test_other_sizes_train(settings):
    mae = small_mae(**settings)
    images = torch.randn(2, 3, mae.size, mae.size)
    pred, mask = mae(images, torch.rand(2, mae.grid ** 2), ratio=0.6)
    models.masked_mse(pred, mae.patchify(images), mask).backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in mae.parameters())


@pytest.mark.parametrize('make, words', [
    (lambda: small_mae(size=30), 'size 30'), (lambda: small_mae(dim=6), 'multiple of 4'),
    (lambda: small_mae().patchify(torch.zeros(1, 3, 16, 32)), 'do not fit'),
    *((lambda ratio=ratio: models.random_masking(torch.rand(1, 64), ratio), 'mask ratio')
      for ratio in (1.0, 0.999, -0.5)),
    (lambda: models.iresnet(19), 'depth 19'),
    (lambda: models.MarginHead(2, 3, loss='softmax'), "loss 'softmax'"),
    (lambda: models.MarginHead(2, 3, gradient='none'), "gradient 'none'")])
def test_what_does_not_fit_is_named(make, words):
    with pytest.raises(ValueError, match=words):
        make()


def test_masked_mse_by_hand():
    pred, target = torch.zeros(1, 2, 4), torch.tensor([[[9., 9, 9, 9], [1, 2, 3, 4]]])
    mask = torch.tensor([[0., 1]])
    assert models.masked_mse(pred, target, mask).item() == 30 / 4
    # normalised by the unbiased variance, four values have squares that add up to 3
    assert models.masked_mse(pred, target, mask, norm_pix=True).item() == pytest.approx(3 / 4)
    assert models.masked_mse(pred, target, 0 * mask).item() == 0


@pytest.mark.parametrize('size', [16, 20, 100])
def test_iresnet_takes_any_size_and_width(size):
    net = models.iresnet(10, width=8, size=size, dim=24)
    z = net(torch.randn(2, 3, size, size))
    assert z.shape == (2, 24) and net.features.weight.grad is None
    z.square().sum().backward()
    assert not net.features.weight.requires_grad


@torch.no_grad()
def test_the_tail_stays_float32_under_autocast():
    net = models.iresnet(10, width=8, size=32, dim=16).eval()
    seen = []
    net.fc.register_forward_hook(lambda layer, inputs, output: seen.append(output.dtype))
    with torch.autocast('cpu', torch.bfloat16):
        assert net(torch.randn(2, 3, 32, 32)).dtype == torch.float32
    assert seen == [torch.float32]


def test_folding_keeps_outputs_and_input_gradients():
    net = fill(models.iresnet(18, width=16, size=48, dim=64))
    before = {key: value.clone() for key, value in net.state_dict().items()}
    frozen = models.folded(net.train())
    net.eval()
    images = normal(1, (2, 3, 48, 48)).requires_grad_()
    z, z_frozen = net(images), frozen(images)
    close(z_frozen / z.abs().max(), z / z.abs().max(), 1e-4)
    gradient, gradient_frozen = (torch.autograd.grad(x.square().sum(), images)[0]
                                 for x in (z, z_frozen))
    # Not the largest error: rounding may turn a PReLU near its kink
    assert (gradient_frozen - gradient).norm() < 1e-2 * gradient.norm()
    assert (gradient_frozen - gradient).abs().median() < 1e-5 * gradient.abs().max()
    left = [name for name, module in frozen.named_modules()
            if isinstance(module, (nn.BatchNorm1d, nn.BatchNorm2d))]
    assert len(left) == 8 and all(name.startswith('layer') and name.endswith('.bn1')
                                  for name in left)
    assert not frozen.training and not any(p.requires_grad for p in frozen.parameters())
    assert all(value.dtype == torch.float32 for value in frozen.parameters())
    assert all(torch.equal(value, before[key]) for key, value in net.state_dict().items())


def head_and_cosines(cosines, **settings):
    """A head whose first class is the x axis, and unit embeddings at the given cosines to it."""
    head = models.MarginHead(2, 3, **settings)
    with torch.no_grad():
        head.weight.copy_(torch.tensor([[1., 0], [0, 1], [-1, 0]]))
    cosines = torch.tensor(cosines)
    z = torch.stack([cosines, (1 - cosines ** 2).clamp(min=0).sqrt()], dim=1).requires_grad_()
    return head, z, torch.zeros(len(cosines), dtype=torch.int64)


def test_embeddings_kept_of_both_sides_are_those_of_the_batch():
    """The plain twin of what stage 1 keeps of the originals: unfolded, batch by batch."""
    torch.manual_seed(0)
    net = models.iresnet(10, 8, 32, 16).eval()
    faces = np.random.default_rng(0).integers(0, 256, (20, 32, 32, 3), np.uint8)
    store = batches.Store(ImageRows(faces, np.array([*range(1, 20), 0])), torch.device('cpu'))
    kept = embed.embed_all(models.folded(net), store, 7, 'fp32')
    numbers, flip = torch.tensor([3, 19, 4, 0]), torch.tensor([True, False, False, True])
    z = embed.embed_batch(net, batches.flipped(next(store.ahead([numbers])), flip), 'fp32')
    torch.testing.assert_close(kept[flip.long(), numbers], z, atol=1e-4, rtol=1e-4)
    assert (kept[0] - kept[1]).abs().max() > 0.01


@pytest.mark.parametrize('loss', ['arcface', 'cosface'])
def test_margin_gradient_is_the_derivative(loss):
    torch.manual_seed(0)
    head = models.MarginHead(4, 6, loss).double()
    z = torch.randn(8, 4, dtype=torch.float64)
    weight = torch.randn(6, 4, dtype=torch.float64)
    labels = torch.randint(6, (8,))
    # the last embedding lies opposite to its class, where ArcFace continues beyond pi
    z[-1] = -weight[labels[-1]] + 0.1 * torch.randn(4, dtype=torch.float64)

    def logits(z, weight):
        return torch.func.functional_call(head, {'weight': weight}, (z, labels))

    assert torch.autograd.gradcheck(logits, (z.requires_grad_(), weight.requires_grad_()))


@pytest.mark.parametrize('gradient', ['exact', 'straight_through'])
@pytest.mark.parametrize('loss', ['arcface', 'cosface'])
def test_margin_gradient_is_finite_at_the_poles(loss, gradient):
    head, z, labels = head_and_cosines([1., -1., 0.99999994], loss=loss, gradient=gradient)
    # a plain sum, because cross-entropy saturates here and sends back zeros
    head(z, labels).sum().backward()
    assert z.grad.isfinite().all() and head.weight.grad.isfinite().all()
    # the angle alone, because some versions of torch let no gradient through clamp() at its ends
    cosine = torch.tensor([1., -1.], requires_grad=True)
    assert torch.autograd.grad(head.arc(cosine, 0.5).sum(), cosine)[0].isfinite().all()


FALL = 0.5 * math.sin(0.5)                   # beyond pi, where ArcFace continues by a line


@pytest.mark.parametrize('gradient, angles, expected', [
    ('exact', [0.3, 1.5, 2.6, 2.7, 3.1], [math.cos(0.8), math.cos(2.0), math.cos(3.1),
                                          math.cos(2.7) - FALL, math.cos(3.1) - FALL]),
    ('straight_through', [0.3, 1.5, 2.9], [math.cos(a + 0.5) for a in (0.3, 1.5, 2.9)])])
def test_arcface_adds_the_angle(gradient, angles, expected):
    """Straight through, as arcface_torch does, with the gradient of the plain softmax."""
    head, z, labels = head_and_cosines([math.cos(a) for a in angles], scale=2.0, gradient=gradient)
    target = head(z, labels, margin=0.5)[:, 0]
    close(target / 2, expected, 1e-5)
    found, plain = (torch.autograd.grad(x.sum(), z)[0] for x in (
        target, 2 * F.normalize(z)[:, 0]))
    if gradient == 'straight_through':
        close(found, plain, 1e-6)
    else:
        assert (target.diff() < 0).all() and (found - plain).abs().max() > 0.1


def test_cosface_subtracts_from_the_true_class_only():
    head, z, labels = head_and_cosines([0.5, -0.2], loss='cosface', scale=10.0)
    close(head(z, labels, 0.35) - head(z, labels, 0.), [[-3.5, 0, 0], [-3.5, 0, 0]], 1e-6)


@pytest.mark.parametrize('gradient', ['exact', 'straight_through'])
def test_margin_zero_is_the_plain_softmax(gradient):
    head = models.MarginHead(16, 7, gradient=gradient)
    z, labels = torch.randn(5, 16), torch.randint(7, (5,))
    plain = 64 * F.normalize(z) @ F.normalize(head.weight).T
    with torch.autocast('cpu', torch.bfloat16):
        logits = head(z, labels, 0.)
    assert logits.dtype == torch.float32
    close(logits / 64, plain / 64, 1e-6)


def test_a_shortcut_is_the_strided_convolution():
    """Whose backward pass, of 1x1 with stride 2, crashed the process at these widths."""
    for width in (8, 12):
        net = models.iresnet(10, width, 112, 16).to(memory_format=torch.channels_last)
        x = torch.randn(24, 3, 112, 112).contiguous(memory_format=torch.channels_last)
        net(x).square().mean().backward()
        assert all(p.grad.isfinite().all() for p in net.parameters() if p.requires_grad)
    torch.manual_seed(0)
    shortcut, x = models.Shortcut(6, 10, 1, 2, bias=False), torch.randn(3, 6, 7, 8)
    torch.testing.assert_close(shortcut(x), F.conv2d(x, shortcut.weight, stride=2))


def test_checkpoints_of_arcface_torch_and_of_an_encoder_alone(tmp_path):
    net = models.iresnet(10, 8, 32, 16)
    torch.save({'epoch': 3, 'state_dict_backbone': net.state_dict()}, tmp_path / 'gpu_0.pt')
    read = recogniser(tmp_path / 'gpu_0.pt', torch.device('cpu'))
    assert all(torch.equal(v, read.state_dict()[k]) for k, v in net.state_dict().items())
    mae = small_mae()
    encoder = {k: v for k, v in mae.state_dict().items()
               if 'decoder' not in k and k != 'mask_token'}
    with pytest.raises(InputError, match='encoder only'):
        load_weights(mae, {'model': encoder}, 'mae_pretrain.pth')
