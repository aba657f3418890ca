"""Attacks on what runs send and keep: each trains for real, through the paths that runs take."""
