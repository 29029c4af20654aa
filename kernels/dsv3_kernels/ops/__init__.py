"""Small operations: norms, activations, sampling."""
