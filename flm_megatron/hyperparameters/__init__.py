"""Finding hyperparameters on small models: muP's coordinate check, and a random `search`."""
