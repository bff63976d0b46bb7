"""Each attacker on embeddings or images whose right answer is known."""
from functools import partial
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import models
from conftest import TINY
from facekit import attack_data, attacks, mask_attacks, protect, retrieval, toy, verification
from facekit.attack_data import AttackGroup
from facekit.config import namespace, resolve
from facekit.embed import Embedder
from facekit.errors import InputError
from facekit.faces import ImageRows


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


@pytest.mark.parametrize('block', [7, 1000])
def test_search_equals_a_full_sort(block):
    torch.manual_seed(0)
    gallery = F.normalize(torch.randn(60, 8))
    people = torch.arange(60) // 4 % 13                     # some have 4 images, some 8
    people[-1] = 99                                         # and one a single image
    source = torch.randint(60, (200,))
    source[0] = 59
    probes = F.normalize(gallery[source] + 0.5 * torch.randn(200, 8))
    numbers = torch.arange(60)
    for ids, gallery_ids, exclude in ((source, numbers, None), (people[source], people, source)):
        got = retrieval.search(probes, gallery, ids, gallery_ids, exclude, block)
        got = np.stack([got.first, got.chance, got.probe], 1)
        expected = brute_force(probes.numpy(), gallery.numpy(), ids.numpy(), gallery_ids.numpy(),
                               None if exclude is None else exclude.numpy())
        np.testing.assert_allclose(got, expected, rtol=1e-5)


def test_search_gives_chance_for_noise_and_for_collapse():
    torch.manual_seed(0)
    gallery, probes = F.normalize(torch.randn(500, 16)), F.normalize(torch.randn(2000, 16))
    source = torch.randint(500, (2000,))
    rank1 = retrieval.rank1([retrieval.search(probes, gallery, source, torch.arange(500))])
    assert rank1 < 0.008                       # chance 0.002, four standard errors
    same = F.normalize(torch.ones(500, 16))    # one embedding for everybody
    found = retrieval.search(same[source], same, source, torch.arange(500))
    assert torch.allclose(found.first, found.chance)


def test_ties_are_drawn_by_lot():
    """A gallery in which some pictures stand twice hides nobody."""
    gallery, person = people(40, 5, 8, 0)
    gallery[7], gallery[8] = gallery[12], gallery[12]           # of persons 1, 1 and 2
    n = torch.arange(200)
    first = retrieval.search(gallery, gallery, n, n, block=64).first
    assert torch.allclose(first[[7, 8, 12]], torch.tensor(1 / 3)) and first.sum() == 198
    by_person = retrieval.search(gallery, gallery, person, person, n).first
    assert by_person[7] == by_person[8] == 0.5       # one twin is the same person, one is not
    assert by_person[12] == 0                        # both twins are another person


def test_a_gallery_is_cut_among_people_without_a_probe():
    labels = np.arange(100) // 5
    rows, cfg = np.arange(10, 90), SimpleNamespace(evaluate=SimpleNamespace(gallery=12))
    chosen = attack_data.searched(rows, labels, labels[[13, 51]], cfg)
    assert len(chosen) == 22 and (np.diff(chosen) > 0).all() and np.isin(chosen, rows).all()
    assert {10, 11, 12, 13, 14, 50, 51, 52, 53, 54} <= set(chosen.tolist())
    assert np.array_equal(chosen, attack_data.searched(rows, labels, labels[[13, 51]], cfg))
    cfg.evaluate.gallery = 0
    assert np.array_equal(rows, attack_data.searched(rows, labels, labels[[13, 51]], cfg))


def people(count, images, dim, seed):
    """Unit embeddings of some people, and who they are."""
    torch.manual_seed(seed)
    person = torch.arange(count).repeat_interleave(images)
    z = torch.randn(count, dim)[person] + 0.7 * torch.randn(len(person), dim)
    return F.normalize(z), person


class Plain(Embedder):
    """An embedder whose images are embeddings already."""

    def __init__(self):
        super().__init__('plain', None, None, None)

    def embed(self, chosen):
        return F.normalize(torch.as_tensor(chosen.images)[chosen.rows])


