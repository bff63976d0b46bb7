"""Each attacker on embeddings or images whose right answer is known."""
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import models
from conftest import TINY
from facekit.base.config import namespace, resolve
from facekit.base.errors import InputError
from facekit.data import toy
from facekit.data.faces import ImageRows
from facekit.measure.retrieval import Search, rank
from facekit.measure.statistics import auc, interval
from facekit.nets.embed import Embedder
from facekit.privacy import attacks, protect
from facekit.privacy.groups import AttackGroup, Owned, attacker_seeds, searched
from facekit.privacy.masks import Patches, cells, guess_masks

CPU = torch.device('cpu')


# ------------------------------------------------------------------------------- ranking

def brute_force(probes, gallery, probe_ids, gallery_ids, exclude):
    """Whether a target comes first, chance and probe, from a full sort, one probe at a time."""
    found = []
    for i, z in enumerate(probes):
        keep = np.arange(len(gallery)) != (exclude[i] if exclude is not None else -1)
        order = np.argsort(-(gallery @ z)[keep], kind='stable')
        hit = (gallery_ids == probe_ids[i])[keep][order]
        if hit.any():
            found.append((hit[0], hit.sum() / keep.sum(), i))
    return np.array(found)


def test_ranks_equal_a_full_sort():
    torch.manual_seed(0)
    gallery, person = F.normalize(torch.randn(60, 8)), np.arange(60) // 4 % 13
    person[-1] = 99                            # some have 4 images, some 8, and one a single image
    source = np.random.default_rng(0).integers(60, size=200)
    source[0] = 59
    probes = F.normalize(gallery[source] + 0.5 * torch.randn(200, 8))
    for question, ids, gallery_ids, exclude in (
            ('same_image', source, np.arange(60), None),
            ('same_person', person[source], person, source),
            ('label', source, np.arange(60), None)):
        expected = brute_force(probes.numpy(), gallery.numpy(), ids, gallery_ids, exclude)
        for block in (7, 1000):
            r = rank(Search(probes, gallery, source, person, CPU), question, block=block)
            np.testing.assert_allclose(np.stack([r.first, r.chance, r.probe], 1), expected,
                                       rtol=1e-5)


def test_noise_and_collapse_give_chance():
    torch.manual_seed(0)
    gallery, probes = F.normalize(torch.randn(500, 16)), F.normalize(torch.randn(2000, 16))
    source = np.random.default_rng(0).integers(500, size=2000)
    search = Search(probes, gallery, source, source, CPU)
    assert rank(search, 'same_image').first.mean() < 0.008      # 0.002, four standard errors
    same = F.normalize(torch.ones(500, 16))    # one embedding for everybody
    found = rank(Search(same[source], same, source, source, CPU), 'same_image')
    assert torch.allclose(found.first, found.chance)


def test_ties_are_drawn_by_lot():
    """A gallery in which some pictures stand twice hides nobody."""
    gallery, person = people(40, 5, 8, 0)
    gallery[7], gallery[8] = gallery[12], gallery[12]           # of persons 1, 1 and 2
    search = Search(gallery, gallery, np.arange(200), person, CPU)
    first = rank(search, 'same_image', block=64).first
    assert torch.allclose(first[[7, 8, 12]], torch.tensor(1 / 3)) and first.sum() == 198
    by_person = rank(search, 'same_person').first
    assert by_person[7] == by_person[8] == 0.5       # one twin is the same person, one is not
    assert by_person[12] == 0                        # both twins are another person


def test_equal_embeddings_tie_whatever_the_shapes_of_the_products():
    """In float32 rounding decided: each image has a twin, so its original is first or second."""
    torch.manual_seed(0)
    gallery = F.normalize(torch.randn(700, 512)).repeat(2, 1)[torch.randperm(1400)]
    for block in (100, 1000, 16384):
        for count in (3, 700, 1400):
            search = Search(gallery[:count], gallery, np.arange(count), np.arange(1400), CPU)
            assert (rank(search, 'same_image', block=block).first == 0.5).all()


