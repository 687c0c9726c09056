"""What runs next: sequences, their pages, and the choice of each step's tokens."""
