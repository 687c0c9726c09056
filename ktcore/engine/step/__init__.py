"""What a step does: the modules run over a batch, on which devices, and the next tokens drawn."""
