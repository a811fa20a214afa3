"""Nearest training neighbours and duplicates, against brute force, planted copies and counting."""

import tracemalloc

import numpy as np
import pytest
import torch
from scipy.spatial.distance import cdist

from pipeline.evaluation import memorisation, pictures
from pipeline.evaluation.memorisation import duplicates, exact_copies, nearest
from pipeline.stage import UserError


def pixels(batch: np.ndarray) -> torch.Tensor:
    """Pixels as features: equal images have the distance 0 exactly."""
    return torch.from_numpy(batch.reshape(len(batch), -1).astype(np.float32))


def normal(count, width, seed):
    return torch.randn(count, width, generator=torch.Generator().manual_seed(seed))


def images(count, seed, size=6, channels=3):
    rng = np.random.default_rng(seed)
    return rng.integers(0, 256, (count, size, size, channels), dtype=np.uint8)


@pytest.mark.parametrize("block", [1, 2, 30, 97, 200])
@pytest.mark.parametrize("count", [1, 5])
def test_neighbours_against_brute_force_for_any_blocks(block, count):
    views, training = [normal(23, 7, 0), normal(23, 7, 1)], normal(97, 7, 2)
    found = nearest(views, training.split(block), count)
    every = [cdist(view.double(), training.double()) for view in views]
    distances = np.minimum(*every)  # of an image, to the view that is closer
    order = distances.argsort(1)[:, :count]
    np.testing.assert_array_equal(found.indices, order)
    np.testing.assert_allclose(found.distances, np.take_along_axis(distances, order, 1), rtol=1e-6)
    alone = nearest(views[:1], training.split(block), count)
    np.testing.assert_array_equal(alone.indices, every[0].argsort(1)[:, :count])


def test_planted_copies_are_found_exactly_mirrored_ones_too():
    training, samples = images(300, 0), images(40, 1)
    samples[4], samples[9], samples[30] = training[250], training[0], training[17, :, ::-1]
    samples[11] = training[77]
    samples[11, 0, 0, 0] ^= 1  # one step of one pixel is no copy
    blocks = pixels(training).split(64)
    found = nearest([pixels(samples)], blocks)
    exact = np.flatnonzero(found.distances[:, 0] == 0)
    assert exact.tolist() == [4, 9] and found.indices[exact, 0].tolist() == [250, 0]
    assert (found.indices[11, 0], found.distances[11, 0]) == (77, 1)
    mirrored = np.ascontiguousarray(samples[:, :, ::-1])
    found = nearest([pixels(samples), pixels(mirrored)], blocks)
    exact = np.flatnonzero(found.distances[:, 0] == 0)
    assert exact.tolist() == [4, 9, 30] and found.indices[exact, 0].tolist() == [250, 0, 17]
    score = exact_copies([np.split(samples, 4), [mirrored]], np.array_split(training, 7))
    assert score.value == 3 / 40
    # Wilson's interval: the p with |3/40 - p| = 1.96 sqrt(p (1 - p) / 40)
    for p in score.interval:
        assert abs(3 / 40 - p) == pytest.approx(1.959964 * np.sqrt(p * (1 - p) / 40), rel=1e-5)
    # by features, whose distances are rounded, the copies are the nearest by far
    features = nearest([pixels(samples) / 255], (pixels(training) / 255).split(64))
    assert features.indices[[4, 9], 0].tolist() == [250, 0]
    assert features.distances[[4, 9], 0].max() < 1e-3 < np.delete(features.distances[:, 0],
                                                                  [4, 9, 11]).min()  # fmt: skip


def test_a_symmetric_image_is_its_neighbour_once():
    training = images(20, 0)
    training[3, :, ::-1] = training[3]
    training[3, :, 3:] = training[3, :, 2::-1]
    sample = pixels(np.repeat(training[3:4], 16, axis=0))
    found = nearest([sample, sample], pixels(training).split(4), count=20)
    assert (found.indices[:, 0] == 3).all() and (found.distances[:, 0] == 0).all()
    assert (np.sort(found.indices, 1) == np.arange(20)).all()


def test_rate_of_held_out_images_is_what_the_quantile_says():
    # with m distances to calibrate on, a new one is within the r-th with probability r / (m + 1)
    rng = np.random.default_rng(0)
    rates = []
    for seed in range(300):
        held_out = rng.gamma(9.0, size=600)
        found = duplicates(rng.gamma(9.0, size=50), held_out, seed)
        assert (held_out <= found.threshold).sum() >= 3
        rates.append((found.held_out.value, found.samples.value))
    rates = np.array(rates)
    error = rates.std(0) / np.sqrt(300)
    assert (np.abs(rates.mean(0) - 3 / 301) < 3 * error).all()
    assert error[0] < 0.001


def test_duplicates_are_counted_beside_real_images_that_are_none():
    training, held_out, samples = normal(500, 12, 0), normal(400, 12, 1), normal(200, 12, 2)
    samples[:60] = training[100:160] + 0.05 * samples[:60]  # small variations of training images
    near, held = (nearest([each], [training], 1).distances[:, 0] for each in (samples, held_out))
    found = duplicates(near, held)
    assert near[:60].max() < found.threshold
    assert 0.3 <= found.samples.value < 0.34
    assert found.held_out.value < 0.04 < found.samples.interval[0]
    assert found.samples.interval[0] < 0.3 < found.samples.interval[1]
    assert found == duplicates(near, held) != duplicates(near, held, seed=1)


def test_copies_count_where_held_out_images_are_copies_as_well():
    found = duplicates(np.array([0.0, 0.0, 1.0]), np.zeros(40))
    assert (found.threshold, found.samples.value, found.held_out.value) == (0, 2 / 3, 1)


@pytest.mark.parametrize("channels", [1, 3])
def test_picture_shows_the_closest_samples_beside_their_neighbours(channels):
    training, samples = images(50, 0, channels=channels), images(20, 1, channels=channels)
    samples[7], samples[2] = training[31], training[44]
    samples[2, 0, 0] ^= 4
    found = nearest([pixels(samples)], [pixels(training)], count=2)
    sheet = memorisation.picture(samples, training, found, rows=3)
    third = found.distances[:, 0].argsort()[2]
    chosen = [samples[7], training[31], training[found.indices[7, 1]],
              samples[2], training[44], training[found.indices[2, 1]],
              samples[third], *training[found.indices[third]]]  # fmt: skip
    np.testing.assert_array_equal(sheet, pictures.grid(np.stack(chosen), columns=3))


def test_distances_are_never_all_in_memory():
    samples, training = normal(2000, 4, 0), normal(20_000, 4, 1)
    tracemalloc.start()
    nearest([samples], training.split(4000), 3)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 2000 * 4000  # bytes; one block's distances alone would be 8 times as many


def test_what_cannot_be_searched_is_refused():
    good, broken = normal(20, 3, 0), normal(20, 3, 0)
    broken[7, 0] = np.inf
    with pytest.raises(ValueError, match="4 training images have no 5 nearest"):
        nearest([good], good[:4].split(3), 5)
    with pytest.raises(ValueError, match="0 training images"):
        nearest([good], [])
    with pytest.raises(UserError, match="view 1 image 7 are not finite"):
        nearest([good, broken], [good])
    with pytest.raises(ValueError):
        nearest([good], [broken])
    with pytest.raises(ValueError):
        nearest([good], [normal(20, 4, 0)])