class Group(AttackGroup):
    """A group whose pairs and second releases `protect(images, seed)` makes."""

    def protected(self, chosen, seed):
        return self.protect(chosen.images, seed)[chosen.rows]

    def is_random(self):
        return self.again


def group_of(protect, count=60, images=4, dim=32):
    """A group whose images are embeddings, and an embedder that takes them as they are."""
    z, person = people(count, images, dim, 0)
    known, others = people(3 * count, images, dim, 1)
    shuffled = torch.randperm(len(known))
    known, others, n = known[shuffled], others[shuffled], np.arange(len(z))
    group = Group(ImageRows(protect(z, 0), n), ImageRows(z, n), n, person.numpy(),
                  ImageRows(known, np.arange(len(known))), -1 - others.numpy())
    group.protect, group.again = protect, True
    return group, Plain()


def noisy(z, seed, size):
    generator = torch.Generator().manual_seed(seed)
    return z + size * torch.randn(z.shape, generator=generator)


def tried(attack, group, **changes):
    found = attack(group)
    return found and {f'x_{k}': v for k, v in retrieval.figures_of([found]).items()}


def test_a_hidden_rotation_is_found_by_the_linear_attacker_and_not_by_the_stock_judge():
    turn = torch.linalg.qr(torch.randn(32, 32, generator=torch.Generator().manual_seed(3)))[0]
    group, eye = group_of(lambda z, seed: noisy(z @ turn, seed, 0.05))
    blind = tried(partial(attacks.nearest, eye), group)['x_same_image']
    assert blind['rank1'] < 0.03 and blind['ceiling'] == 1
    found = tried(partial(attacks.linear, eye), group)['x_same_image']
    assert found['rank1'] > 0.9
    few, many = (found['curve']['rotation'][n] for n in ('16', '256'))
    assert few < 0.5 < many                       # 16 pairs do not fix a rotation of 32 dimensions
    assert found['curve']['rotation']['256'] >= found['curve']['ridge']['64']


def test_independent_noise_gives_chance_to_every_attacker():
    group, eye = group_of(lambda z, seed: noisy(0 * z, seed, 1))
    for attack in (attacks.nearest, attacks.linear):
        found = tried(partial(attack, eye), group)
        for kind in ('same_image', 'same_person'):
            low, high = found[f'x_{kind}']['rank1_ci']
            assert low <= found[f'x_{kind}']['chance'] <= high + 0.01
    found = tried(partial(attacks.by_class, {'eye': eye}), group)['x_same_person']
    assert found['rank1'] < 0.12 and found['chance'] == pytest.approx(1 / 60)


def test_the_teacher_that_attacks_is_the_one_of_the_row():
    group, eye = group_of(lambda z, seed: z)
    cfg = SimpleNamespace(teacher=SimpleNamespace(checkpoint='row.pt'))
    asked = []
    recognisers = SimpleNamespace(public=lambda *what: asked.append(what) or eye)
    attacks.attack('teacher', 0, group, recognisers, None, cfg, 'cpu')
    assert asked == [('teacher', 0, 'row.pt')]


def test_who_averages_a_label_holds_other_photos_than_those_it_was_made_from():
    """Photos that have nothing in common with others of the person find nobody."""
    group, eye = group_of(lambda z, seed: z)
    group.originals = group.released = ImageRows(
        F.normalize(noisy(torch.zeros(240, 32), 7, 1)), np.arange(240))
    found = [attacks.by_class({'eye': eye}, group) for _ in range(2)]
    figures = retrieval.figures_of(found)['same_person']
    assert figures['rank1'] < 0.12 and figures['people'] == 120       # of two folds
    assert figures['ceiling'] < 0.12             # nor do the originals in their place


def test_an_unprotected_release_gives_the_ceiling():
    group, eye = group_of(lambda z, seed: z)
    found = tried(partial(attacks.nearest, eye), group)
    assert found['x_same_image']['rank1'] == 1
    assert np.allclose(retrieval.cosines_of([attacks.nearest(eye, group)]).true, 1)
    person = found['x_same_person']
    assert person['rank1'] == person['ceiling'] and 0.3 < person['rank1'] < 1
    assert tried(partial(attacks.linear, eye), group)['x_same_image']['rank1'] > 0.95
    assert tried(partial(attacks.patchwork, cfg=None, device='cpu', original=True), group) is None


