"""Training with rbwa_fused: each file is a program to copy and change."""
