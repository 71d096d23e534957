"""What starts a run on a cluster: a script for torchrun or Slurm, or a manifest for Kubernetes."""
