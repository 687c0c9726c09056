"""How model families write calls of tools and thoughts into their answers, and how both are read back."""
