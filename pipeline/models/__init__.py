"""Networks: no training code, no files. MODELS is the one place that names them."""

from pipeline.models.classifier import Classifier, ClassifierConfig
from pipeline.models.priors import make_prior
from pipeline.models.priors.prior import PriorConfig
from pipeline.models.vae.vae import VAE, VAEConfig
from pipeline.models.vqvae import VQVAE, VQVAEConfig

MODELS = {
    "classifier": (ClassifierConfig, Classifier),
    "vae": (VAEConfig, VAE),
    "vqvae": (VQVAEConfig, VQVAE),
    "prior": (PriorConfig, make_prior),
}
