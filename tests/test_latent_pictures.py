"""The pictures of a VAE: their cells against the model's own parts, by other means."""

import json
import math

import numpy as np
import pytest
import torch

from pipeline.evaluation import latent_pictures
from pipeline.evaluation.latent_pictures import (
    OFFSETS,
    Posteriors,
    attribute_rows,
    curves,
    generation,
    interpolation,
    manifold,
    manipulation,
    posterior_means,
    posterior_scatter,
    prior_latents,
    reconstructions,
    samples,
    traversal,
)
from pipeline.evaluation.pictures import to_uint8
from pipeline.models.vae.vae import VAE, VAEConfig

SIZE = 8
KINDS = {
    "gray": {"in_channels": 1},
    "conv": {"network": "conv", "channels": 4},
    "ae": {"posterior": "delta"},
    "iaf": {"posterior": "iaf"},
    "bits": {"posterior": "bernoulli", "likelihood": "bernoulli"},
    "two layers": {"top_dim": 2},
}


def tiny(seed: int = 0, **changes) -> VAE:
    """An untrained model in float64, far enough from zero for images that differ."""
    torch.manual_seed(seed)
    values = {"network": "mlp", "channels": 16, "latent_dim": 3, "image_size": SIZE}
    model = VAE(VAEConfig(**values | changes)).double()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return model


def images_for(model: VAE, count: int = 5) -> torch.Tensor:
    channels = model.config.in_channels
    pixels = torch.randint(256, (count, channels, SIZE, SIZE)).double() / 255
    return pixels.round() if model.config.likelihood == "bernoulli" else pixels


def rgb(images: torch.Tensor) -> np.ndarray:
    """(N, C, S, S) -> (N, S, S, 3) uint8."""
    pixels = to_uint8(images)
    return np.broadcast_to(pixels, (*pixels.shape[:3], 3))


def cells(sheet: np.ndarray, rows: int, columns: int, gap: int = 2, scale: int = 8) -> np.ndarray:
    """The images of a sheet as they were before they were enlarged, (rows, columns, S, S, 3)."""
    pitch = SIZE * scale + gap
    height, width = rows * pitch + gap, columns * pitch + gap
    assert sheet.dtype == np.uint8 and sheet.shape[2] == 3
    assert sheet.shape[0] >= height and sheet.shape[1] >= width
    body = sheet[-height:, -width:]
    found = np.empty((rows, columns, SIZE, SIZE, 3), np.uint8)
    for row in range(rows):
        for column in range(columns):
            top, left = gap + row * pitch, gap + column * pitch
            cell = body[top : top + SIZE * scale, left : left + SIZE * scale]
            found[row, column] = cell[::scale, ::scale]
            assert (cell == found[row, column].repeat(scale, 0).repeat(scale, 1)).all()
    return found


# Sheets.


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_reconstructions_lie_below_their_originals(kind):
    model = tiny(**KINDS[kind])
    images, y = images_for(model), model.condition(5)
    sheet = reconstructions(model, images, y, columns=3)
    found = cells(sheet, 4, 3)
    decoded = rgb(model.reconstruct(images, y))
    assert (found[[0, 2]].reshape(6, SIZE, SIZE, 3)[:5] == rgb(images)).all()
    assert (found[[1, 3]].reshape(6, SIZE, SIZE, 3)[:5] == decoded).all()
    assert (found[2:, 2] == 255).all()  # nothing is left to show there
    captions = sheet[:, : -(3 * 66 + 2)]
    assert (captions < 128).any((1, 2)).sum() > 4 * 5  # four of them, some pixels high each
    assert (captions[:, 0] == 255).all() and (captions[:, -1] == 255).all()  # none cut off


def test_the_size_of_the_batches_changes_nothing(monkeypatch):
    model = tiny(num_classes=2)
    images, y = images_for(model), model.condition(5, torch.tensor([0, 1, 1, 0, -1]))
    z = prior_latents(model, y, 0)
    whole = reconstructions(model, images, y), posterior_means(model, images, y)
    monkeypatch.setattr(latent_pictures, "BATCH_SIZE", 2)
    assert (reconstructions(model, images, y) == whole[0]).all()
    torch.testing.assert_close(posterior_means(model, images, y), whole[1])
    assert (cells(samples(model, z, y, 0), 2, 5)[0] == rgb(model.decode_mean(z, y))).all()


