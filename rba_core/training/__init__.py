"""Training of a model in three legs: encoder (dense correspondence), autoencoder, U-Net with MLP."""
