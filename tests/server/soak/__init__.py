"""Mixed load on a running server, for as long as one wants, with the checks that follow: see `__main__`."""