def test_a_gallery_is_cut_among_people_without_a_probe():
    labels = np.arange(100) // 5
    rows, cfg = np.arange(10, 90), SimpleNamespace(evaluate=SimpleNamespace(gallery=12))
    chosen = searched(rows, labels, labels[[13, 51]], cfg)
    assert len(chosen) == 22 and (np.diff(chosen) > 0).all() and np.isin(chosen, rows).all()
    assert {10, 11, 12, 13, 14, 50, 51, 52, 53, 54} <= set(chosen.tolist())
    assert np.array_equal(chosen, searched(rows, labels, labels[[13, 51]], cfg))
    cfg.evaluate.gallery = 0
    assert np.array_equal(rows, searched(rows, labels, labels[[13, 51]], cfg))


# ------------------------------------------------------------- attackers, on embeddings

def people(count, images, dim, seed):
    """Unit embeddings of some people, and who they are."""
    torch.manual_seed(seed)
    person = np.arange(count).repeat(images)
    z = torch.randn(count, dim)[person] + 0.7 * torch.randn(len(person), dim)
    return F.normalize(z), person


class Plain(Embedder):
    """An embedder whose images are embeddings already."""

    def __init__(self):
        super().__init__('plain', None, None, CPU)

    def embed(self, chosen):
        return F.normalize(torch.as_tensor(chosen.images)[chosen.rows])


class Same(Owned):
    """What attackers own where every embedder is one and the same."""

    def __init__(self, embedder):
        self.insider = embedder

    def embedder(self, name):
        return self.insider


class Group(AttackGroup):
    """A group whose pairs and second releases `protect(images, seed)` makes."""

    def protected(self, chosen, seed):
        return self.protect(chosen.images, seed)[chosen.rows]

    def is_random(self):
        return self.random


def group_of(protect, random=True):
    """A group whose images are embeddings."""
    z, person = people(60, 4, 32, 0)
    known, others = people(180, 4, 32, 1)
    shuffled = torch.randperm(len(known))
    known, others, n = known[shuffled], others[shuffled], np.arange(len(z))
    group = Group(ImageRows(protect(z, 0), n), ImageRows(z, n), n, person,
                  ImageRows(known, np.arange(len(known))), -1 - others)
    group.protect, group.random = protect, random
    return group


def noisy(z, seed, size):
    generator = torch.Generator().manual_seed(seed)
    return z + size * torch.randn(z.shape, generator=generator)


def figures(name, group, owned=None, cfg=None):
    """{question: figures} of an attacker of the table, alone on a group; None if it makes none."""
    result = attacks.attack(name, [group], [owned or Same(Plain())], cfg)
    return result and result.figures


TURN = torch.linalg.qr(torch.randn(32, 32, generator=torch.Generator().manual_seed(3)))[0]
PROTECTIONS = {
    'none': lambda z, seed: z, 'rotation': lambda z, seed: noisy(z @ TURN, seed, 0.05),
    'little noise': lambda z, seed: noisy(z, seed, 0.45),
    'nothing left': lambda z, seed: noisy(0 * z, seed, 1)}


@pytest.mark.parametrize('protection, name, question, low, high', [
    ('none', 'judge', 'same_image', 1, 1), ('none', 'judge', 'same_person', 0.3, 0.999),
    ('none', 'linear', 'same_image', 0.95, 1),
    ('rotation', 'judge', 'same_image', 0, 0.03), ('rotation', 'linear', 'same_image', 0.9, 1),
    ('little noise', 'judge', 'same_person', 0, 0.08), ('little noise', 'class', 'label', 0.2, 1),
    ('little noise', 'judge', 'same_image', 0, 0.15),
    ('little noise', 'repeated', 'same_image', 0.55, 1),       # eight releases average it away
    *(('nothing left', name, question, 0, 0.12) for name in ('judge', 'linear')
      for question in ('same_image', 'same_person')), ('nothing left', 'class', 'label', 0, 0.12)])
def test_an_attacker_finds_what_it_can_and_no_more(protection, name, question, low, high):
    found = figures(name, group_of(PROTECTIONS[protection]))[question]
    assert low <= found['rank1'] <= high
    if name == 'judge' and protection == 'none':
        assert found['rank1'] == found['ceiling']
    assert found['ceiling'] == 1 or question == 'same_person'
    if protection == 'nothing left' and name != 'class':       # chance
        low, high = found['rank1_ci']
        assert low <= found['chance'] <= high + 0.01


