"""Instance relation matching: what it must not see, its gradient, and that ranks do not matter."""
import math

import pytest
import torch
import torch.distributed as dist
from torch import nn

import irm
from conftest import in_processes

KINDS = ['cosine', 'centred', 'l2']


def pair(rows=6, dim=4, dtype=torch.float64):
    generator = torch.Generator().manual_seed(0)
    return torch.randn(2, rows, dim, dtype=dtype, generator=generator).unbind()


def test_relations_by_hand():
    z = torch.tensor([[2., 0], [0, 3], [-1, 0]])
    assert torch.equal(irm.relations(z), torch.tensor([[1., 0, -1], [0, 1, 0], [-1, 0, 1]]))
    root = math.sqrt(2)
    expected = torch.tensor([[0, root, 2], [root, 0, root], [2, root, 0]])
    torch.testing.assert_close(irm.relations(z, 'l2'), expected, atol=1e-5, rtol=0)


def test_loss_is_the_mean_over_ordered_pairs():
    z, z_rec = pair()
    difference = irm.relations(z) - irm.relations(z_rec)
    total = sum(difference[i, j] ** 2 for i in range(6) for j in range(6) if i != j)
    torch.testing.assert_close(irm.irm_loss(z, z_rec), total / 30)


@pytest.mark.parametrize('kind', KINDS)
def test_blind_to_scale_and_common_rotation(kind):
    z, other = pair()
    rotation = torch.linalg.qr(torch.randn(4, 4, dtype=z.dtype)).Q
    assert irm.irm_loss(z, z, kind) == 0
    assert irm.irm_loss(z, 3 * z @ rotation, kind) < 1e-20
    assert irm.irm_loss(z, other, kind) > 0.01
    assert irm.relation_correlation(z, 3 * z @ rotation) == pytest.approx(1)
    assert abs(irm.relation_correlation(z, other)) < 0.9


def test_centred_relations_are_blind_to_a_common_direction():
    # Unit rows, half of each in a direction that the other rows share and z has not
    z = torch.nn.functional.normalize(pair(100, 40)[0])
    shifted = torch.cat([z, torch.ones_like(z[:, :1])], 1) / math.sqrt(2)
    z = torch.cat([z, torch.zeros_like(z[:, :1])], 1)
    assert irm.irm_loss(z, shifted) > 0.1
    assert irm.irm_loss(z, shifted, 'centred') < 1e-20


@pytest.mark.parametrize('kind', KINDS)
def test_gradient_is_the_derivative_and_reaches_reconstructions_only(kind):
    z, z_rec = (part.requires_grad_() for part in pair())
    assert torch.autograd.gradcheck(lambda x: irm.relations(x, kind), z)
    assert torch.autograd.gradcheck(lambda x: irm.irm_loss(z.detach(), x, kind), z_rec)
    irm.irm_loss(z, z_rec, kind).backward()
    assert z.grad is None and z_rec.grad.abs().sum() > 0
    # A batch can hold an image twice, and early reconstructions all look alike
    alike = z_rec.detach().float()[:1].repeat(6, 1).requires_grad_()
    irm.irm_loss(z.detach().float(), alike, kind).backward()
    assert alike.grad.isfinite().all()


def test_the_control_without_relations_sees_a_common_rotation():
    z, z_rec = pair()
    rotation = torch.linalg.qr(torch.randn(4, 4, dtype=z.dtype)).Q
    assert irm.irm_loss(z, 3 * z, 'direct') < 1e-12 < 0.1 < irm.irm_loss(z, z @ rotation, 'direct')
    assert torch.autograd.gradcheck(lambda x: irm.irm_loss(z, x, 'direct'), z_rec.requires_grad_())


def test_relations_stay_float32_under_autocast():
    z, z_rec = pair(dtype=torch.float32)
    with torch.autocast('cpu', torch.bfloat16):
        assert irm.relations(z.bfloat16()).dtype == torch.float32
        inside = irm.irm_loss(z, z_rec)
    assert torch.equal(inside, irm.irm_loss(z, z_rec))


@pytest.mark.parametrize('rows, others, kind, words', [
    (6, 4, 'cosine', 'differ in shape'), (1, 1, 'cosine', 'batch of 1'),
    (6, 6, 'dot', "kind 'dot'")])
def test_wrong_input_is_named(rows, others, kind, words):
    with pytest.raises(ValueError, match=words):
        irm.irm_loss(pair()[0][:rows], pair()[1][:others], kind)


def value_and_gradient(images, originals, kind):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(5, 8), nn.Tanh(), nn.Linear(8, 4)).double()
    loss = irm.irm_loss(originals, net(images), kind)
    loss.backward()
    return loss.detach(), [p.grad for p in net.parameters()]


def one_rank(rank, folder, images, originals):
    torch.set_num_threads(1)
    dist.init_process_group('gloo', f'file://{folder}/meet', rank=rank, world_size=2)
    own = slice(rank * 3, rank * 3 + 3)
    results = {}
    for kind in KINDS:
        loss, gradients = value_and_gradient(images[own], originals[own], kind)
        for gradient in gradients:  # DDP's averaging
            dist.all_reduce(gradient)
            gradient /= 2
        results[kind] = loss, gradients
    torch.save(results, f'{folder}/rank{rank}.pt')
    dist.destroy_process_group()


def test_two_processes_give_the_value_and_gradient_of_one(tmp_path):
    generator = torch.Generator().manual_seed(1)
    images = torch.randn(6, 5, dtype=torch.float64, generator=generator)
    originals, _ = pair()
    in_processes(one_rank, 2, tmp_path, images, originals)
    for rank in range(2):
        results = torch.load(tmp_path / f'rank{rank}.pt', weights_only=True)
        for kind in KINDS:
            loss, gradients = value_and_gradient(images, originals, kind)
            torch.testing.assert_close(results[kind], (loss, gradients))