def test_attackers_pairs_are_encoded_like_the_release(tmp_path):
    """JPEG takes most of the colour from noise: who learns from raw noise learns another one."""
    cfg = namespace(resolve(TINY, ['reconstruct.method=noise', 'reconstruct.noise_std=128',
                                   'reconstruct.format=jpeg']))
    rows = ImageRows(toy.draw(np.arange(8), np.arange(8), 32).permute(0, 2, 3, 1).numpy(),
                     np.arange(8))
    protection = protect.Protection(cfg, None)
    group = AttackGroup(rows, rows, np.arange(8), np.arange(8), rows, -1 - np.arange(8),
                        protection=protection)
    raw = protection(torch.from_numpy(rows.pixels()), attack_data.attacker_seeds(rows, 3)).numpy()
    made, _ = group.training_pairs(np.arange(8), 3)
    colour = [np.diff(x.astype(float), axis=-1).std() for x in (made, raw)]
    assert made.shape == raw.shape and abs(made.mean() - raw.mean()) < 2
    assert colour[0] < 0.6 * colour[1]


def test_what_moves_all_images_in_one_direction_hides_nobody():
    """As a blur or noise does, by which attackers once seemed half as strong as they are."""
    shift = F.normalize(torch.ones(32), dim=0)
    group, eye = group_of(lambda z, seed: noisy(z, seed, 0.15) + 2 * shift)
    found = attacks.nearest(eye, group)
    search = found.ways['embeddings']
    plain = retrieval.pooled([search])['same_image']['rank1']
    figures = retrieval.figures_of([found])
    assert figures['same_image']['rank1'] > plain + 0.1
    assert figures['same_image']['way'] == 'embeddings, centred'
    # The same as with a gallery that is centred in memory
    probes, gallery = (F.normalize(z - z.mean(0)) for z in (search.probes, search.gallery))
    n = torch.arange(len(probes))
    first = retrieval.search(probes, gallery, n, n).first
    assert first.mean().item() == pytest.approx(figures['same_image']['rank1'])
    assert figures['same_image']['ceiling'] == 1


def test_labels_and_repeated_releases_average_the_protection_away():
    group, eye = group_of(lambda z, seed: noisy(z, seed, 0.45))
    single = tried(partial(attacks.nearest, eye), group)
    by_label = tried(partial(attacks.by_class, {'eye': eye}), group)['x_same_person']
    assert by_label['rank1'] > single['x_same_person']['rank1'] + 0.2
    curve = tried(partial(attacks.repeated, {'eye': eye}), group)['x_same_image']['curve']
    rising = [curve['eye'][k] for k in '1248']
    assert rising[0] == single['x_same_image']['rank1']
    assert rising == sorted(rising) and rising[3] > rising[0] + 0.4
    group.again = False                      # blurring twice tells nothing new
    assert tried(partial(attacks.repeated, {'eye': eye}), group) is None


def test_who_knows_the_mask_sees_through_it():
    """Visible patches are unprotected: masking alone falls to the attacker who looks there."""
    images = toy.draw(np.arange(40).repeat(2), np.arange(80), size=32).permute(0, 2, 3, 1).numpy()
    noise = torch.rand(80, 16, generator=torch.Generator().manual_seed(0))
    hidden = models.random_masking(noise, 0.75)[2]
    x = torch.as_tensor(images).permute(0, 3, 1, 2) / 255
    made = (protect.masked(x, noise, 0.75, 8).permute(0, 2, 3, 1) * 255).round().byte().numpy()
    n = np.arange(80)
    group = AttackGroup(ImageRows(made, n), ImageRows(images, n), n, n // 2,
                        ImageRows(images, n), n + 100, hidden=hidden)
    found = tried(partial(attacks.patchwork, cfg=None, device='cpu'), group)['x_same_image']
    assert found['rank1'] == found['ceiling'] == 1
    looked = found['curve']['mask']          # a flat or grey patch gives itself away
    assert min(looked['patches with detail'], looked['patches not grey']) > 0.9
    pixels = Embedder('pixels', None, None, 'cpu')
    whole = tried(partial(attacks.nearest, pixels), group)['x_same_image']['rank1']
    seen = tried(partial(attacks.by_pixels, pixels, device='cpu'), group)['x_same_image']
    assert seen['rank1'] > max(0.9, whole) and seen['way'].startswith('patches')
    group.hidden = 1 - hidden                        # who looks at the hidden ones sees grey
    found = tried(partial(attacks.patchwork, cfg=None, device='cpu'), group)
    assert found['x_same_image']['rank1'] < 0.1
    assert tried(partial(attacks.patchwork, cfg=None, device='cpu', original=True), group)[
        'x_same_image']['rank1'] == 1


