"""Every operator once more, written apart from the references, in any precision: float64 is the truth."""
