"""The prefix cache: prompts that begin alike are computed once. Pages live on the device, in memory and on disk."""
