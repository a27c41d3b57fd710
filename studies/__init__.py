"""Experiments with results: each folder is a program of its own."""