@pytest.mark.parametrize("channels", [1, 3])
@torch.no_grad()
def test_draws_spread_around_the_means_as_the_likelihood_says(channels):
    model = tiny(variance=4e-4, in_channels=channels)  # 5.1 grey values
    y = model.condition(16)
    z = prior_latents(model, y, 0)
    mean, draw = cells(samples(model, z, y, seed=1, columns=16), 2, 16)[..., :channels].astype(int)
    assert (mean == to_uint8(model.decode_mean(z, y))).all()
    inside = (mean > 30) & (mean < 225)  # others may be clamped
    noise = (draw - mean)[inside] / (255 * 0.02)
    assert noise.size > mean.size / 2
    assert abs(noise.mean()) < 5 / noise.size**0.5
    assert abs(noise.std() - 1) < 5 / (2 * noise.size) ** 0.5 + 0.01  # 0.01: rounded to uint8


def test_bernoulli_draws_are_black_or_white():
    model = tiny(**KINDS["bits"])
    y = model.condition(4)
    z = prior_latents(model, y, 0)
    assert set(z.unique().tolist()) == {0.0, 1.0}
    assert set(np.unique(cells(samples(model, z, y, 0), 2, 4)[1])) == {0, 255}


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_drawn_follows_from_the_seed_alone(kind):
    model = tiny(**KINDS[kind])
    y = model.condition(6)
    before = torch.get_rng_state()
    z = prior_latents(model, y, 3)
    sheet = samples(model, z, y, 3)
    assert torch.equal(torch.get_rng_state(), before)
    torch.rand(1)
    assert torch.equal(prior_latents(model, y, 3), z) and (samples(model, z, y, 3) == sheet).all()
    assert not torch.equal(prior_latents(model, y, 4), z)
    other = cells(samples(model, z, y, 4), 2, 6)
    assert (other[0] == cells(sheet, 2, 6)[0]).all()
    assert (other[1] != cells(sheet, 2, 6)[1]).any()


def test_prior_latents_are_standard_normal():
    z = prior_latents(tiny(), torch.zeros(4000, 0, dtype=torch.float64), 0)
    assert z.shape == (4000, 3) and z.mean(0).abs().max() < 5 / 4000**0.5
    assert (z.std(0) - 1).abs().max() < 5 / 8000**0.5


@torch.no_grad()
def test_interpolation_goes_in_a_line_from_one_original_to_the_other():
    model = tiny(num_classes=3)
    a, b = images_for(model, 2), images_for(model, 2)
    y_a, y_b = (model.condition(2, torch.tensor(labels)) for labels in ([0, 1], [2, 2]))
    found = cells(interpolation(model, a, b, y_a, y_b, steps=5), 2, 7)
    assert (found[:, 0] == rgb(a)).all() and (found[:, -1] == rgb(b)).all()
    assert (found[:, 1] == rgb(model.reconstruct(a, y_a))).all()
    assert (found[:, -2] == rgb(model.reconstruct(b, y_b))).all()
    z_a, z_b = model.posterior(a, y_a).mean, model.posterior(b, y_b).mean
    quarter = model.decode_mean(0.75 * z_a + 0.25 * z_b, 0.75 * y_a + 0.25 * y_b)
    assert (found[:, 2] == rgb(quarter)).all()


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_traversal_moves_the_most_active_dimensions_around_the_reconstruction(kind):
    model = tiny(**KINDS[kind])
    model.to_posterior.weight[1] *= 20  # z1 is the most active now
    images, y = images_for(model, 7), model.condition(7)
    found = cells(traversal(model, images, y, num_dims=9), 3, 7)  # z2 of two layers has no row
    assert (found[:, 3] == rgb(model.reconstruct(images[:1], y[:1]))).all()
    z = model.posterior(images, y).mean.numpy()
    order = np.argsort(-z.std(0, ddof=1)[:3])
    assert order[0] == 1 or kind == "iaf"  # a flow mixes them
    for row, dim in enumerate(order):
        moved = np.repeat(z[:1], 7, 0)
        moved[:, dim] += np.array(OFFSETS) * z[:, dim].std(ddof=1)
        if kind == "bits":
            moved = moved.clip(0, 1)
        assert (found[row] == rgb(model.decode_mean(torch.from_numpy(moved), y))).all()


@torch.no_grad()
def test_attribute_rows_move_images_along_the_vectors():
    model = tiny(top_dim=2)
    images, y = images_for(model, 4), model.condition(4)
    vectors = np.random.default_rng(0).normal(size=(3, 5))
    vectors[1] = np.nan  # nobody has the attribute
    sheet = attribute_rows(model, images, y, vectors, ["Bald", "Male", "Smiling"], (-1, 2))
    found = cells(sheet, 6, 4)
    z = model.posterior(images, y).mean
    expected = [images, model.reconstruct(images, y)]
    for vector, strength in [(0, -1), (0, 2), (2, -1), (2, 2)]:
        expected.append(model.decode_mean(z + strength * torch.from_numpy(vectors[vector]), y))
    assert (found == np.stack([rgb(each) for each in expected])).all()
    for wrong in (vectors[:2], vectors[:, :1]):  # the second would broadcast
        with pytest.raises(ValueError, match="vectors"):
            attribute_rows(model, images, y, wrong, ["Bald", "Male", "Smiling"])


