"""Where routed experts live, and how an accelerator hands them tokens and takes back their sum."""
