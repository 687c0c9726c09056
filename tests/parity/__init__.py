"""The same weights through transformers and through ktcore must give the same logits."""
