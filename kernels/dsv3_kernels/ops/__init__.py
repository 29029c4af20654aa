"""Small operations: norms, activations, sampling, the sum over ranks."""
