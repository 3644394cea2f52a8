"""Kills, load and hostile input: scripts that anyone can run, of which CI runs a part."""