def test_who_averages_a_label_holds_other_photos_than_those_it_was_made_from():
    """Photos that have nothing in common with others of the person find nobody."""
    groups = [group_of(PROTECTIONS['none']) for _ in range(2)]
    for group in groups:
        group.originals = group.released = ImageRows(
            F.normalize(noisy(torch.zeros(240, 32), 7, 1)), np.arange(240))
    groups[1].person = groups[1].person + 60
    found = attacks.attack('class', groups, [Same(Plain())] * 2, None).figures['label']
    assert found['rank1'] < 0.12 and 40 < found['people'] < 80    # half of two folds
    assert found['ceiling'] < 0.12               # nor do the originals in their place


def test_what_moves_all_images_in_one_direction_hides_nobody():
    """As a blur or noise does, by which attackers once seemed half as strong as they are."""
    shift = F.normalize(torch.ones(32), dim=0)
    group = group_of(lambda z, seed: noisy(z, seed, 0.15) + 2 * shift)
    [search] = attacks.nearest(Plain(), group).values()
    plain = rank(search, 'same_image').first.mean()
    result = attacks.attack('judge', [group], [Same(Plain())], None)
    found = result.figures['same_image']
    assert found['rank1'] > plain + 0.1 and found['ceiling'] == 1
    assert found['way'] == result.way == 'embeddings, centred'
    # The same as with a gallery that is centred in memory; cosines are those of this way, too
    probes, gallery = (F.normalize(z - z.mean(0)) for z in (search.probes, search.gallery))
    n = np.arange(len(probes))
    first = rank(Search(probes, gallery, n, n, CPU), 'same_image').first
    [way] = attacks.retrieval.best_ways([{'embeddings': search}], ['same_image']).values()
    [chooses] = way.choosing()
    assert first[~chooses].mean().item() == pytest.approx(found['rank1'])
    assert (~chooses).sum() == found['probes'] and found['ways'] == 2
    np.testing.assert_allclose(result.cosines, (probes * gallery).sum(1), atol=1e-6)


def test_the_way_is_chosen_by_people_on_whom_it_is_not_reported():
    """The best of many ways that find nothing would seem to find something on its own probes."""
    torch.manual_seed(0)
    n, person = np.arange(300), np.arange(300) // 3
    ways = {str(i): Search(torch.randn(300, 8), torch.randn(300, 8), n, person, CPU,
                           is_cosine=False) for i in range(200)}
    [way] = attacks.retrieval.best_ways([ways], ['same_image']).values()
    figures = way.figures()
    [chooses] = way.choosing()
    assert figures['ways'] == 200 and figures['probes'] == (~chooses).sum()
    assert not set(person[chooses]) & set(person[~chooses])
    assert 0.3 < chooses.mean() < 0.7
    assert way.rankings[0].first[chooses].mean() > 0.015        # chance is 1 in 300
    assert figures['rank1'] < 0.015
    # One way without a choice is reported on everybody
    [only] = attacks.retrieval.best_ways([{'0': ways['0']}], ['same_image']).values()
    assert only.figures()['probes'] == 300 and only.figures()['ways'] == 1


def test_the_teacher_that_attacks_is_the_one_of_the_row():
    cfg, asked = SimpleNamespace(teacher=SimpleNamespace(checkpoint='row.pt')), []
    owned = Owned(cfg, 3, None, CPU, {})
    owned.load = lambda *what: asked.append(what)
    assert owned.embedder('teacher').name == 'row.pt'
    assert asked == [('row.pt', 'teacher', '')]


def test_whom_an_attacker_learnt_from_and_what_draws_nothing_is_not_attacked():
    n = ImageRows(np.zeros((3, 8, 8, 3), np.uint8), np.arange(3))
    with pytest.raises(InputError, match='person 5 is attacked'):
        AttackGroup(n, n, n.rows, np.array([5, 5, 9]), n, np.array([3, 5]))
    # Blurring twice tells nothing new
    assert figures('repeated', group_of(PROTECTIONS['none'], random=False)) is None


