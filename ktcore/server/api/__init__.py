"""The APIs that clients speak, a folder each; what they share lies beside the folders."""
