"""Tests of how families write calls and thoughts, and of how both are read back."""
