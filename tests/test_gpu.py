"""What must hold on a CUDA device; imports only torch, numpy, einops and this repository's models.

`make test-gpu PYTHON=python3` runs it with any interpreter that has those.
"""

import copy

import pytest
import torch

from pipeline.models.priors import make_prior
from pipeline.models.priors.noise import image_keys
from pipeline.models.priors.prior import PriorConfig
from pipeline.models.priors.sampling import log_likelihood, sample_codes
from pipeline.models.quantizers import PlacedCodes
from pipeline.models.vae.objectives import Objective
from pipeline.models.vae.vae import VAE, VAEConfig
from pipeline.models.vqvae import VQVAE, VQVAEConfig, loss
from pipeline.training.codebooks import Codebooks, Part, start_codebooks

pytestmark = pytest.mark.gpu


SMALL = {"channels": 16, "residual_channels": 8, "code_dim": 8}


@pytest.mark.parametrize("gradient", ["straight_through", "rotation"])
@pytest.mark.parametrize(
    "quantizer", [("ema",), ("learned", "cosine"), ("simvq", "fsq"), ("fsq", "ema")]
)
def test_training_steps_agree_with_the_cpu_in_float64(quantizer, gradient):
    """k-means, then steps with revival."""
    config = VQVAEConfig(
        codebook_size=(32,), quantizer=quantizer, gradient=gradient, revival=0.5, **SMALL
    )
    cpu = VQVAE(config).double().train()
    gpu = copy.deepcopy(cpu).cuda()
    images = torch.rand(8, 3, 32, 32, dtype=torch.float64)
    found = []
    for model in (cpu, gpu):
        batch = images.to(next(model.parameters()).device)
        start_codebooks(model, [Part(batch, 0)], batch_size=8)
        codebooks, figures = Codebooks(model.quantizers, batch_size=8), []
        for step in range(3):
            output = model(batch)
            codebooks.observe(output.levels, 0, images_seen=8 * step)
            codebooks.start_reduction()
            total, _ = loss(output, batch, 0.1, 0.25)
            gradients = torch.autograd.grad(total, list(model.parameters()), allow_unused=True)
            with torch.no_grad():
                for parameter, change in zip(model.parameters(), gradients, strict=True):
                    if change is not None:
                        parameter -= 0.01 * change
            revived = codebooks.commit()
            assert revived.device == batch.device
            figures += [total.item(), *revived.tolist()]
        found.append(figures)
    assert found[0] == pytest.approx(found[1], rel=1e-9)
    other = gpu.quantizers.state_dict()
    for name, tensor in cpu.quantizers.state_dict().items():
        torch.testing.assert_close(tensor, other[name].cpu(), rtol=1e-8, atol=1e-10, msg=name)


@pytest.mark.parametrize("quantizer", ["ema", "learned", "cosine", "fsq", "simvq"])
def test_a_step_of_the_codebooks_does_not_make_the_host_wait(quantizer):
    config = VQVAEConfig(codebook_size=(64,), quantizer=(quantizer,), **SMALL)
    model = VQVAE(config).cuda().train()
    codebooks = Codebooks(model.quantizers, batch_size=8)
    latents = torch.randn(8, 8, 16, 16, device="cuda")

    def step():
        outputs = [level(latents) for level in model.quantizers]
        codebooks.observe(outputs, 0, 0)
        codebooks.start_reduction()
        codebooks.commit()

    step()  # compiles and tunes
    torch.cuda.set_sync_debug_mode("error")
    try:
        step()
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("device", ["cuda:0", "cuda:1"])
@pytest.mark.parametrize("method", ["wavefront", "raster"])
@pytest.mark.parametrize("architecture", ["pixelcnn", "pixelsnail", "transformer"])
@torch.no_grad()
def test_samples_are_those_of_the_cpu_in_float64(architecture, method, device):
    """On CUDA the steps run as graphs, fronts padded to one size; also on a GPU that is not the
    current one."""
    if torch.device(device).index >= torch.cuda.device_count():
        pytest.skip("needs two GPUs")
    config = PriorConfig(
        architecture=architecture, channels=16, attention_channels=16, heads=2, layers=3,
        attention_layers=architecture == "pixelsnail", grid=(6, 7), codebook_size=17,
    )  # fmt: skip
    model = make_prior(config).double().eval()
    keys = image_keys(0, torch.arange(4), 0)
    expected = sample_codes(model, model.condition(4), keys).codes
    model = model.to(device)
    drawn = sample_codes(model, model.condition(4), keys.to(device), method=method).codes
    assert torch.equal(drawn.cpu(), expected)


