"""Where things fit: the machine's topology and the memory that a plan needs."""
