"""Makes of a bundle the zip that the Model Zoo hosts: weights, and the code that inference and evaluation need."""