# Conditions.


@pytest.mark.parametrize("prior", ["standard", "learned"])
@torch.no_grad()
def test_generation_has_a_class_per_row_and_a_noise_per_column(prior):
    model = tiny(num_classes=3, num_attributes=1, prior=prior)
    attributes = torch.tensor([[1.0], [-1.0], [0.0], [1.0]])
    y = model.condition(4, torch.tensor([0, 1, 2, -1]), attributes)
    found = cells(generation(model, y, {"two": 2, "none": 0}, seed=5), 2, 4)
    noises = []
    for row, label in enumerate([2, 0]):
        own = model.condition(4, torch.full((4,), label), attributes)
        z = prior_latents(model, own, 5)
        assert (found[row] == rgb(model.decode_mean(z, own))).all()
        p = model.prior(own)
        noises.append((z - p.mean) / (0.5 * p.log_variance).exp())
    torch.testing.assert_close(noises[0], noises[1])
    assert len(noises[0].unique()) == 4 * 3  # and no two columns are alike


@torch.no_grad()
def test_manipulation_to_what_an_image_is_already_is_its_reconstruction():
    model = tiny(num_classes=2, num_attributes=2)
    images, attributes = images_for(model, 3), torch.tensor([[1.0, -1], [-1, 1], [0, 1]])
    y = model.condition(3, torch.tensor([0, 1, 1]), attributes)
    sheet = manipulation(model, images, y, {"zero": 0, "one": 1, "Male": 2, "Smiling": 3})
    original, same, zero, one, male, not_male, smiling, not_smiling = cells(sheet, 8, 3)
    assert (original == rgb(images)).all() and (same == rgb(model.reconstruct(images, y))).all()
    unchanged = {0: [zero, male, not_smiling], 1: [one, not_male, smiling], 2: [one, smiling]}
    changed = {0: [one, not_male, smiling], 1: [zero, male, not_smiling], 2: [male, not_male]}
    for image in range(3):
        assert all((row[image] == same[image]).all() for row in unchanged[image])
        assert all((row[image] != same[image]).any() for row in changed[image])


def test_a_condition_that_the_model_lacks_is_refused():
    model = tiny(num_classes=2)
    images, y = images_for(model, 3), model.condition(3)
    for column in (2, -1):
        with pytest.raises(ValueError, match="Young: the condition has 2 columns"):
            manipulation(model, images, y, {"Young": column})
    with pytest.raises(ValueError, match="has 0 columns"):
        generation(tiny(), y[:, :0], {"Young": 0}, 0)
    with pytest.raises(ValueError, match="at least one image"):
        generation(model, y, {}, 0)


def test_pictures_of_nothing_are_refused():
    model = tiny()
    images, y = images_for(model, 1), model.condition(1)
    with pytest.raises(ValueError, match="at least one image"):
        reconstructions(model, images[:0], y[:0])
    with pytest.raises(ValueError, match="at least 2 images"):
        traversal(model, images, y)


# Latents of two dimensions.


@pytest.mark.parametrize("kind", ["gaussian", "iaf", "two layers"])
@torch.no_grad()
def test_manifold_has_the_axes_of_a_plot(kind):
    model = tiny(latent_dim=2, num_classes=2, **KINDS.get(kind, {}))
    images, y = images_for(model, 3), model.condition(3, torch.tensor([1, 0, 0]))
    sheet = manifold(model, images, y, side=5)
    found = cells(sheet, 5, 5, gap=0, scale=4)
    for row, column, z in [(0, 0, (-3, 3)), (2, 2, (0, 0)), (4, 3, (1.5, -3)), (1, 4, (3, 1.5))]:
        at = torch.tensor([z], dtype=torch.float64)
        assert (found[row, column] == rgb(model.decode_mean(at, y[:1]))[0]).all()
    dark = (sheet[-160:, :-160] < 128).any(2)
    top, bottom = (np.flatnonzero(rows.any(0)) for rows in (dark[:32], dark[-32:]))
    assert top.min() > bottom.min() and top.max() == bottom.max()  # 3.0 above, -3.0 below


