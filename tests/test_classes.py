"""The divided class layer: what one process computes, whatever the number of processes."""

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F

import models
from conftest import in_processes
from facekit.data import batches
from facekit.nets.classes import DividedHead

CLASSES, DIM, ROWS = 17, 16, 12           # 17 divides by neither 2 nor 3
SETTINGS = [('arcface', 'exact', 0.5), ('arcface', 'straight_through', 0.5),
            ('cosface', 'exact', 0.35)]


def inputs():
    """Weights, embeddings and labels; the last embedding lies opposite to its class."""
    generator = torch.Generator().manual_seed(0)
    weight, z = (torch.randn(n, DIM, dtype=torch.float64, generator=generator)
                 for n in (CLASSES, ROWS))
    labels = torch.randint(CLASSES, (ROWS,), generator=generator)
    labels[:2] = torch.tensor([0, CLASSES - 1])
    z[-1] = -weight[labels[-1]] + 0.1 * z[-1]
    return weight, z, labels


def step(head, z, labels, margin, ranks=1):
    """Loss, accuracy, gradient of the embeddings as DDP would average it, and of the centres."""
    z = z.clone().requires_grad_()
    loss, accuracy = head(z, labels, margin)
    loss.backward()
    return loss.detach(), accuracy, z.grad / ranks, head.weight.grad


def one_rank(rank, ranks, folder):
    torch.set_num_threads(1)
    dist.init_process_group('gloo', f'file://{folder}/meet{ranks}', rank=rank, world_size=ranks)
    weight, z, labels = inputs()
    own, results = slice(rank * ROWS // ranks, (rank + 1) * ROWS // ranks), []
    for loss, gradient, margin in SETTINGS:
        for rate in (1.0, 0.3):
            head = DividedHead(DIM, CLASSES, loss, 16.0, gradient, rate, (rank, ranks)).double()
            head.weight.data.copy_(weight[head.first:head.end])
            if rate < 1:
                head.sample(batches.stream(0, 'centres', 5), labels.numpy())
            *values, centres = step(head, z[own], labels[own], margin, ranks)
            results.append([*values, head.whole(centres)])
    torch.save(results, f'{folder}/{ranks}-{rank}.pt')
    dist.barrier()             # torch 2.6 hangs where a group ends before its last message
    dist.destroy_process_group()


def expected(loss, gradient, margin, rate):
    """The same by the plain layer, from which the centres that are not sampled were taken."""
    weight, z, labels = inputs()
    kept = torch.arange(CLASSES)
    if rate < 1:
        draws = batches.uniform(batches.hashed(batches.stream(0, 'centres', 5), kept, 1))[:, 0]
        kept = kept[(draws < rate) | torch.isin(kept, labels)]
        assert 0 < len(kept) < CLASSES and len(kept) > len(labels.unique())
    head = models.MarginHead(DIM, len(kept), loss, 16.0, gradient).double()
    head.weight.data.copy_(weight[kept])
    z.requires_grad_()
    column = torch.searchsorted(kept, labels)
    logits = head(z, column, margin)
    value = F.cross_entropy(logits, column)
    value.backward()
    centres = torch.zeros_like(weight).index_copy(0, kept, head.weight.grad)
    return value.detach(), (logits.argmax(1) == column).float().mean(), z.grad, centres


@pytest.mark.parametrize('ranks', [1, 2, 3])
def test_loss_and_gradients_are_those_of_the_plain_layer(tmp_path, ranks):
    in_processes(one_rank, ranks, ranks, tmp_path)
    results = [torch.load(tmp_path / f'{ranks}-{rank}.pt', weights_only=True)
               for rank in range(ranks)]
    cases = [(*setting, rate) for setting in SETTINGS for rate in (1.0, 0.3)]
    for number, case in enumerate(cases):
        loss, accuracy, z, centres = expected(*case)
        parts = [result[number] for result in results]
        for part in parts:
            torch.testing.assert_close(part[0], loss, rtol=1e-12, atol=0)
            assert part[1] == accuracy
        torch.testing.assert_close(torch.cat([p[2] for p in parts]), z, rtol=1e-10, atol=1e-13)
        torch.testing.assert_close(parts[0][3], centres, rtol=1e-10, atol=1e-13)


def test_shares_hold_the_numbers_of_the_plain_layer():
    """From the first centre on, also where they are drawn in blocks."""
    torch.manual_seed(3)
    whole, after = models.MarginHead(24, 9001).weight, torch.rand(1)
    for ranks in (1, 3):
        shares = []
        for rank in range(ranks):
            torch.manual_seed(3)
            shares.append(DividedHead(24, 9001, share=(rank, ranks)).weight)
            assert torch.equal(torch.rand(1), after)
        assert torch.equal(torch.cat(shares), whole)


def test_a_share_without_positives_or_draws_still_has_a_centre():
    head = DividedHead(16, 40, rate=1e-6, share=(3, 4))
    head.sample(7, np.array([1, 2]))
    assert head.sampled.tolist() == [0]
