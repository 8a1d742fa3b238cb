"""Build a bundle's zip for the Model Zoo, with its weights and the code that inference and evaluation need."""
