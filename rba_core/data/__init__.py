"""Procedural products with known correspondence: what the embedded model learns from and is tested on."""
