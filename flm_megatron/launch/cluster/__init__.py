"""Starts a run on a cluster: by a script for torchrun or Slurm, or a manifest for Kubernetes."""
