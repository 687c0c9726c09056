"""Mutation testing of a room: small faults drawn by seed, and whether the room's tests notice them."""