def test_backbones_of_one_file_name_and_files_called_as_an_attack_stay_apart(tmp_path):
    paths = [tmp_path / 'r50' / 'backbone.pth', tmp_path / 'r100' / 'backbone.pth',
             tmp_path / 'judge.pt', tmp_path / 'other.pt']
    for path in paths:
        path.parent.mkdir(exist_ok=True)
        path.touch()
    names = attacks.short_names(['judge', *map(str, paths)])
    assert list(names.values()) == ['judge', *map(str, paths[:3]), 'other']


# ------------------------------------------------------------------ attackers, on images

def drawn(person):
    """uint8 faces (N, 32, 32, 3) of people by number."""
    return toy.draw(person, np.arange(len(person)), size=32).permute(0, 2, 3, 1).numpy()


def test_attackers_pairs_are_encoded_like_the_release():
    """JPEG takes most of the colour from noise: who learns from raw noise learns another one."""
    cfg = namespace(resolve(TINY, ['reconstruct.method=noise', 'reconstruct.noise_std=128',
                                   'reconstruct.format=jpeg']))
    rows, protection = ImageRows(drawn(np.arange(8)), np.arange(8)), protect.Protection(cfg, None)
    group = AttackGroup(rows, rows, np.arange(8), np.arange(8), rows, -1 - np.arange(8),
                        protection=protection)
    raw = protection(torch.from_numpy(rows.pixels()), attacker_seeds(rows, 3)).numpy()
    made, _ = group.training_pairs(np.arange(8), 3)
    colour = [np.diff(x.astype(float), axis=-1).std() for x in (made, raw)]
    assert made.shape == raw.shape and abs(made.mean() - raw.mean()) < 2
    assert colour[0] < 0.6 * colour[1]


def test_who_knows_or_sees_the_mask_sees_through_it():
    """Visible patches are unprotected: masking alone falls to the attacker who looks there."""
    images, n = drawn(np.arange(40).repeat(2)), np.arange(80)
    noise = torch.rand(80, 16, generator=torch.Generator().manual_seed(0))
    hidden = models.random_masking(noise, 0.75)[2]
    x = torch.as_tensor(images).permute(0, 3, 1, 2) / 255
    made = (protect.greyed(x, hidden).permute(0, 2, 3, 1) * 255).round().byte().numpy()
    group = AttackGroup(ImageRows(made, n), ImageRows(images, n), n, n // 2,
                        ImageRows(images, n), n + 100, hidden=hidden)
    found = figures('masked', group)['same_image']
    assert found['rank1'] == found['ceiling'] == 1
    for search in Patches(group).by_look().values():
        assert rank(search, 'same_image').first.mean() > 0.9   # a grey patch gives itself away
    owned = Same(Embedder('pixels', None, None, CPU))
    seen = figures('pixels', group, owned)['same_image']
    assert seen['rank1'] > max(0.9, figures('judge', group, owned)['same_image']['rank1'])
    assert seen['way'].startswith('patches')
    group.hidden = 1 - hidden                        # who looks at the hidden ones sees grey
    assert figures('masked', group)['same_image']['rank1'] < 0.1
    group.hidden = None                              # of a foreign release nobody knows the mask
    assert figures('guess', group)['same_image']['rank1'] > 0.9


def test_an_attacker_trained_on_other_peoples_pairs_undoes_a_fixed_change():
    """A negative with two colours exchanged: not one face looks like itself to the stock judge."""
    private, public = drawn(np.arange(64)), drawn(np.arange(500, 564))
    torch.manual_seed(0)
    net, n = models.iresnet(10, 8, 32, 32), np.arange(64)
    net.train()(torch.from_numpy(public).permute(0, 3, 1, 2) / 127.5 - 1)  # BatchNorm's statistics
    cfg = SimpleNamespace(evaluate=SimpleNamespace(attack_steps=40, batch=64),
                          run=SimpleNamespace(precision='fp32'))
    owned = Same(Embedder('judge', net.eval(), cfg, CPU))
    group = AttackGroup(
        ImageRows(255 - private[..., ::-1], n), ImageRows(private, n), n, n,
        ImageRows(public, n), n + 500, pair_released=ImageRows(255 - public[..., ::-1], n))
    before = {k: v.clone() for k, v in net.state_dict().items()}
    stock = figures('judge', group, owned)['same_image']['rank1']
    assert figures('trained', group, owned, cfg)['same_image']['rank1'] > stock + 0.2
    assert all(torch.equal(v, before[k]) for k, v in net.state_dict().items())   # a copy learnt


