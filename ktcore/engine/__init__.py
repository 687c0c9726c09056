"""The engine: sequences, scheduler, pages, sampler and the step loop, and the Python API over them."""
