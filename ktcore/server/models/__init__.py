"""The models that a server has: by name, loaded when asked for, and what is known of them."""