def test_an_attacker_trained_on_other_peoples_pairs_undoes_a_fixed_change():
    """A negative with two colours exchanged: not one face looks like itself to the stock judge."""
    def faces(first):
        return toy.draw(np.arange(first, first + 96), np.arange(96), size=32).permute(0, 2, 3, 1)

    private, public, n = faces(0), faces(500), np.arange(96)
    torch.manual_seed(0)
    net = models.iresnet(10, 8, 32, 32)
    net.train()(public.permute(0, 3, 1, 2) / 127.5 - 1)        # BatchNorm's statistics
    cfg = SimpleNamespace(evaluate=SimpleNamespace(attack_steps=40, batch=96),
                          run=SimpleNamespace(precision='fp32'))
    device = torch.device('cpu')
    eye = Embedder('eye', net.eval(), cfg, device)
    group = AttackGroup(
        ImageRows(255 - private.flip(3), n), ImageRows(private, n), n, n,
        ImageRows(public, n), n + 500, pair_released=ImageRows(255 - public.flip(3), n))
    before = {k: v.clone() for k, v in net.state_dict().items()}
    stock = tried(partial(attacks.nearest, eye), group)['x_same_image']['rank1']
    found = tried(partial(attacks.trained, eye, cfg=cfg, device=device), group)
    assert found['x_same_image']['rank1'] > stock + 0.3
    assert all(torch.equal(v, before[k]) for k, v in net.state_dict().items())   # a copy learnt


def test_the_interval_draws_people_not_images():
    rng = np.random.default_rng(0)
    person = np.arange(50).repeat(20)
    alike = rng.random(50)[person] < 0.5           # all images of a person fall together
    apart = rng.random(1000) < 0.5
    wide, narrow = (np.diff(verification.interval(x, person))[0] for x in (alike, apart))
    assert wide == pytest.approx(4 * 0.5 / 50 ** 0.5, rel=0.15)
    assert narrow == pytest.approx(4 * 0.5 / 1000 ** 0.5, rel=0.25)


def test_membership_tells_a_model_that_memorised_from_one_that_did_not():
    rng = np.random.default_rng(0)
    same = attacks.membership(rng.normal(size=4000), rng.normal(size=4000))
    assert same['auc'] == pytest.approx(0.5, abs=0.03) and same['tpr@fpr=1e-2'] < 0.03
    faces = rng.integers(0, 256, (60, 8, 8, 3), dtype=np.uint8)
    blurred = np.broadcast_to(faces.mean((1, 2), keepdims=True), faces.shape)
    n = np.arange(30)
    group = Group(ImageRows(blurred, n), ImageRows(faces, n), n, n, ImageRows(faces, n + 30),
                  n + 30, pair_released=ImageRows(faces, n + 30))
    group.protect = lambda images, seed: blurred
    assert attacks.reconstruction_membership([group])['auc'] == 1
    group.pair_released = ImageRows(blurred, n + 30)
    assert attacks.reconstruction_membership([group])['auc'] < 0.7
    group.outsiders = ImageRows(faces, np.arange(30, 60))
    embedder = SimpleNamespace(
        embed=lambda chosen: torch.as_tensor(chosen.rows < 30).float()[:, None])
    assert attacks.recogniser_membership(embedder, torch.ones(1, 1), [group])['auc'] == 1


def test_an_attacker_who_learnt_from_the_victims_is_refused():
    n = ImageRows(np.zeros((3, 8, 8, 3), np.uint8), np.arange(3))
    with pytest.raises(InputError, match='person 5 is attacked'):
        AttackGroup(n, n, n.rows, np.array([5, 5, 9]), n, np.array([3, 5]))


