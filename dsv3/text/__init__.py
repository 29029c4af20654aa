"""Text before and after the model: tokenizers, chat formats, request formats. Without torch."""
