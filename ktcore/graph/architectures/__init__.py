"""Builders of model families' graphs, a file a family; `ktcore.graph.families` lists them."""
