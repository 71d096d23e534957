"""What is looked at while a run trains: `spikes` of loss and gradient, `replicas` that differ, `layer_norms`."""
