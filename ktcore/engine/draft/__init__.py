"""Drafters: what proposes next tokens, for the model to check several of them in one step."""