def test_likelihoods_are_those_of_the_cpu_in_float32():
    """In TF32, which is on for convolutions, they would be off by more."""
    assert torch.backends.cudnn.allow_tf32
    config = PriorConfig(grid=(8, 8), channels=128, layers=4, codebook_size=64)
    model, codes = make_prior(config).eval(), torch.randint(64, (8, 8, 8))
    expected = log_likelihood(model, codes, model.condition(8))
    model = model.cuda()
    found = log_likelihood(model, codes.cuda(), model.condition(8)).cpu()
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-4)


@pytest.mark.parametrize("quantizer", ["ema", "learned", "cosine", "fsq", "simvq"])
def test_the_quantizer_stays_fp32_under_bf16(quantizer):
    config = VQVAEConfig(channels=16, residual_channels=8, quantizer=(quantizer,))
    model = VQVAE(config).cuda().train()
    with torch.autocast("cuda", torch.bfloat16):
        output = model(torch.rand(2, 3, 64, 64, device="cuda"))
        for level, found in zip(model.quantizers, output.levels, strict=True):
            assert level.lookup(found.codes).dtype == torch.float32
    codebooks = Codebooks(model.quantizers, batch_size=2)
    codebooks.observe(output.levels, 0, 0)
    codebooks.commit()
    for level, found in zip(model.quantizers, output.levels, strict=True):
        assert found.quantized.dtype == found.commitment.dtype == torch.float32
        if isinstance(level, PlacedCodes):
            assert level.counts.dtype == level.vectors_of_codes().dtype == torch.float32


@pytest.mark.parametrize(
    ("model", "objective"),
    [
        ({}, {"kl": "sampled"}),
        ({"posterior": "iaf"}, {}),
        ({"top_dim": 2}, {"name": "iwae", "num_samples": 3}),
        ({}, {"name": "iwae", "num_samples": 3, "encoder_gradient": "dreg"}),
        ({"posterior": "bernoulli"}, {"name": "exact"}),
        ({"posterior": "bernoulli"}, {"name": "wake-sleep"}),
        ({"posterior": "delta"}, {"mmd_weight": 1.0}),
        ({"likelihood": "logistic_mixture", "context_layers": 1}, {}),
        ({"dequantization": "variational", "likelihood": "gaussian_pixel"}, {"name": "prior-mc"}),
    ],
    ids=str,
)
def test_vaes_train_in_bf16_on_the_device(model, objective):
    """All parameters get finite gradients, and the densities stay at least fp32."""
    config = VAEConfig(image_size=32, channels=8, latent_dim=4, **model)
    vae = VAE(config).cuda().to(memory_format=torch.channels_last)
    images = torch.randint(0, 256, (4, 3, 32, 32), device="cuda") / 255
    y = vae.condition(4)
    with torch.autocast("cuda", torch.bfloat16):
        values = vae(images, y, Objective(**objective), torch.ones((), device="cuda"))
    assert values["loss"].dtype == torch.float32
    values["loss"].backward()
    missing = [name for name, p in vae.named_parameters() if p.grad is None]
    assert not missing and all(p.grad.isfinite().all() for p in vae.parameters())
    assert vae.decode_draw(vae.prior(y).draw(1)[0][0], y).device.type == "cuda"
