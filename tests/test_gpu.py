"""What must hold on a CUDA device; imports only torch, numpy, einops and this repository's models.

`make test-gpu PYTHON=python3` runs it with any interpreter that has those.
"""

import copy

import pytest
import torch

from pipeline.models.pixelcnn import PixelCNN, PixelCNNConfig
from pipeline.models.quantizer import commit
from pipeline.models.sampling import gumbel_noise, sample_codes
from pipeline.models.vqvae import VQVAE, VQVAEConfig, loss

pytestmark = pytest.mark.gpu


def test_training_steps_agree_with_the_cpu_in_float64():
    config = VQVAEConfig(channels=16, residual_channels=8, codebook_size=(32,), code_dim=8)
    cpu = VQVAE(config).double().train()
    gpu = copy.deepcopy(cpu).cuda()
    images = torch.rand(8, 3, 32, 32, dtype=torch.float64)
    for _ in range(3):
        totals = []
        for model in (cpu, gpu):
            device = next(model.parameters()).device
            total, _ = loss(model(images.to(device)), images.to(device), 0.1, 0.25)
            gradients = torch.autograd.grad(total, list(model.parameters()))
            with torch.no_grad():
                for parameter, gradient in zip(model.parameters(), gradients, strict=True):
                    parameter -= 0.01 * gradient
            commit(model.quantizers, 8)
            totals.append(total.item())
        assert totals[0] == pytest.approx(totals[1], rel=1e-9)
    for a, b in zip(cpu.quantizers, gpu.quantizers, strict=True):
        torch.testing.assert_close(a.codebook, b.codebook.cpu(), rtol=1e-8, atol=1e-10)


@torch.no_grad()
def test_samples_are_those_of_the_cpu_in_float64():
    config = PixelCNNConfig(channels=16, layers=3, codebook_size=17)
    model = PixelCNN(config).double().eval()
    noise = torch.from_numpy(gumbel_noise(0, range(4), 0, 17, (6, 6))).double()
    expected = sample_codes(model, model.condition(4, (6, 6)), noise)
    model = model.cuda()
    drawn = sample_codes(model, model.condition(4, (6, 6)), noise.cuda())
    assert torch.equal(drawn.cpu(), expected)


def test_the_quantizer_stays_fp32_under_bf16():
    model = VQVAE(VQVAEConfig(channels=16, residual_channels=8)).cuda().train()
    with torch.autocast("cuda", torch.bfloat16):
        output = model(torch.rand(2, 3, 64, 64, device="cuda"))
    assert all(c.dtype == torch.float32 for c in output.commitments)
