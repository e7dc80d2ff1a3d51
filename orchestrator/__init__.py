"""Spec -> tasks -> shards -> Ray, and the command line. May import every other room."""
