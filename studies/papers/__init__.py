"""The papers' experiments with seeds, controls and pictures; see __main__.py."""