@pytest.mark.long
def test_masks_are_read_off_a_release_better_by_a_net_than_by_detail(monkeypatch):
    """A reconstruction is smoother where it was guessed: who trains on his own images sees it."""
    faces, n, seeds = drawn(np.arange(400) // 2), np.arange(100), torch.arange(100)
    cfg = namespace(resolve(TINY, ['evaluate.attack_steps=60', 'reconstruct.batch=64',
                                   'reconstruct.mask_ratio=0.75']))

    def smoothed(x, seeds, cfg, mae):
        hidden = protect.drawn(protect.hidden_patches(seeds, 0.75, cfg), 8) > 0
        return torch.where(hidden, F.avg_pool2d(x, 3, 1, 1, count_include_pad=False), x)

    monkeypatch.setitem(protect.PROTECTIONS, 'facemae', protect.Method(smoothed, draws_mask=True))
    protection = protect.Protection(cfg, None)
    released = protection(torch.from_numpy(faces[:100]), seeds).numpy()
    hidden = protect.hidden_patches(seeds, 0.75, cfg)
    group = AttackGroup(ImageRows(released, n), ImageRows(faces, n), n, n // 2,
                        ImageRows(faces, np.arange(100, 400)), np.arange(100, 400) // 2,
                        protection=protection, hidden=hidden)
    visible = hidden.flatten().numpy() == 0
    detail = cells(group.released, 4, CPU)[1].flatten().numpy()
    learnt = guess_masks(group, cfg).flatten().numpy()
    by_detail, by_net = (auc(-x, visible) for x in (detail, learnt))
    assert by_net > 0.95 and by_net > by_detail + 0.1


# ------------------------------------------------------------------------------- figures

def test_the_interval_draws_people_not_images():
    rng = np.random.default_rng(0)
    person = np.arange(50).repeat(20)
    alike = rng.random(50)[person] < 0.5           # all images of a person fall together
    apart = rng.random(1000) < 0.5
    wide, narrow = (np.diff(interval(x, person))[0] for x in (alike, apart))
    assert wide == pytest.approx(4 * 0.5 / 50 ** 0.5, rel=0.15)
    assert narrow == pytest.approx(4 * 0.5 / 1000 ** 0.5, rel=0.25)


def test_membership_tells_a_recogniser_that_memorised_from_one_that_did_not(tmp_path):
    rng = np.random.default_rng(0)
    scores = attacks.Membership(rng.normal(size=4000), rng.normal(size=4000))
    same = attacks.membership_figures([scores])
    assert same['auc'] == pytest.approx(0.5, abs=0.03) and same['tpr@fpr=1e-2'] < 0.03
    faces, n = rng.integers(0, 256, (60, 8, 8, 3), dtype=np.uint8), np.arange(30)
    group = AttackGroup(ImageRows(faces, n), ImageRows(faces, n), n, n, ImageRows(faces, n + 30),
                        n + 30, outsiders=ImageRows(faces, n + 30))
    owned = Same(SimpleNamespace(
        embed=lambda chosen: torch.as_tensor(chosen.rows < 30).float()[:, None]))
    owned.student = tmp_path / 'fr.pt'
    torch.save({'head': {'weight': torch.full((1, 1), 3.0)}}, owned.student)
    found = figures('membership', group, owned)['recogniser']
    assert found['auc'] == 1 and found['members'] == found['others'] == 30
    group.outsiders = None                           # of a foreign release
    assert figures('membership', group, owned) is None


def test_a_recogniser_that_overflows_is_refused():
    cfg = SimpleNamespace(evaluate=SimpleNamespace(batch=8), run=SimpleNamespace(precision='fp32'))
    net = models.iresnet(10, 8, 32, 32).eval()
    torch.nn.init.constant_(net.fc.weight, 1e38)
    images = ImageRows(np.full((3, 32, 32, 3), 99, np.uint8), np.arange(3))
    with pytest.raises(InputError, match='no finite numbers'):
        Embedder('broken', net, cfg, CPU).embed(images)