def test_equal_embeddings_tie_whatever_the_shapes_of_the_products():
    """In float32 rounding decided: each image has a twin, so its original is first or second."""
    torch.manual_seed(0)
    half = F.normalize(torch.randn(700, 512))
    gallery = half.repeat(2, 1)[torch.randperm(1400)]
    for block in (100, 1000, 16384):
        for count in (3, 700, 1400):
            found = retrieval.search(gallery[:count], gallery, torch.arange(count),
                                     torch.arange(1400), block=block)
            assert (found.first == 0.5).all()


def test_backbones_of_one_file_name_and_files_called_as_an_attack_stay_apart(tmp_path):
    paths = [tmp_path / 'r50' / 'backbone.pth', tmp_path / 'r100' / 'backbone.pth',
             tmp_path / 'judge.pt', tmp_path / 'other.pt']
    for path in paths:
        path.parent.mkdir(exist_ok=True)
        path.touch()
    names = attacks.short_names(['judge', *map(str, paths)])
    assert list(names.values()) == ['judge', 'r50/backbone', 'r100/backbone',
                                    f'{tmp_path.name}/judge', 'other']


def test_other_people_are_others_even_where_two_are_left():
    person = np.array([0] * 9 + [1])
    rows = np.arange(10).repeat(50)
    other = verification.of_others(person, rows, np.random.default_rng(0))
    same = verification.of_same(person, rows, np.random.default_rng(0))
    assert (person[other] != person[rows]).all() and (person[same] == person[rows]).all()
    assert set(other[person[rows] == 1]) == set(range(9))
    assert (same[rows < 9] != rows[rows < 9]).all()


def test_masks_are_read_off_a_release_better_by_a_net_than_by_detail():
    """A reconstruction is smoother where it was guessed: who trains on his own images sees it."""
    faces = toy.draw(np.arange(400) // 2, np.arange(400), size=32).permute(0, 2, 3, 1).numpy()
    cfg = SimpleNamespace(
        evaluate=SimpleNamespace(attack_steps=60), mae=SimpleNamespace(patch=8),
        reconstruct=SimpleNamespace(method='facemae', mask_ratio=0.75, batch=64, format='png'))

    class Smoothing(protect.Protection):
        def __call__(self, images, seeds):
            x = images.permute(0, 3, 1, 2).float()
            noise = self.patch_noise(seeds, 32)
            hidden = protect.masked(torch.zeros_like(x), noise, 0.75, 8) > 0
            smooth = F.avg_pool2d(x, 3, 1, 1, count_include_pad=False)
            return torch.where(hidden, smooth, x).permute(0, 2, 3, 1).round().byte()

    protection, n = Smoothing(cfg, None), np.arange(100)
    seeds = torch.arange(100)
    released = protection(torch.from_numpy(faces[:100]), seeds).numpy()
    hidden = models.random_masking(protection.patch_noise(seeds, 32), 0.75)[2]
    group = AttackGroup(ImageRows(released, n), ImageRows(faces, n), n, n // 2,
                        ImageRows(faces, np.arange(100, 400)), np.arange(100, 400) // 2,
                        protection=protection, hidden=hidden)
    visible = hidden.flatten().numpy() == 0
    detail = mask_attacks.cells(group.released, 4, 'cpu')[1].flatten().numpy()
    learnt = mask_attacks.guess_masks(group, cfg, 'cpu').flatten().numpy()
    by_detail, by_net = (verification.auc(-x, visible) for x in (detail, learnt))
    assert by_net > 0.95 and by_net > by_detail + 0.1


def test_a_recogniser_that_overflows_is_refused_and_finds_nobody_by_chance():
    cfg = SimpleNamespace(evaluate=SimpleNamespace(batch=8), run=SimpleNamespace(precision='fp32'))
    net = models.iresnet(10, 8, 32, 32).eval()
    torch.nn.init.constant_(net.fc.weight, 1e38)
    images = ImageRows(np.full((3, 32, 32, 3), 99, np.uint8), np.arange(3))
    with pytest.raises(InputError, match='no finite numbers'):
        Embedder('broken', net, cfg, torch.device('cpu')).embed(images)