@torch.no_grad()
def test_manifold_of_an_ae_lies_where_its_codes_are():
    model = tiny(latent_dim=2, posterior="delta")
    model.to_posterior.bias += torch.tensor([40.0, -7])
    images, y = images_for(model, 30), model.condition(30)
    found = cells(manifold(model, images, y, side=3), 3, 3, gap=0, scale=4)
    codes = model.posterior(images, y).mean.numpy()
    left, right = np.percentile(codes[:, 0], [1, 99])
    down, up = np.percentile(codes[:, 1], [1, 99])
    middle = (left + right) / 2, (down + up) / 2
    for row, column, z in [(0, 0, (left, up)), (1, 1, middle), (2, 0, (left, down)),
                           (2, 2, (right, down))]:  # fmt: skip
        at = torch.tensor([z], dtype=torch.float64)
        near = rgb(model.decode_mean(at, y[:1]))[0].astype(int)
        assert np.abs(found[row, column] - near).max() <= 1  # rounded otherwise, if at all
    assert (found[0, 0] != found[2, 2]).any()


def test_manifold_of_other_latents_is_refused():
    for wrong in ({}, {"latent_dim": 2, "posterior": "bernoulli"}):
        model = tiny(**wrong)
        with pytest.raises(ValueError, match="continuous latent of 2 dimensions"):
            manifold(model, images_for(model, 2), model.condition(2))


def coloured(picture: np.ndarray) -> np.ndarray:
    """Where a picture is neither white, grey nor black, (H, W)."""
    return np.ptp(picture.astype(int), 2) > 20


def test_ellipses_reach_one_standard_deviation_from_the_mean():
    means = np.array([[-2.0, 0.0], [2.0, 0.0]])
    log_variances = np.log(np.array([[1.0, 0.25], [1.0, 0.25]]) ** 2)
    seen = coloured(posterior_scatter([Posteriors("VAE", means, log_variances)]))
    columns, rows = np.flatnonzero(seen.any(0)), np.flatnonzero(seen.any(1))
    width = np.ptp(columns)  # from -3 to 3
    assert np.diff(columns).max() == pytest.approx(width / 3, rel=0.03)  # from -1 to 1 is nothing
    assert np.ptp(rows) == pytest.approx(width / 12, rel=0.06)  # from -1/4 to 1/4


def test_a_scatter_has_a_panel_per_model_and_shows_every_latent():
    z = np.random.default_rng(0).normal(size=(40, 2))
    points = Posteriors("AE", 30 * z + 50, None, np.arange(40) % 3)  # far from the prior
    ellipses = Posteriors("VAE", z, np.full((40, 2), -3.0), np.arange(40))  # more than ten labels
    both = posterior_scatter([points, ellipses])
    height, width, _ = both.shape
    assert coloured(both[:, : width // 2]).any() and coloured(both[:, width // 2 :]).any()
    assert posterior_scatter([points]).shape == (height, width // 2, 3)


def test_a_scatter_of_other_shapes_is_refused():
    for wrong in (
        Posteriors("three", np.zeros((4, 3))),
        Posteriors("one", np.zeros(4)),
        Posteriors("mixed", np.zeros((4, 2)), np.zeros((3, 2))),
    ):
        with pytest.raises(ValueError, match=r"must be \(N, 2\)"):
            posterior_scatter([wrong])


# Charts.


def write_metrics(path, *lines: dict, end: str = "") -> None:
    path.write_text("".join(json.dumps(line) + "\n" for line in lines) + end)


def test_curves_draw_what_a_run_has(tmp_path):
    path = tmp_path / "metrics.jsonl"
    line = {"images_seen": 0, "vae/reconstruction": 9.0, "vae/kl": 0.0, "vae/negative_elbo": 9.0}
    other = {"images_seen": 50, "schedule/learning_rate": 1.0}
    checked = {"images_seen": 80, "validation/reconstruction": 5.0}
    run = [line, {**line, "images_seen": 100, "vae/kl": 3.0}, other, checked]
    write_metrics(path, *run)
    whole = curves(path)
    height, width, _ = whole.shape
    broken = {"images_seen": 60, "vae/kl": math.nan, "vae/reconstruction": math.inf}
    write_metrics(path, *run, broken, end='{"images_seen": 90, "vae/k')  # being written
    assert (curves(path) == whole).all()
    write_metrics(path, checked)  # one value is a curve as well
    single = curves(path)
    assert single.shape == (height, width // 3, 3) and coloured(single).any()
    write_metrics(path, other)
    with pytest.raises(ValueError, match="no figures"):
        curves(path)


def test_a_curve_that_starts_far_above_is_shown_where_it_comes_to(tmp_path):
    path = tmp_path / "metrics.jsonl"
    seen = range(0, 1001, 50)
    run = [{"images_seen": n, "vae/kl": 10 - n / 100 + 1e6 * (n == 0)} for n in seen]
    write_metrics(path, *run)
    chart = coloured(curves(path))
    rows = np.flatnonzero(chart[80:, chart.shape[1] // 4 :].any(1))  # below the legend
    assert np.ptp(rows) > 100  # of 360: not a flat line under a spike
