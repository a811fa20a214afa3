"""images -> shards -> VQ-VAE(-2) -> codes -> priors -> samples -> evaluation; one script each."""
