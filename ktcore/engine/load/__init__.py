"""How a plan becomes a loaded model: packing, converting, and the cache of packed weights."""
