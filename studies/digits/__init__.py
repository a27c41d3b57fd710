"""Training a small network on real images with every method of rbwa_fused; see __main__.py."""
