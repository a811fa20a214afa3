"""Networks: no training code, no files. MODELS is the one place that names them."""

from pipeline.models.classifier import Classifier, ClassifierConfig
from pipeline.models.pixelcnn import PixelCNN, PixelCNNConfig
from pipeline.models.vae.vae import VAE, VAEConfig
from pipeline.models.vqvae import VQVAE, VQVAEConfig

MODELS = {
    "classifier": (ClassifierConfig, Classifier),
    "vae": (VAEConfig, VAE),
    "vqvae": (VQVAEConfig, VQVAE),
    "pixelcnn": (PixelCNNConfig, PixelCNN),
}
